"""Ground-truth rewards of the shapes world: visual quality VQ, motion quality MQ, text alignment TA, each in [0, 1].

Analysis by synthesis. Per frame the object is located (the phase of the energy's first Fourier mode on the torus; on a
pixel grid it is within about 0.1 px of the centre of a square, closer for the other shapes, which costs a clean square
some MQ) and compared with clean renderings of all 18 objects there; d_t(k) is the mean squared pixel error, pixels in
[−1, 1].

    q_t = exp(−min_k d_t(k) / .03)                      how well some clean object explains the frame
    VQ  = mean_t q_t
    v_t = wrapped displacement of the centre, u_t = v_{t+1} − v_t
    MQ  = mean_t exp(−|u_t|) exp(−min_k d_t / .1)  ·  min(1, VQ/.5)  ·  smoothstep((|mean_t v_t| − .05) / .25)
    TA  = ½ mean_t softmax_k(−d_t / .006)[caption]  +  ½ mean_t exp(−|v_t − v_caption|² / (2 · .35²))

The two gates of MQ are what a blank and a static video fail: without visible quality or without motion there is no
motion reward, however smooth the video is.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from framework.data.shapes import (
    BACKGROUND,
    PALETTE,
    SHAPES,
    SIZE,
    Caption,
    colour_table,
    coverage,
    parse_caption,
    wrap,
)
from framework.interfaces import RewardModel
from framework.pooling import FramePooling, MeanFrames, pool_windows
from framework.types import Scores, VideoBatch


@dataclass(frozen=True)
class Analysis:
    """What synthesis explains of clips [N, T]."""

    error: Tensor  # [N, T, 18] mean squared error against each clean object, index = shape · 6 + colour
    velocity: Tensor  # [N, T−1, 2] pixels per frame


def locate(energy: Tensor) -> Tensor:
    """Centre (x, y) of an energy map [..., SIZE, SIZE] on the torus: the phase of its first Fourier mode → [..., 2]."""
    angle = torch.arange(SIZE) * (2 * math.pi / SIZE)
    basis = torch.stack([angle.cos(), angle.sin()])  # [2, SIZE]
    x = energy.sum(-2) @ basis.T
    y = energy.sum(-1) @ basis.T
    phase = torch.stack([torch.atan2(x[..., 1], x[..., 0]), torch.atan2(y[..., 1], y[..., 0])], dim=-1)
    return phase * (SIZE / (2 * math.pi))


def _shape_offsets() -> Tensor:
    """Where `locate` finds each shape that is drawn at its nominal centre, averaged over sub-pixel places: [3, 2]."""
    grid = torch.arange(8) / 8 + SIZE / 2
    centre = torch.cartesian_prod(grid, grid)
    found = locate(coverage(centre).square())
    return wrap(found - centre[:, None]).mean(0)


SHAPE_OFFSETS = _shape_offsets()


def analyse(pixels: Tensor) -> Analysis:
    """Clips [N, T, 3, SIZE, SIZE] in [−1, 1] → errors against every clean object and the object's velocity."""
    y = pixels - (2 * BACKGROUND - 1)
    centre = locate(y.square().sum(2))  # [N, T, 2]
    cover = torch.stack([coverage(centre - SHAPE_OFFSETS[s])[..., s, :, :] for s in range(len(SHAPES))], dim=2)
    contrast = 2 * (colour_table() - BACKGROUND)  # [6, 3]
    # |y − α c|² = |y|² − 2 c·⟨y, α⟩ + |c|² |α|², so three renderings serve all eighteen objects
    inner = torch.einsum("ntchw,ntshw->ntsc", y, cover)
    error = (
        y.square().sum((2, 3, 4))[..., None, None]
        - 2 * inner @ contrast.T
        + cover.square().sum((-1, -2))[..., None] * contrast.square().sum(1)
    )
    return Analysis(error.flatten(2).clamp(min=0) / (3 * SIZE**2), wrap(centre[:, 1:] - centre[:, :-1]))


def smoothstep(x: Tensor) -> Tensor:
    """0 below 0, 1 above 1, smooth between."""
    x = x.clamp(0, 1)
    return x * x * (3 - 2 * x)


def frame_quality(seen: Analysis) -> Tensor:
    """q_t [N, T]."""
    return (-seen.error.amin(-1) / 0.03).exp()


def visual_quality(seen: Analysis) -> Tensor:
    """VQ [N]."""
    return frame_quality(seen).mean(1)


def motion_quality(seen: Analysis) -> Tensor:
    """MQ [N]; NaN for one or two frames, which show no acceleration."""
    if seen.velocity.shape[1] < 2:
        return torch.full((len(seen.error),), torch.nan)
    acceleration = (seen.velocity[:, 1:] - seen.velocity[:, :-1]).norm(dim=-1)
    smooth = (-acceleration).exp() * (-seen.error.amin(-1)[:, 1:-1] / 0.1).exp()
    moving = smoothstep((seen.velocity.mean(1).norm(dim=-1) - 0.05) / 0.25)
    return smooth.mean(1) * (visual_quality(seen) / 0.5).clamp(max=1) * moving


def text_alignment(seen: Analysis, captions: list[Caption]) -> Tensor:
    """TA [N]."""
    target = torch.tensor([SHAPES.index(c.shape) * len(PALETTE) + list(PALETTE).index(c.colour) for c in captions])
    appearance = (-seen.error / 0.006).softmax(-1)[torch.arange(len(captions)), :, target].mean(1)
    wanted = torch.tensor([c.velocity for c in captions])
    off = (seen.velocity - wanted[:, None]).square().sum(-1)
    return 0.5 * appearance + 0.5 * (-off / (2 * 0.35**2)).exp().mean(1)


@dataclass(frozen=True)
class ShapesReward(RewardModel):
    """VQ, MQ and TA of the shapes world. A clip of several windows is scored window by window, then averaged.

    frames: how the quality of the frames becomes VQ; the gate of MQ is always their mean.
    """

    frames: FramePooling = field(default_factory=MeanFrames)

    @property
    def signals(self) -> tuple[str, ...]:
        return ("VQ", "MQ", "TA")

    @torch.no_grad()
    def score(self, videos: VideoBatch) -> Scores:
        """Raises ValueError for videos of another size than the world's or captions outside its grammar."""
        if videos.frames.shape[-2:] != (SIZE, SIZE):
            raise ValueError(
                f"ShapesReward judges {SIZE}×{SIZE} videos of the embedded world, got "
                f"{videos.frames.shape[-2]}×{videos.frames.shape[-1]}; choose another REWARD for this generator"
            )
        pixels = videos.frames.cpu().float() / 127.5 - 1
        columns: list[Tensor] = []
        for w in range(max(len(windows) for windows in videos.windows)):
            spans = [windows[min(w, len(windows) - 1)] for windows in videos.windows]
            columns.append(self._score_spans(pixels, spans, videos.fps))
        table = torch.stack(columns, dim=-1)  # [3, N, W]
        counts = torch.tensor([len(windows) for windows in videos.windows])
        live = torch.arange(table.shape[-1]) < counts[:, None]
        values = {name: pool_windows(column, live.float()) for name, column in zip(self.signals, table, strict=True)}
        windows = {name: torch.where(live, column, torch.nan) for name, column in zip(self.signals, table, strict=True)}
        return Scores(values, {name: torch.isfinite(value) for name, value in values.items()}, windows)

    def _score_spans(self, pixels: Tensor, spans: list, fps: float) -> Tensor:
        """[3, N] scores of one span per clip; clips with the same span are scored together."""
        out = torch.empty(3, len(spans))
        for start, stop in {(span.start, span.stop) for span in spans}:
            rows = [i for i, span in enumerate(spans) if (span.start, span.stop) == (start, stop)]
            seen = analyse(pixels[rows, start:stop])
            captions = [parse_caption(spans[i].prompt) for i in rows]
            quality = self.frames(frame_quality(seen), fps)
            out[:, rows] = torch.stack([quality, motion_quality(seen), text_alignment(seen, captions)])
        return out
