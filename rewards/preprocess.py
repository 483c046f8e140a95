"""From decoded frames to the patches that Qwen2-VL reads, by the pixel rules that the scorers were trained with.

    VideoAlign: uint8 frames → (MQ: truncated gray) → bicubic with antialias on tensors → patches
    HPSv3:      uint8 frame → Pillow's bicubic → patches of the frame and itself

The two resizes differ by up to 18 of 255 levels, and either from torchvision's second version by as much: none of them
may stand in for another. Bit-equal to the released rules where a test says so.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

PATCH, MERGE, PAIR = 14, 2, 2
"""Side of a patch in pixels; patches that become one token, per side; frames of a patch."""
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
LUMA = (0.2989, 0.587, 0.114)
MAX_RATIO = 200


@dataclass(frozen=True)
class PixelBudget:
    """How many pixels a frame is resized to: between ``least`` and ``most``, sides in multiples of 28."""

    least: int
    most: int

    def __post_init__(self) -> None:
        if not 0 < self.least <= self.most:
            raise ValueError(f"PixelBudget needs 0 < least ≤ most, got {self.least} and {self.most}")

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after the resize. The result of one bound may leave the other, and where both are equal the
        rule is not idempotent: 336 × 588 becomes 364 × 616. Raises ValueError for sides of a ratio above 200."""
        factor = PATCH * MERGE
        if max(height, width) / min(height, width) > MAX_RATIO:
            raise ValueError(f"frames of {height}×{width} are too narrow: the ratio of the sides is above {MAX_RATIO}")
        new = [max(factor, round(side / factor) * factor) for side in (height, width)]
        pixels = height * width
        if new[0] * new[1] > self.most:
            shrink = math.sqrt(pixels / self.most)
            new = [max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)]
        elif new[0] * new[1] < self.least:
            grow = math.sqrt(self.least / pixels)
            new = [math.ceil(side * grow / factor) * factor for side in (height, width)]
        return new[0], new[1]


VIDEOALIGN_PIXELS = PixelBudget(100_352, 200_704)
HPSV3_PIXELS = PixelBudget(200_704, 200_704)


def resize(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic with antialias of float frames [T, 3, H, W] in 0 … 255, clamped, not rounded; differentiable."""
    resized = torch.nn.functional.interpolate(frames, size=size, mode="bicubic", align_corners=False, antialias=True)
    return resized.clamp(0, 255)


def resize_rounded(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """`resize` of uint8 frames to uint8: torchvision's first rule, bit for bit."""
    return resize(frames.float(), size).round().to(torch.uint8)


def resize_pillow(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Pillow's bicubic of uint8 frames [T, 3, H, W], on the CPU."""
    height, width = size
    images = [Image.fromarray(frame) for frame in frames.permute(0, 2, 3, 1).contiguous().cpu().numpy()]
    resized = [np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)) for image in images]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).contiguous()


def gray(frames: Tensor) -> Tensor:
    """.2989 R + .587 G + .114 B of float frames [T, 3, H, W], in three equal channels; differentiable."""
    red, green, blue = frames.unbind(-3)
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue).unsqueeze(-3).expand_as(frames)


def gray_truncated(frames: Tensor) -> Tensor:
    """`gray` of uint8 frames to uint8, truncated: the copy by which motion is judged without its colours."""
    return gray(frames.float()).to(torch.uint8)


def normalise(frames: Tensor) -> Tensor:
    """(x/255 − mean)/std of frames [T, 3, H, W] in 0 … 255, float32."""
    mean, std = (torch.tensor(three, device=frames.device).view(3, 1, 1) for three in (MEAN, STD))
    return (frames.float() / 255 - mean) / std


def patchify(frames: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """Normalised frames [T, 3, H, W] → patches [t·h·w, 3·2·14·14] and their grid (t, h, w); an odd T repeats its last.

    Row order (t, h/2, w/2, row in merge, column in merge); inside a row (channel, time in pair, 14, 14). Raises
    ValueError for sides that are no multiples of 28.
    """
    count, channels, height, width = frames.shape
    if channels != 3 or height % (PATCH * MERGE) or width % (PATCH * MERGE):
        raise ValueError(f"patches need 3 channels and sides in multiples of 28, got {tuple(frames.shape)}")
    if count % PAIR:
        frames = torch.cat([frames, frames[-1:]])
    t, h, w = len(frames) // PAIR, height // PATCH, width // PATCH
    split = frames.reshape(t, PAIR, 3, h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH)
    return split.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, 3 * PAIR * PATCH * PATCH), (t, h, w)


def token_count(grid: tuple[int, int, int]) -> int:
    """How many vision tokens stand for a grid."""
    return math.prod(grid) // MERGE**2
