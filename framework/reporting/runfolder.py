"""The folder of a run: created fresh, never shared with another run, described well enough to repeat it."""

import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

import framework

FINISHED = "summary.json"
"""The last file that a training run writes."""


def fresh_folder(name: str) -> Path:
    """``runs/<name>``, or the first of ``runs/<name>-2``, ``-3``, … that is not there yet."""
    folder, number = Path("runs") / name, 2
    while folder.exists():
        folder, number = Path("runs") / f"{name}-{number}", number + 1
    return folder


def create_run_folder(path: str | Path) -> Path:
    """Create the folder of a new run. Raises ValueError when it holds anything or cannot be written."""
    folder = Path(path)
    try:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"output_dir={str(path)!r} is a file; give another --output_dir")
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(
                f"output_dir={str(path)!r} holds another run already; give a new --output_dir (nothing was changed)"
            )
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"output_dir={str(path)!r} cannot be written: {error.strerror or error}") from error
    return folder


@contextmanager
def removed_if_empty(folder: Path) -> Iterator[None]:
    """Around work that fills a folder: what fails before it wrote anything leaves no empty folder behind."""
    try:
        yield
    except BaseException:
        with suppress(OSError):  # it holds something
            folder.rmdir()
        raise


def typed() -> list[str]:
    """The command line of this process as a person types it: where the program lies is nobody else's business."""
    program, words = Path(sys.argv[0]), sys.argv[1:]
    if program.stem == "armillary":
        return ["armillary", *words]
    if program.parts[-2:] == ("framework", "__main__.py"):
        return ["python", "-m", "framework", *words]
    return list(sys.argv)


def write_run_files(folder: Path, operative_config: str) -> None:
    """The exact configuration, the command line and the environment of the run.

    Of a run that goes on: those in force now; command.txt has a line for every process.
    """
    staged = folder / "config.gin.partial"
    staged.write_text(operative_config, encoding="utf-8")
    staged.replace(folder / "config.gin")
    with (folder / "command.txt").open("a", encoding="utf-8") as commands:
        commands.write(shlex.join(typed()) + "\n")
    environment = {
        "armillary": framework.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    (folder / "env.json").write_text(json.dumps(environment, indent=2) + "\n", encoding="utf-8")
