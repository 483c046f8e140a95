"""From a score per frame or per window to a score per clip.

A mean of the best frames lets a policy ruin the rest of a clip for free, and a streaming one drifts at the end; a mean
that looks at the worst frames too does not.

    tail-aware = (1 − s) mean + s mean of the lowest max(1, ⌊q n⌋) of n frames        s = ½, q = .3
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


def share_count(frames: int, fraction: float) -> int:
    """max(1, ⌊fraction · n⌋): how many of n frames a share is, as the released rewards count; 24 of 81 for .3."""
    return max(1, int(fraction * frames))


def highest_mean(values: Tensor, fraction: float) -> Tensor:
    """Mean of the highest share of the frames, values [N, T] → [N]."""
    return values.topk(share_count(values.shape[1], fraction), dim=1).values.mean(1)


def lowest_mean(values: Tensor, fraction: float) -> Tensor:
    """Mean of the lowest share of the frames, values [N, T] → [N]."""
    return values.topk(share_count(values.shape[1], fraction), dim=1, largest=False).values.mean(1)


def drift(values: Tensor, frames: int) -> Tensor:
    """max(0, mean of the first ``frames`` − mean of the last): how much a clip lost, values [N, T] → [N]."""
    if frames < 1:
        raise ValueError(f"drift needs at least 1 frame at either end, got {frames}")
    return (values[:, :frames].mean(1) - values[:, -frames:].mean(1)).clamp(min=0)


def pool_windows(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean over the windows or prompt segments of each clip, values and weights [N, W] → [N].

    A weight of 0 is a window that a clip does not have, whatever its value; NaN where a clip has none, or where a
    window that counts could not be scored.
    """
    if bool((weights < 0).any()):
        raise ValueError("window weights must be 0 or more")
    counted = torch.where(weights > 0, values * weights, 0)
    return counted.sum(1) / weights.sum(1)


def span_weights(starts: Tensor, stops: Tensor) -> Tensor:
    """Weights [N, W] of windows [start, stop) by how many frames they have; an empty one is no window."""
    return (stops - starts).clamp(min=0).float()


class FramePooling(ABC):
    """One number of a clip's frames; a reward that scores frames takes one as a parameter."""

    @abstractmethod
    def __call__(self, values: Tensor, fps: float) -> Tensor:
        """values [N, T] of frames ``fps`` a second → [N]."""


@dataclass(frozen=True)
class MeanFrames(FramePooling):
    """The mean of all frames."""

    def __call__(self, values: Tensor, fps: float) -> Tensor:
        return values.mean(1)


@dataclass(frozen=True)
class TopFrames(FramePooling):
    """The mean of the best frames, as Astrolabe pools HPSv3; NaN where any frame has no score, also one of −∞, which no
    best frame would show. fraction: share of the frames."""

    fraction: float = 0.3

    def __post_init__(self) -> None:
        _check_share("TopFrames.fraction", self.fraction)

    def __call__(self, values: Tensor, fps: float) -> Tensor:
        return highest_mean(values.where(torch.isfinite(values), torch.nan), self.fraction)


@dataclass(frozen=True)
class TailAware(FramePooling):
    """(1 − share) · mean + share · mean of the worst frames. fraction: share of the frames that are the worst."""

    share: float = 0.5
    fraction: float = 0.3

    def __post_init__(self) -> None:
        _check_share("TailAware.share", self.share)
        _check_share("TailAware.fraction", self.fraction)

    def __call__(self, values: Tensor, fps: float) -> Tensor:
        return (1 - self.share) * values.mean(1) + self.share * lowest_mean(values, self.fraction)


@dataclass(frozen=True)
class LessDrift(FramePooling):
    """Another pooling minus weight · drift from the first to the last ``seconds``."""

    pooling: FramePooling
    weight: float = 1.0
    seconds: float = 1.0

    def __post_init__(self) -> None:
        if self.weight < 0 or self.seconds <= 0:
            raise ValueError(
                f"LessDrift.weight must be 0 or more and seconds positive, got {self.weight} and {self.seconds}"
            )

    def __call__(self, values: Tensor, fps: float) -> Tensor:
        return self.pooling(values, fps) - self.weight * drift(values, max(1, round(self.seconds * fps)))


def _check_share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"{name} must lie in (0, 1], got {value}")
