"""Several configurations trained with several seeds, each run in a process of its own, and one report of all."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from framework.adapters import load_adaptation
from framework.commands.compare_arms import Arm, check_budget, check_fair, read_arms
from framework.devices import prepare
from framework.drift import judge_blocks
from framework.reporting.comparison import Comparison, Failure, RunResult, pooled_gains, read_run
from framework.reporting.comparison_clips import CLIPS, read_clips, spread, write_clips
from framework.reporting.comparison_page import write_page
from framework.reporting.comparison_tables import write_tables
from framework.reporting.progress import progress, say
from framework.reporting.report import GAIN_HEADERS, format_table, gain_cells
from framework.weights import read_tensors, save_tensors

FINISHED = "summary.json"
"""The last file that a training run writes."""
BLOCKS = "blocks.safetensors"
SHOWN = 6
"""Captions whose clips are shown."""


@dataclass(frozen=True)
class Run:
    """One training run of a comparison. arguments: of `armillary`."""

    arm: Arm
    seed: int
    folder: Path
    arguments: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of its folder and its log."""
        return self.folder.name

    @property
    def finished(self) -> bool:
        """Whether its folder holds everything."""
        return (self.folder / FINISHED).is_file()


def compare(
    *,
    arms: Sequence[str],
    output_dir: str,
    seeds: int = 3,
    samples: int | None = None,
    parallel: int = 1,
    device: str = "cpu",
    gin_params: Sequence[str] = (),
    plugins: Sequence[str] = (),
) -> Path:
    """Train every arm with seeds 0 … ``seeds`` − 1, judge every result block by block, write the report; its path.

    arms: gin files, ``FILE`` or ``NAME=FILE``. output_dir: of all runs; those that are finished there are kept.
    samples: training clips of every run; None where the arms ask for equally many. parallel: runs at a time, one thread
    each. gin_params: gin lines for every arm.

    Everything that can be refused is refused before the first run starts: arms that would not be comparable, and
    finished runs in output_dir of another configuration. A run that fails does not stop the others; after the report is
    written, ValueError says how many did.
    """
    for name, value in (("seeds", seeds), ("parallel", parallel)):
        if value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    chosen = read_arms(arms, gin_params, plugins)
    check_fair(chosen)
    steps = check_budget(chosen, samples)
    root = Path(output_dir)
    runs = [plan_run(arm, seed, root, steps[arm.name], device) for arm in chosen for seed in range(seeds)]
    for run in runs:
        check_kept(run)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output_dir {output_dir!r} cannot be written: {error.strerror or error}") from error
    failures = train_all(runs, parallel)
    comparison = judge_all(root, chosen, runs, failures, device)
    words = ["armillary", "compare", "--arms", *arms, "--seeds", str(seeds), "--output_dir", output_dir]
    for flag, values in (("--samples", () if samples is None else (str(samples),)), ("--gin_param", gin_params),
                         ("--plugin", plugins), ("--device", () if device == "cpu" else (device,))):  # fmt: skip
        words += [word for value in values for word in (flag, value)]
    comparison = replace(comparison, command=shlex.join(words))
    path = root / "report.html"
    write_page(comparison, path, write_tables(comparison, root))
    show(comparison, path)
    if comparison.failures:
        first = comparison.failures[0]
        raise ValueError(f"{len(comparison.failures)} of {len(runs)} runs failed, first {first.run} ({first.line}); "
                         f"{path} holds the others, the same command tries again what is missing")  # fmt: skip
    return path


def plan_run(arm: Arm, seed: int, root: Path, steps: int, device: str) -> Run:
    """The command that trains one seed of an arm."""
    folder = root / f"{arm.name}-{seed}"
    words = ["train", *arm.words, "--seed", str(seed), "--max_steps", str(steps), "--output_dir", str(folder)]
    return Run(arm, seed, folder, (*words, *(() if device == "cpu" else ("--device", device))))


def check_kept(run: Run) -> None:
    """Raises ValueError when its folder holds a finished run of another configuration, or no run at all."""
    if not run.folder.exists():
        return
    recorded = run.folder / "config.gin"
    if not recorded.is_file():
        if not run.folder.is_dir() or any(run.folder.iterdir()):
            raise ValueError(f"{run.folder} is there and holds no config.gin of a run; give another --output_dir")
        return
    if not run.finished:
        return
    steps, seed = (int(run.arguments[run.arguments.index(flag) + 1]) for flag in ("--max_steps", "--seed"))
    device = run.arguments[run.arguments.index("--device") + 1] if "--device" in run.arguments else None
    expected = run.arm.operative_config(str(run.folder), seed, steps, device)

    def meaning(text: str) -> set[str]:
        return {line for line in text.splitlines() if line.strip() and not line.startswith(("#", "train.output_dir"))}

    changed = sorted(meaning(recorded.read_text(encoding="utf-8")) ^ meaning(expected))
    if changed:
        raise ValueError(f"{run.folder} holds a run of another configuration, it differs in {changed[0]!r}"
                         f"{f' and {len(changed) - 1} more lines' if len(changed) > 1 else ''}; give another "
                         f"--output_dir, or remove the folder to train it again")  # fmt: skip


def train_all(runs: Sequence[Run], parallel: int) -> list[Failure]:
    """Train what is not finished, ``parallel`` at a time; what failed."""
    waiting = [run for run in runs if not run.finished]
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
    if run.folder.exists():  # what `check_kept` let pass: unfinished or empty
        say(f"{run.name}: unfinished, starts again")
        shutil.rmtree(run.folder)
    log = run.folder.with_name(run.name + ".log")
    with log.open("w", encoding="utf-8") as out:
        done = subprocess.run(
            [sys.executable, "-m", "framework", *run.arguments], stdout=out, stderr=out,
            env=os.environ | {"OMP_NUM_THREADS": "1", "ARMILLARY_PROGRESS": "0"},
        )  # fmt: skip
    if done.returncode == 0 and run.finished:
        say(f"{run.name}: trained")
        return None
    failure = Failure(run.name, reason(log, done.returncode))
    say(f"{run.name}: {failure.line}")
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


def judge_all(
    root: Path, arms: Sequence[Arm], runs: Sequence[Run], failures: Sequence[Failure], device: str
) -> Comparison:
    """Read all finished runs and judge their policies block by block. Raises ValueError when there is none."""
    failed = list(failures)
    results: list[RunResult] = []
    finished = [run for run in runs if run.finished]
    if not finished:
        raise ValueError(f"no run finished; first {failed[0].run}: {failed[0].line}")
    shown = spread(len(arms[0].captions), SHOWN)
    start = judge_run(arms[0], None, root / "start", shown, device)
    for run in progress(finished, "judging"):
        try:
            folder = judge_run(run.arm, run.folder / "adapter", run.folder, shown, device)
            result = read_run(run.arm.name, run.seed, run.folder, shlex.join(["armillary", *run.arguments]))
            blocks = read_tensors(folder / BLOCKS)
        except (ValueError, OSError) as error:
            failed.append(Failure(run.name, str(error).splitlines()[0]))
            continue
        results.append(result.judged(blocks, read_clips(folder)))
    if not results:
        raise ValueError(f"no run can be reported; first {failed[0].run}: {failed[0].line}")
    firsts = {run.arm.name: run for run in reversed(finished)}
    return Comparison(
        runs=tuple(results),
        failures=tuple(failed),
        configs={arm.name: (firsts[arm.name].folder / "config.gin").read_text(encoding="utf-8")
                 for arm in arms if arm.name in firsts},
        start_blocks=read_tensors(start / BLOCKS),
        start_clips=read_clips(start),
        captions=tuple(arms[0].captions[i] for i in shown),
        shown=shown,
        first_block=arms[0].first_block,
    )  # fmt: skip


def judge_run(arm: Arm, adapter: Path | None, folder: Path, shown: Sequence[int], device: str) -> Path:
    """Judge a policy block by block, once: blocks.safetensors and the shown clips in ``folder``; returns it.

    adapter: what a run saved, None for the generator that all arms start from.
    """
    done, stamp = folder / BLOCKS, folder / "judged.txt"
    if done.is_file() and stamp.read_text(encoding="utf-8") == arm.judged_as:
        return folder
    generator, evaluation = arm.build()
    prepare(generator.network, device, 1)
    if adapter is not None:
        load_adaptation(generator.network, adapter)
    blocks, videos = judge_blocks(evaluation, generator)
    shutil.rmtree(folder / CLIPS, ignore_errors=True)
    write_clips(folder, videos, shown)
    stamp.write_text(arm.judged_as, encoding="utf-8")
    partial = folder / (BLOCKS + ".partial")
    save_tensors(partial, blocks)
    partial.replace(done)  # last: whoever finds it finds the clips as well
    return folder


def show(comparison: Comparison, path: Path) -> None:
    """The pooled gains of every arm, alarms and the path, on the console."""
    for arm, runs in comparison.arms.items():
        say("")
        say(f"{arm}: held-out gain over seeds {', '.join(str(run.seed) for run in runs)}")
        say(format_table(gain_cells(pooled_gains(runs)), GAIN_HEADERS))
    for line in comparison.alarms:
        say(f"alarm: {line}")
    say("")
    say(f"saved {path}")
