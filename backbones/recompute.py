"""Krea realtime's history: the past is kept as clean latents, and its keys and values are made anew for every block.

    shown to a block at frame s:  the first frame and the last k − 1 (all of them while s ≤ k), in slots 0, 1, 2, …
    their keys and values:        one pass at t = 0 over just those frames, block-causal in the slots, under the prompt
                                  in force; the block itself stands behind them, at min(s, k)

Nothing is left of frames that are no longer shown, not even inside the keys of later ones, memory is that of k frames,
and a new prompt needs no recache. The price is one pass over k frames for every block. Optionally the block looks at
the past less: log(bias) is added to the logits of all shown frames but the first.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from backbones.history import HistoryPolicy
from backbones.visible import Chunk, LayerKV, Run, VisibleKV
from framework.arguments import check_counts


@dataclass(frozen=True)
class RecomputedWindow(HistoryPolicy):
    """The first frame and the last ``frames`` − 1, encoded anew before every block, at positions 0, 1, 2, ….

    frames: k, clean frames that a block is shown; 3 as released. bias: b in (0, 1], by which the weight of every shown
    frame but the first is multiplied before the attention is normalised, 1 for none. It needs an attention kernel that
    takes a mask, and Krea realtime's release offers about 0.3.
    """

    frames: int = 3
    bias: float = 1.0

    def __post_init__(self) -> None:
        check_counts("RecomputedWindow.", frames=self.frames)
        if not 0 < self.bias <= 1:
            raise ValueError(f"RecomputedWindow.bias must lie in (0, 1], got {self.bias}; 1 leaves the attention alone")

    @property
    def recomputes(self) -> bool:
        return True

    def visible(self, start: int, length: int) -> tuple[int, ...]:
        if start <= self.frames:
            return tuple(range(start))
        return (0, *range(start - (self.frames - 1), start))

    def positions(self, visible: Sequence[int], start: int, length: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        seen = len(visible)
        return tuple(range(seen)), tuple(range(seen, seen + length))

    def retains(self, frame: int, start: int) -> bool:
        return frame == 0 or frame > start - self.frames

    def logit_offsets(self, visible: int) -> tuple[float, ...] | None:
        if self.bias == 1.0 or visible < 2:
            return None
        return (0.0, *[math.log(self.bias)] * (visible - 1))


def as_stored(x0: Tensor) -> tuple[LayerKV, ...]:
    """Clean latents [N, C, F, H, W] as a `KVHistory` holds frames: one layer, [N, F, C, H, W] for keys and values."""
    frames = x0.transpose(1, 2)
    return ((frames, frames),)


def latents_of(seen: VisibleKV) -> tuple[Tensor, int]:
    """(clean latents [R, C, F, H, W] of what is seen of a history of `as_stored`, rows of the batch for each of the R):
    what the branches of a fork still share is encoded once."""
    shared, branches = seen.before_fork()
    return shared.read(0)[0].transpose(1, 2), branches


def made_anew(seen: VisibleKV, kv: Sequence[LayerKV], branches: int) -> VisibleKV:
    """The same frames with the keys and values ``kv`` that a pass over `latents_of` gave."""
    return VisibleKV((Chunk(0, tuple(kv)),), (branches,), seen.frames, (Run(0, 0, len(seen)),))
