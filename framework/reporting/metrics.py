"""Scalars, texts and videos of a run, written where they can be read without this program: metrics.jsonl, TensorBoard.

Tags are stable: train/…, reward/<name>/{mean,std}, eval/reward/<name>, time/…, samples/video,
config/operative.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from io import TextIOWrapper
from numbers import Real
from pathlib import Path
from types import TracebackType

import torch
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from torch import Tensor
from torch.utils.tensorboard.writer import SummaryWriter

from framework.reporting.mirrors import Mirror
from framework.reporting.videos import check_frames, encode_gif, tile, visible_scale

RECORD, BOARD = "metrics.jsonl", "tb"
"""Names in the folder of a run."""
RESERVED = ("step", "samples_seen")
"""Keys that every line has; no metric may take their name."""


def to_floats(values: Mapping[str, float | Tensor]) -> dict[str, float]:
    """Python floats of numbers and 0-d tensors; all tensors of a device come to the host in one transfer.

    Raises ValueError that names the tag of anything else.
    """
    floats: dict[str, float] = {}
    waiting: dict[torch.device, dict[str, Tensor]] = {}
    for tag, value in values.items():
        if isinstance(value, Tensor):
            if value.ndim:
                raise ValueError(f"the metric {tag!r} must be one number, got shape {list(value.shape)}; reduce it")
            waiting.setdefault(value.device, {})[tag] = value.detach()
        elif isinstance(value, Real):
            floats[tag] = float(value)
        else:
            raise ValueError(f"the metric {tag!r} must be a number or a 0-d tensor, got {type(value).__name__}")
    for tensors in waiting.values():
        host = torch.stack([tensor.double() for tensor in tensors.values()]).tolist()
        floats.update(zip(tensors, host, strict=True))
    return {tag: floats[tag] for tag in values}


def encode_line(record: Mapping[str, float | int]) -> str:
    """One line of strict JSON, keys sorted; what JSON has no number for is a string: "nan", "inf", "-inf"."""
    return json.dumps(
        {key: value if math.isfinite(value) else str(float(value)) for key, value in record.items()},
        sort_keys=True,
        allow_nan=False,
    )


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl, "nan" and "inf" as floats again.

    Raises FileNotFoundError, or ValueError that names the line that is no object of numbers.
    """
    return [_decode_line(path, number, line) for number, line in enumerate(path.read_text().splitlines(), start=1)]


def _decode_line(path: Path, number: int, line: str) -> dict[str, float]:
    try:
        record = {key: float(value) for key, value in json.loads(line).items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} line {number} is not a line of metrics: {line[:80]!r}") from error
    for key in RESERVED:
        if key not in record:
            raise ValueError(f"{path} line {number} has no {key!r}: {line[:80]!r}")
    return record


def check_record(folder: Path, position: Mapping[str, int]) -> None:
    """Raises ValueError when metrics.jsonl is not the one that a `MetricsLogger.position` was taken of."""
    lines, size = folder / RECORD, position[RECORD]
    kept = b""
    if lines.is_file():
        with lines.open("rb") as file:
            kept = file.read(size)
    if len(kept) < size or (size and not kept.endswith(b"\n")):
        raise ValueError(
            f"{lines} is not what this run wrote: its first {size} bytes were whole lines at the checkpoint, now there "
            f"are {len(kept)}, ending in {kept[-20:]!r}; bring it back, or start again in another --output_dir"
        )


def cut_back(folder: Path, position: Mapping[str, int]) -> None:
    """Shorten the record of a run to what it held at a `MetricsLogger.position`; what came later is computed again.

    Event files that were not there then are removed. Event files that are gone are left to whoever removed them; the
    numbers are all in metrics.jsonl. Raises what `check_record` raises, and changes nothing then.
    """
    check_record(folder, position)
    os.truncate(folder / RECORD, position[RECORD])
    for path in sorted((folder / BOARD).glob("*")):
        then = position.get(f"{BOARD}/{path.name}")
        if then is None:
            path.unlink()
        elif path.stat().st_size > then:
            os.truncate(path, then)


class MetricsLogger:
    """Writes ``folder/metrics.jsonl`` (one line per call of `log`) and TensorBoard events under ``folder/tb``.

    One process of a run logs. position: None starts a run and raises FileExistsError when metrics.jsonl is there;
    what `position` once returned continues the run of this folder from there, see `cut_back`. Nothing that depends on
    time or on the machine is added, so equal runs have equal files.
    """

    def __init__(self, folder: Path | str, *, position: Mapping[str, int] | None = None) -> None:
        self.folder = Path(folder)
        self.path = self.folder / RECORD
        self.folder.mkdir(parents=True, exist_ok=True)
        if position is not None:
            cut_back(self.folder, position)
        elif self.path.exists():
            raise FileExistsError(f"{self.path} is the record of another run; choose another output_dir, or resume")
        self._lines: TextIOWrapper = self.path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(self.folder / BOARD))
        self._mirrors: list[Mirror] = []

    def position(self) -> dict[str, int]:
        """The sizes of the files of this record by name, with everything that was logged on the disk."""
        self._lines.flush()
        os.fsync(self._lines.fileno())
        self._board.flush()
        files = [self.path, *sorted((self.folder / BOARD).glob("*"))]
        return {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in files}

    def log(self, step: int, values: Mapping[str, float | Tensor], *, samples_seen: int) -> dict[str, float]:
        """Write one line and the scalars of one optimiser step; returns the values as floats, for a console line.

        step: optimiser updates done. samples_seen: clips generated for training so far.
        Raises ValueError for a reserved or empty tag and for values that are not one number.
        """
        for tag in values:
            if not tag or tag in RESERVED:
                raise ValueError(f"a metric may not be called {tag!r}; the logger writes {', '.join(RESERVED)} itself")
        floats = to_floats(values)
        self._lines.write(encode_line({**floats, "step": step, "samples_seen": samples_seen}) + "\n")
        self._lines.flush()  # a killed run keeps every line that was logged
        for tag, value in floats.items():
            self._board.add_scalar(tag, value, step)
        self._board.add_scalar("train/samples_seen", samples_seen, step)
        for mirror in self._mirrors:
            mirror.log(step, {**floats, "samples_seen": float(samples_seen)})
        return floats

    def mirror_to(self, mirrors: Sequence[Mirror], config: str) -> None:
        """Show every further line in these places too, until this logger is closed."""
        for mirror in mirrors:
            mirror.open(self.folder, config)
            self._mirrors.append(mirror)

    def text(self, tag: str, text: str, step: int = 0) -> None:
        """Show a text in TensorBoard as it is, in fixed width (TensorBoard would read Markdown into a config)."""
        self._board.add_text(tag, "\n".join("    " + line for line in text.splitlines()), step)
        self._board.flush()

    def videos(self, tag: str, step: int, frames: Tensor, fps: float) -> None:
        """Show clips uint8 [N, T, 3, H, W] in TensorBoard as one playing grid, small frames enlarged.

        Written as an animated GIF into an image summary: torch's ``add_video`` writes nothing without moviepy.
        """
        check_frames(frames, "[N, T, 3, H, W]")
        page = tile(frames.cpu())
        scale = visible_scale(frames.shape[-2])
        image = Summary.Image(
            height=page.shape[-2] * scale,
            width=page.shape[-1] * scale,
            colorspace=3,
            encoded_image_string=encode_gif(page, fps, scale),
        )
        writer = self._board.file_writer
        assert writer is not None, "the event file is open from construction to close"
        writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)
        writer.flush()

    def close(self) -> None:
        """Finish both files. A closed logger logs no more."""
        self._lines.close()
        self._board.close()
        for mirror in self._mirrors:
            mirror.close()

    def __enter__(self) -> "MetricsLogger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
