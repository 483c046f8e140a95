"""Rotary position embedding at explicit temporal positions (the layout of Wan: time, height, width).

Angles are built in float64 and cast once; they live outside the module, so ``model.to(bfloat16)`` cannot round them (a
bf16 table is off by 2e-3 at frame 1000). A rotation is one complex product: on a CPU it takes an eighth of the time of
the four real ones, and gives the same bits.
"""

from functools import lru_cache

import torch
from torch import Tensor


def rope_table(
    positions: tuple[int, ...] | tuple[tuple[int, ...], ...],
    height: int,
    width: int,
    head_dim: int,
    theta: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """e^{i φ} [frames, height·width, 1, head_dim/2] of frames at ``positions``; h and w restart per frame.

    positions: one list for all rows of a batch, or one per row: then [rows, frames, …].

    dtype: of the real and the imaginary part, float32 or float64. Not cached: under absolute positions every block of a
    stream has tables of its own, so a cache would grow with the stream.
    """
    spatial = 2 * (head_dim // 6)
    place = _spatial_table(height, width, spatial, theta, dtype, device)
    angle = torch.tensor(positions, dtype=torch.float64)[..., None] * _frequencies(head_dim - 2 * spatial, theta)
    time = torch.complex(angle.cos(), angle.sin()).to(device, dtype.to_complex(), non_blocking=True)
    time = time.unsqueeze(-2).expand(*time.shape[:-1], height * width, -1)
    return torch.cat([time, place.expand(*time.shape[:-1], -1)], dim=-1).unsqueeze(-2)


@lru_cache(maxsize=64)
def _frequencies(dim: int, theta: float) -> Tensor:
    """theta^(−j / (dim/2)), float64 [dim/2]."""
    return theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)


@lru_cache(maxsize=16)
def _spatial_table(height: int, width: int, dim: int, theta: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The part of a table that is the same for all frames: [height·width, dim], half height, half width."""
    frequencies = _frequencies(dim, theta)
    h = (torch.arange(height)[:, None] * frequencies)[:, None].expand(-1, width, -1)
    w = (torch.arange(width)[:, None] * frequencies)[None].expand(height, -1, -1)
    angle = torch.cat([h, w], dim=-1).flatten(0, 1)
    return torch.complex(angle.cos(), angle.sin()).to(device, dtype.to_complex())


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate interleaved pairs of the last dimension: x [..., frames, S, heads, head_dim], table as `rope_table`.

    The arithmetic runs in the precision of the table: rounding it to bf16 would undo its precision.
    """
    wide = torch.promote_types(x.dtype, table.dtype.to_real())
    pairs = torch.view_as_complex(x.to(wide).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)
