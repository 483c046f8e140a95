"""What the ranks of one run do apart: the first creates folders and writes, the others follow it."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from torch import Tensor

from framework.checkpoint import Checkpoints
from framework.commands.resumption import CHECKPOINTS, Start, go_on, open_run
from framework.distributed import World
from framework.reporting.mirrors import Mirror


def open_run_together(
    world: World, command: str, output_dir: str | None, resume: str, config: str,
    store: Callable[[Path], Checkpoints], last_step: int | None = None,
) -> Start:  # fmt: skip
    """`open_run` on the first rank; the others start where it does. All must see the folder's file system."""
    if world.first:
        start = open_run(command, output_dir, resume, config, store, last_step)
        source = None if start.source is None else str(start.source.resolve())
        world.broadcast_text(json.dumps([str(start.folder.resolve()), source]))
        return start
    folder, source = json.loads(world.broadcast_text(""))
    checkpoints = store(Path(folder) / CHECKPOINTS)
    return Start(Path(folder), checkpoints) if source is None else go_on(
        command, checkpoints, Path(source), config, last_step, []
    )  # fmt: skip


class NoLog:
    """The `MetricsLogger` of a rank that writes nothing."""

    def log(self, step: int, values: Mapping[str, float | Tensor], *, samples_seen: int) -> None:
        """Nothing."""

    def mirror_to(self, mirrors: Sequence[Mirror], config: str) -> None:
        """Nothing."""

    def text(self, tag: str, text: str, step: int = 0) -> None:
        """Nothing."""

    def videos(self, tag: str, step: int, frames: Tensor, fps: float) -> None:
        """Nothing."""

    def position(self) -> dict[str, int]:
        """No file."""
        return {}

    def __enter__(self) -> "NoLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to close."""
