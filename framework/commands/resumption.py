"""Where a run starts: in a new folder, or at a checkpoint of the run that its folder holds. Nothing is overwritten."""

import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from framework.checkpoint import CONFIG, LATEST, SHARED, CheckpointError, Checkpoints, rank_part, read_part, versions
from framework.reporting.metrics import RECORD, MetricsLogger, check_record, cut_back
from framework.reporting.progress import say
from framework.reporting.runfolder import FINISHED, create_run_folder, fresh_folder, write_run_files

FREE = ("output_dir", "resume", "dry_run", "max_steps", "checkpoint_every", "keep_checkpoints", "distribution")
"""Parameters of a command that a resumed run may have otherwise: no step depends on them."""
FREE_PARTS = (
    "distribution.Distribution.", "client.HttpReward.urls", "client.HttpReward.token_file",
    "client.HttpReward.timeout_", "calling.Patience.",
)  # fmt: skip
"""Parts, or parameters of parts, of which the same is true. A reward service that moved holds the same model there."""
NOTED = ("threads", "device", "groups_at_once", "branches_at_once")
"""Parameters that fit a run to a machine: the same steps, equal up to rounding; said aloud when they differ."""
CHECKPOINTS = "checkpoints"
KEPT = {CONFIG, "command.txt", "env.json", "metrics.jsonl", "tb", "before.safetensors", CHECKPOINTS}
"""What is the run's own; everything else in its folder is a result of its end."""


@dataclass
class Start:
    """Where a run starts. source: the checkpoint that it continues, None for a new run; shared, own: its parts."""

    folder: Path
    checkpoints: Checkpoints
    source: Path | None = None
    shared: dict[str, Any] | None = field(default=None, repr=False)
    own: dict[str, Any] | None = field(default=None, repr=False)
    step: int = 0
    config: str = field(default="", repr=False)

    def check_weights(self, weights: str) -> None:
        """Raises CheckpointError when the run started from other weights than those of this `start_hash`."""
        with fitting(self):
            if self.shared is not None and self.shared["weights"] != weights:
                raise CheckpointError("it started from other weights than the configuration gives now")

    def log(self) -> MetricsLogger:
        """The run's log. What is continued is cut back to its checkpoint: later lines go, later checkpoints and the
        results of a finished run are moved aside. Until then its folder is as it was."""
        if self.source is None:
            return MetricsLogger(self.folder)
        with fitting(self):
            position = self.shared["log"] if self.shared else {}
        check_record(self.folder, position)
        if (self.folder / FINISHED).is_file():
            say(f"  results of the finished run are now in {set_results_aside(self.folder)}")
        shutil.rmtree(self.folder / "adapter", ignore_errors=True)  # left by a process that ended before its last file
        for path in self.checkpoints.set_aside_after(self.step):
            say(f"  a later checkpoint is now {path}")
        write_run_files(self.folder, self.config)
        return MetricsLogger(self.folder, position=position)


@contextmanager
def fitting(start: Start) -> Iterator[None]:
    """Whatever goes wrong with putting a state back is a CheckpointError that names the checkpoint."""
    try:
        yield
    except (RuntimeError, LookupError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{start.source} does not fit this run: {reason}; start again in another --output_dir"
        ) from error


def open_run(
    command: str, output_dir: str | None, resume: str, config: str, store: Callable[[Path], Checkpoints],
    last_step: int | None = None,
) -> Start:  # fmt: skip
    """Create the folder of a new run, or find where the run in it goes on.

    resume: "never" takes a new folder only; "auto" also continues an unfinished run of the same configuration; a path
    continues from that checkpoint, or from the newest of that run, finished or not. store: of the checkpoints below a
    folder. last_step: of the run, None where a checkpoint's step is none of the run's.
    Raises ValueError, and changes nothing, for everything else that holds anything, for a run of another configuration
    and for a checkpoint that is not whole.
    """
    chosen = None if resume in ("auto", "never") else checkpoint_at(Path(resume))
    if chosen is not None:
        folder = chosen.parent.parent
        if output_dir is not None and Path(output_dir).resolve() != folder.resolve():
            raise ValueError(
                f"--resume {resume} continues the run in {folder}, output_dir={output_dir!r} is another folder; leave "
                f"--output_dir out, or copy the whole run there first"
            )
    else:
        folder = fresh_folder(command) if output_dir is None else Path(output_dir)
    checkpoints = store(folder / CHECKPOINTS)
    if chosen is None and resume == "auto" and is_unfinished(folder):
        notes = check_same_config(command, read_config(folder), config, f"output_dir={str(folder)!r} holds a run")
        there = checkpoints.folders()
        if there:
            return go_on(command, checkpoints, there[-1], config, last_step, notes)
        forget_start(folder)
    elif chosen is None:
        refuse_finished(folder, checkpoints)
        create_run_folder(folder)
    else:
        return go_on(command, checkpoints, chosen, config, last_step, [])
    write_run_files(folder, config)
    return Start(folder, checkpoints)


def go_on(
    command: str, checkpoints: Checkpoints, chosen: Path, config: str, last_step: int | None, notes: list[str]
) -> Start:
    """Continue a run at one of its checkpoints. Reads only; `Start.log` changes the folder."""
    folder = checkpoints.root.parent
    manifest = checkpoints.verified(chosen)
    notes += check_same_config(command, read_config(chosen), config, f"{chosen} is of a run")
    if last_step is not None and manifest.step > last_step:
        raise ValueError(f"{chosen} is after step {manifest.step}, max_steps={last_step}; give more --max_steps")
    shared = read_part(chosen / f"{SHARED}.safetensors")
    own = None
    if manifest.world == checkpoints.world:
        own = read_part(chosen / f"{rank_part(checkpoints.rank)}.safetensors")
    else:
        notes.append(f"written by {manifest.world} processes, resumed by {checkpoints.world}: process-wide generators, "
                     f"which no packaged part reads, start anew")  # fmt: skip
    say(f"resumes {folder} after step {manifest.step}, from {chosen}")
    for note in dict.fromkeys([*notes, *version_notes(manifest.versions)]):
        say(f"  {note}")
    return Start(folder, checkpoints, chosen, shared, own, manifest.step, config)


# which checkpoint


def checkpoint_at(path: Path) -> Path:
    """The checkpoint that a path names: itself, ``latest`` beside it, or the newest one of a run's folder.

    Raises ValueError when there is none.
    """
    if path.name == LATEST and path.is_file():
        path = path.parent / path.read_text(encoding="utf-8").strip()
    for root in (path / CHECKPOINTS, path):
        there = Checkpoints(root).folders() if root.name == CHECKPOINTS else []
        if there:
            return there[-1]
    if not path.is_dir() or path.parent.name != CHECKPOINTS:
        raise CheckpointError(
            f"--resume {path} is neither a run with checkpoints nor RUN/{CHECKPOINTS}/step-…; auto, never or a path"
        )
    return path


def is_unfinished(folder: Path) -> bool:
    """Whether a folder holds a run that has not written its last file."""
    # of os.path: False, too, for a name that no file can have; `create_run_folder` says what is wrong with it
    return os.path.isfile(folder / CONFIG) and not os.path.isfile(folder / FINISHED)


def refuse_finished(folder: Path, checkpoints: Checkpoints) -> None:
    """Raises ValueError for a finished run, with what may be meant."""
    there = checkpoints.folders() if os.path.isfile(folder / FINISHED) else []
    if there:
        raise ValueError(
            f"output_dir={str(folder)!r} holds another run already, a finished one; give a new --output_dir, or to go "
            f"on from its end more --max_steps and --resume {there[-1]} (nothing was changed)"
        )


def forget_start(folder: Path) -> None:
    """Empty the record of a run that ended before its first checkpoint. Raises ValueError when it has done steps."""
    record = folder / RECORD
    text = record.read_text(encoding="utf-8") if record.is_file() else ""
    if any(json.loads(line)["step"] > 0 for line in text[: text.rfind("\n") + 1].splitlines()):
        raise ValueError(
            f"output_dir={str(folder)!r} holds another run already, an unfinished one without a checkpoint; give a new "
            f"--output_dir (nothing was changed)"
        )
    if record.is_file():
        cut_back(folder, {RECORD: 0})
        record.unlink()
    say(f"{folder} holds a run that ended before its first checkpoint; it starts again")


# the same run


def read_config(folder: Path) -> str:
    return (folder / CONFIG).read_text(encoding="utf-8")


def check_same_config(command: str, recorded: str, given: str, where: str) -> list[str]:
    """Notes about parameters that may differ but matter. Raises ValueError with the first lines that may not.

    where: "… holds a run" or the like, for the message.
    """

    def lines(text: str, names: tuple[str, ...], wanted: bool) -> set[str]:
        heads = tuple(f"{command}.{name} = " for name in names)
        found = (line.strip() for line in text.splitlines() if not line.startswith(FREE_PARTS))
        return {line for line in found if line and not line.startswith("#") and line.startswith(heads) == wanted}

    there, here = (lines(text, (*FREE, *NOTED), False) for text in (recorded, given))
    if there != here:
        sides = [(name, sorted(one - other)) for name, one, other in (("there", there, here), ("here", here, there))]
        first = "; ".join(f"{name} {lines[0]!r}" for name, lines in sides if lines)
        more = sum(len(lines) for _, lines in sides) - sum(bool(lines) for _, lines in sides)
        raise ValueError(
            f"{where} of another configuration: {first}{f', and {more} more lines' if more else ''}; give another "
            f"--output_dir (nothing was changed)"
        )
    was, now = ({line.split(" = ")[0]: line for line in lines(text, NOTED, True)} for text in (recorded, given))
    return [
        f"{line} in place of {was.get(name, 'nothing')}: from here on equal up to rounding"
        for name, line in sorted(now.items()) if line != was.get(name)
    ]  # fmt: skip


def version_notes(then: dict[str, str]) -> list[str]:
    """What is not as it was when the checkpoint was written."""
    now = versions()
    return [f"written by {name} {old}, resumed by {now[name]}: maybe equal up to rounding only"
            for name, old in then.items() if now.get(name, old) != old]  # fmt: skip


def set_results_aside(folder: Path) -> Path:
    """Move what a run wrote at its end into a folder of its own, with a copy of the metrics; returns it."""
    place, number = folder / "earlier-results", 2
    while place.exists():
        place, number = folder / f"earlier-results-{number}", number + 1
    place.mkdir()
    shutil.copy2(folder / "metrics.jsonl", place)
    for path in sorted(folder.iterdir()):
        if path.name not in KEPT and not path.name.startswith("earlier-results"):
            path.rename(place / path.name)
    return place


def resume_command(command: str, folder: Path, config: str) -> str:
    """What a person types to continue the run in a folder, however it was started."""
    if not config:
        return f"{command}(…, output_dir={str(folder)!r}, resume='auto')"
    installed = Path(sys.argv[0]).stem == "armillary"
    program = ["armillary"] if installed else ["python", "-m", "framework"]
    words = [command, "--gin_file", str(folder / CONFIG), "--output_dir", str(folder), "--resume", "auto"]
    return shlex.join([*program, *words])
