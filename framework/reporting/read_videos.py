"""Video files as clips to judge: every frame, the true frame rate, and the pixels that the generator made.

Videos that armillary writes may be enlarged by a whole factor, so that small ones can be looked at, and padded to even
sides; they say so in their metadata, and here it is undone.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import av
import torch
from av.error import FFmpegError
from torch import Tensor

from framework.config.registry import one_line
from framework.reporting.videos import MARK

_FIELDS = {name: rf"(?P<{name}>\d{{1,6}})" for name in ("height", "width", "scale")}
_MARK = re.compile(re.sub(r"\\?\{(\w+)\\?\}", lambda field: _FIELDS[field[1]], MARK))


@dataclass(frozen=True)
class Clip:
    """What a file shows. frames: uint8 [T, 3, H, W]. fps: the average rate that the file states."""

    frames: Tensor
    fps: float


def read_clip(path: Path | str, scale: int | None = None) -> Clip:
    """The clip in a video file, reduced by ``scale``; None takes the factor that the file says it was enlarged by.

    Raises ValueError, in one line that names the file, for one that is missing, cannot be decoded, has no frame or no
    frame rate, is not a multiple of ``scale`` in size, or was resized after it was written.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such file")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path}: no video in it")
            stream = container.streams.video[0]
            decoded = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(stream)]
            rate, declared, mark = (
                stream.average_rate,
                stream.frames,
                _MARK.fullmatch(container.metadata.get("comment", "")),
            )
    except (FFmpegError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as a video: {error.strerror or one_line(error)}") from error
    if not decoded or not rate:
        raise ValueError(f"{path}: {'no frame' if not decoded else 'no frame rate'} in it")
    if len(decoded) < declared:  # FFmpeg shows what there is of a file that was cut off
        raise ValueError(f"{path}: only {len(decoded)} of {declared} frames are in it; copy or write it again")
    if any(frame.shape != decoded[0].shape for frame in decoded):
        raise ValueError(f"{path}: the frames change their size")
    frames = torch.stack(decoded).permute(0, 3, 1, 2)
    height, width = frames.shape[-2:]
    if scale is None and mark is not None:
        scale = int(mark["scale"])
        made = int(mark["height"]) * scale, int(mark["width"]) * scale
        if (height, width) != tuple(side + side % 2 for side in made):  # the writer pads odd sides
            raise ValueError(
                f"{path}: has {width}×{height} pixels and says of itself {mark[0]!r}: it was resized since; say with "
                f"--scale how many times it is enlarged now"
            )
        height, width = made
    return Clip(reduce_frames(frames[..., :height, :width], scale or 1, path), float(rate))


def reduce_frames(frames: Tensor, scale: int, path: Path | str) -> Tensor:
    """uint8 [T, 3, H, W] → [T, 3, H/scale, W/scale]: the rounded mean of each block, which undoes `enlarge`."""
    height, width = frames.shape[-2:]
    if scale < 1 or height % scale or width % scale:
        raise ValueError(f"{path}: {width}×{height} pixels cannot be reduced {scale} times; give another --scale")
    if scale == 1:
        return frames.contiguous()
    means = [torch.nn.functional.avg_pool2d(frame.float(), scale).round().to(torch.uint8) for frame in frames]
    return torch.stack(means)
