"""Training runs in processes of their own: which are finished, which may be kept, and why one failed.

`compare` and `claims` share it. A run has one thread, its output stands in a log beside its folder.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from framework.checkpoint import Checkpoints
from framework.commands.resumption import CHECKPOINTS, check_same_config
from framework.reporting.comparison import Failure
from framework.reporting.progress import progress, say
from framework.reporting.runfolder import FINISHED


class Run(Protocol):
    """One run. arguments: of `armillary`."""

    @property
    def folder(self) -> Path: ...

    @property
    def arguments(self) -> Sequence[str]: ...


def is_finished(folder: Path) -> bool:
    """Whether the folder of a run holds everything."""
    return (folder / FINISHED).is_file()


def check_folder(folder: Path, command: str, expected: Callable[[], str]) -> None:
    """Raises ValueError when a folder holds a run of another configuration that would be kept, or no run at all.

    expected: gives what the config.gin of this run of ``command`` would say; asked only where there is one to compare.
    """
    if not folder.exists():
        return
    recorded = folder / "config.gin"
    if not recorded.is_file():
        if not folder.is_dir() or any(folder.iterdir()):
            raise ValueError(f"{folder} is there and holds no config.gin of a run; give another --output_dir")
        return
    if not is_finished(folder):
        check_same_config(command, recorded.read_text(encoding="utf-8"), expected(), f"{folder} holds a run")
        return
    ignored = ("#", f"{command}.output_dir")

    def meaning(text: str) -> set[str]:
        return {line for line in text.splitlines() if line.strip() and not line.startswith(ignored)}

    changed = sorted(meaning(recorded.read_text(encoding="utf-8")) ^ meaning(expected()))
    if changed:
        raise ValueError(f"{folder} holds a run of another configuration, it differs in {changed[0]!r}"
                         f"{f' and {len(changed) - 1} more lines' if len(changed) > 1 else ''}; give another "
                         f"--output_dir, or remove the folder to train it again")  # fmt: skip


def train_all(runs: Sequence[Run], parallel: int) -> list[Failure]:
    """Train what is not finished, ``parallel`` at a time; what failed."""
    waiting = [run for run in runs if not is_finished(run.folder)]
    if len(waiting) < len(runs):
        say(f"{len(runs) - len(waiting)} of {len(runs)} runs are finished and kept")
    failures: list[Failure] = []
    pool = ThreadPoolExecutor(parallel)
    try:
        with progress(len(waiting), "runs") as bar:
            for failure in pool.map(train_one, waiting):
                bar.update(1)
                failures += [] if failure is None else [failure]
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C nothing else starts
    return failures


def train_one(run: Run) -> Failure | None:
    """Train one run in a process of its own, its output in a log beside its folder."""
    name = run.folder.name
    if Checkpoints(run.folder / CHECKPOINTS).folders():
        say(f"{name}: unfinished, goes on from its newest checkpoint")
    log = run.folder.with_name(name + ".log")
    with log.open("w", encoding="utf-8") as out:
        done = subprocess.run(
            [sys.executable, "-m", "framework", *run.arguments], stdout=out, stderr=out,
            env=os.environ | {"OMP_NUM_THREADS": "1", "ARMILLARY_PROGRESS": "0"},
        )  # fmt: skip
    if done.returncode == 0 and is_finished(run.folder):
        say(f"{name}: trained")
        return None
    failure = Failure(name, reason(log, done.returncode))
    say(f"{name}: {failure.line}")
    return failure


def reason(log: Path, code: int) -> str:
    """The line of a log that says why its process ended."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("armillary: error: ")]
    if errors:
        return errors[-1].removeprefix("armillary: error: ").removesuffix(" (--debug shows where)")
    if code < 0:
        return f"ended by signal {-code}, see {log}"
    return f"{lines[-1] if lines else 'said nothing'} (exit status {code}), see {log}"
