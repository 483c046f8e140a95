"""A reward asked about consecutive intervals of a clip: how a score changes with time, and how even it stays."""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from framework.drift import PerBlock, stack_blocks
from framework.interfaces import RewardModel
from framework.types import Scores, VideoBatch

STATISTICS = ("lowest", "drift", "unevenness")


def interval_spans(frames: int, fps: float, seconds: float) -> tuple[tuple[int, int], ...]:
    """(start, stop) in frames of consecutive intervals of ``seconds``, the last one up to the end of the clip.

    A rest shorter than half an interval belongs to the last one. Raises ValueError for less than one frame.
    """
    length = round(seconds * fps)
    if length < 1:
        raise ValueError(f"an interval of {seconds} s holds no frame at {fps:g} frames per second; make it longer")
    count = max(1, math.floor(frames / length + 0.5))
    edges = [*range(0, count * length, length)[:count], frames]
    return tuple(itertools.pairwise(edges))


@dataclass(frozen=True)
class Timeline:
    """How `evaluate` looks along a clip. reward: asked about each interval alone, under the prompt in force at its
    first frame, e.g. a CLIP score; what it says of motion over an edge is left out. seconds: of an interval."""

    reward: RewardModel
    seconds: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.seconds < math.inf:
            raise ValueError(f"Timeline.seconds must be positive, got {self.seconds}")

    def spans(self, videos: VideoBatch) -> tuple[tuple[int, int], ...]:
        """The intervals of clips, in frames."""
        return interval_spans(videos.frames.shape[1], videos.fps, self.seconds)

    def measure(self, videos: VideoBatch) -> dict[str, Tensor]:
        """Per signal [N, intervals], NaN where a score was invalid."""
        scores = PerBlock(self.reward, self.spans(videos)).score(videos)
        return stack_blocks(
            {name: torch.where(scores.valid[name], value, torch.nan) for name, value in scores.values.items()}
        )


def over_time(values: Tensor) -> dict[str, Tensor]:
    """Of scores s_1 … s_K over time [N, K], each [N]:

    lowest = min_k s_k      drift = s_K − s_1      unevenness = √( (1/K) Σ_k (s_k − s̄)² )
    """
    return {
        "lowest": values.amin(1),
        "drift": values[:, -1] - values[:, 0],
        "unevenness": values.std(1, correction=0),
    }


@dataclass(frozen=True)
class OverTime(RewardModel):
    """Another reward's consistency over time as signals of its own: ``VQ_lowest``, ``VQ_drift`` and ``VQ_unevenness``.

    reward, seconds: as in `Timeline`. A clip with an interval that could not be scored is invalid.
    """

    reward: RewardModel
    seconds: float = 1.0

    def __post_init__(self) -> None:
        Timeline(self.reward, self.seconds)

    @property
    def signals(self) -> tuple[str, ...]:
        return tuple(f"{signal}_{statistic}" for signal in self.reward.signals for statistic in STATISTICS)

    def score(self, videos: VideoBatch) -> Scores:
        """See `over_time`."""
        measured = Timeline(self.reward, self.seconds).measure(videos)
        found = {
            f"{name}_{key}": value for name, values in measured.items() for key, value in over_time(values).items()
        }
        return Scores.of({name: found[name] for name in self.signals})

    def unavailable(self) -> str | None:
        return self.reward.unavailable()

    def state_dict(self) -> dict:
        return self.reward.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.reward.load_state_dict(state)
