"""Warp smoothness: does the frame between two others look as it would if everything moved evenly from one to the other?

    F = flow(x_t → x_{t+2}), B = flow(x_{t+2} → x_t)
    m̂ = ½ warp(x_t, (B − F)/4) + ½ warp(x_{t+2}, (F − B)/4)          the middle frame, half of the motion from each side
    seen = pixels whose F and B undo each other: |F + B∘F|² ≤ .01 (|F|² + |B∘F|²) + .5, and the same for B
    s_t = max(0, 1 − mean_seen |m̂ − x_{t+1}| / (255 · tolerance)) · min(1, |seen| / ½)
    R   = mean_t s_t · smoothstep((v − still)/(moving − still))

v is the mean over t of the largest 5 % of |F|/2 on pixels that are seen, in shorter sides of the frame per second.

Ours, in place of the interpolation network of VBench's motion smoothness, whose licence forbids commercial use; no
published evidence supports the constants. The gate denies a still image the score that smoothness alone would give it,
and the share of pixels that are seen does so to frames that no motion explains. The consistency test is that of
Sundaram et al. (ECCV 2010). A clip without motion is measured and has the score 0; one of fewer than three frames has
none.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from rewards.dynamic_degree import top_motion
from rewards.frame_sampling import FrameSampling, StratifiedFrames
from rewards.optical_flow import FlowEstimator
from rewards.shapes import smoothstep
from rewards.windows import WindowReward

ENOUGH_SEEN = 0.5


def places(flow: Tensor) -> Tensor:
    """Where each pixel looks, (x, y) [n, 2, H, W] in pixels."""
    height, width = flow.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height, dtype=flow.dtype), torch.arange(width, dtype=flow.dtype), indexing="ij")
    return flow + torch.stack([x, y])


def warp(values: Tensor, flow: Tensor) -> Tensor:
    """values [n, C, H, W] read at each pixel plus its flow [n, 2, H, W], bilinear; border pixels go on outside."""
    height, width = values.shape[-2:]
    scale = torch.tensor([max(1, width - 1), max(1, height - 1)], dtype=flow.dtype)
    grid = (2 * places(flow).permute(0, 2, 3, 1) / scale) - 1
    return grid_sample(values, grid, mode="bilinear", padding_mode="border", align_corners=True)


def inside(flow: Tensor) -> Tensor:
    """Which pixels stay in the frame, bool [n, H, W]."""
    x, y = places(flow).unbind(1)
    height, width = flow.shape[-2:]
    return (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)


def consistent(forward: Tensor, backward: Tensor) -> Tensor:
    """Which pixels come back to where they started, and did not leave the frame: bool [n, H, W]."""
    back = warp(backward, forward)
    gap = (forward + back).square().sum(1)
    size = forward.square().sum(1) + back.square().sum(1)
    return (gap <= 0.01 * size + 0.5) & inside(forward)


def triple_smoothness(
    first: Tensor, middle: Tensor, last: Tensor, forward: Tensor, backward: Tensor, tolerance: float = 0.25
) -> Tensor:
    """s_t [n] of frames [n, 3, H, W] in 0 … 255 and the flows [n, 2, H, W] between the outer two."""
    half = (backward - forward) / 4
    explained = (warp(first, half) + warp(last, -half)) / 2
    seen = visible(forward, backward)
    error = (explained - middle).abs().mean(1) / 255
    counts = seen.flatten(1).sum(1)
    mean = (error * seen).flatten(1).sum(1) / counts.clamp(min=1)
    share = counts / seen[0].numel()
    return (1 - mean / tolerance).clamp(min=0) * (share / ENOUGH_SEEN).clamp(max=1)


def visible(forward: Tensor, backward: Tensor) -> Tensor:
    """Pixels that are consistent from both sides, bool [n, H, W]."""
    return consistent(forward, backward) & consistent(backward, forward)


@dataclass(frozen=True)
class WarpSmoothness(WindowReward):
    """How evenly a clip moves, in [0, 1]; 0 where nothing moves.

    frames: at which t three frames are compared. still, moving: speeds, in shorter sides of the frame per second, up to
    which nothing and from which everything is paid for. tolerance: mean error, as a share of the range of pixels, at
    which nothing is left of the score; 1 is the form of the motion smoothness that this replaces.
    """

    estimator: FlowEstimator
    frames: FrameSampling = field(default_factory=StratifiedFrames)
    still: float = 0.02
    moving: float = 0.1
    tolerance: float = 0.25
    name: str = "warp_smoothness"

    def __post_init__(self) -> None:
        if not 0 <= self.still < self.moving:
            raise ValueError(f"WarpSmoothness needs 0 ≤ still < moving, got {self.still} and {self.moving}")
        if not 0 < self.tolerance <= 1:
            raise ValueError(f"WarpSmoothness.tolerance must lie in (0, 1], got {self.tolerance}")

    def _score_spans(self, clips: Tensor, prompts: Sequence[str], fps: float) -> Tensor:
        if clips.shape[1] < 3:
            return torch.full((1, len(clips)), torch.nan)
        return torch.stack([self._score_clip(*pair, fps) for pair in zip(clips, prompts, strict=True)])[None]

    def _score_clip(self, clip: Tensor, prompt: str, fps: float) -> Tensor:
        starts = torch.tensor(self.frames.indices(len(clip) - 2, fps, prompt))
        outer = clip[starts], clip[starts + 2]
        forward, backward = self.estimator.flow(*outer), self.estimator.flow(*outer[::-1])
        first, middle, last = (clip[starts + i].cpu().float() for i in range(3))
        smooth = triple_smoothness(first, middle, last, forward, backward, self.tolerance).mean()
        steps = top_motion(forward / 2 * visible(forward, backward)[:, None])
        speed = steps.mean() * fps / min(clip.shape[-2:])
        return smooth * smoothstep((speed - self.still) / (self.moving - self.still))
