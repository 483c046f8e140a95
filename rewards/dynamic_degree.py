"""Dynamic degree: how much moves, by the largest optical flow between frames about an eighth of a second apart.

    every k-th frame, k = max(1, round(fps/8));  r_i = mean of the largest 5 % of |flow| of pair i, in pixels

    mean (RAVEN)     R = mean_i r_i                                            unbounded, grows with the frame size
    flag (VBench)    R = 1 where #{i : r_i > 6 min(H, W)/256} ≥ round(4 n/16), else 0          n: frames looked at

VBench is 2311.17982. ``round`` rounds half to even. Known hacks: speed without end, camera shake, flicker and noise,
all of which a flow network reports as motion; keep its weight small and pair it with a reward for smoothness.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rewards.encoders import check_choice
from rewards.optical_flow import FlowEstimator
from rewards.windows import WindowReward

TOP_SHARE = 0.05
EIGHTHS = 8
"""Frames a second that motion is looked at."""


def frame_step(fps: float) -> int:
    """k: every k-th frame is looked at. 24 a second give 3, 16 give 2, 12 give 2, 10 and less give 1."""
    return max(1, round(fps / EIGHTHS))


def top_motion(flow: Tensor, share: float = TOP_SHARE) -> Tensor:
    """Mean of the largest ``share`` of the flow magnitudes, flow [n, 2, H, W] → [n]; at least one pixel."""
    lengths = flow.norm(dim=1).flatten(1)
    return lengths.topk(max(1, int(share * lengths.shape[1])), dim=1).values.mean(1)


def enough_motion(motion: Tensor, height: int, width: int) -> Tensor:
    """VBench's flag, float [n], of the motion [n, P] of P pairs of P + 1 frames looked at.

    NaN where a pair's motion is no number: compared with a threshold it would count as none.
    """
    threshold = 6 * min(height, width) / 256
    wanted = round(4 * (motion.shape[1] + 1) / 16)
    flags = ((motion > threshold).sum(1) >= wanted).float()
    return flags.where(torch.isfinite(motion).all(1), torch.nan)


@dataclass(frozen=True)
class DynamicDegree(WindowReward):
    """Mean motion in pixels ("mean") or VBench's flag ("flag"). A window of one frame looked at cannot be scored."""

    estimator: FlowEstimator
    rule: Literal["mean", "flag"] = "mean"
    name: str = "dynamic_degree"

    def __post_init__(self) -> None:
        check_choice("DynamicDegree.rule", self.rule, ("mean", "flag"))

    def _score_spans(self, clips: Tensor, prompts: Sequence[str], fps: float) -> Tensor:
        shown = clips[:, :: frame_step(fps)]
        if shown.shape[1] < 2:
            return torch.full((1, len(clips)), torch.nan)
        motion = torch.stack([top_motion(self.estimator.flow(clip[:-1], clip[1:])) for clip in shown])  # [n, P]
        if self.rule == "flag":
            return enough_motion(motion, clips.shape[-2], clips.shape[-1])[None]
        return motion.mean(1)[None]
