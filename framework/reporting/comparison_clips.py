"""The clips that a comparison shows: small enough for a page, with a still image each for paper."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from framework.reporting.videos import enlarge, visible_scale, write_mp4
from framework.types import VideoBatch

CLIPS = "clips"
TALLEST = 192
"""Pixels; larger frames are reduced to it."""
WANTED = 128
"""Pixels that small frames are enlarged to, from below."""


def spread(total: int, count: int) -> tuple[int, ...]:
    """At most ``count`` of the numbers 0 … total − 1, evenly apart, the first among them."""
    count = min(total, count)
    return tuple(i * total // count for i in range(count))


def page_frames(frames: Tensor) -> Tensor:
    """Frames uint8 [T, 3, H, W] as a page shows them: averaged down to `TALLEST`, or left as they are."""
    height, width = frames.shape[-2:]
    if height <= TALLEST:
        return frames
    size = (TALLEST, round(width * TALLEST / height))
    return functional.interpolate(frames.float(), size, mode="area").round().to(torch.uint8)


def write_clips(folder: Path, videos: VideoBatch, shown: Sequence[int]) -> None:
    """Write an mp4 and its first frame as a PNG for some clips of a batch."""
    for number, row in enumerate(shown):
        frames = page_frames(videos.frames[row])
        scale = visible_scale(frames.shape[-2], WANTED)
        path = folder / CLIPS / f"{number:02d}.mp4"
        write_mp4(path, frames, videos.fps, scale=scale)
        still = enlarge(frames[0].cpu(), scale).permute(1, 2, 0).contiguous().numpy()
        Image.fromarray(still).save(path.with_suffix(".png"))


def read_clips(folder: Path) -> tuple[Path, ...]:
    """The mp4 files that `write_clips` left in a folder, in order."""
    return tuple(sorted((folder / CLIPS).glob("*.mp4")))
