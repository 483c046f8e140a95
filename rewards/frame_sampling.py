"""Which frames of a span a reward looks at: a subset is another estimator, so it is chosen in the open.

Indices depend on the length, the frame rate and a name alone: clips of one group, which share prompt and span, are
judged by the same frames. VideoAlign's rules are those of its released code; Python and torch round half to even.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from framework.rng import check_seed, derive_seed, make_generator


class SpanTooShort(ValueError):
    """A span has too few frames to choose from."""


class FrameSampling(ABC):
    """A rule that chooses frames."""

    @abstractmethod
    def indices(self, frames: int, fps: float, name: str) -> tuple[int, ...]:
        """Ascending indices into a span of ``frames`` frames, ``fps`` a second.

        name: of what is judged, e.g. its prompt; only rules that draw read it. Raises SpanTooShort for a span that is.
        """


def spread(frames: int, count: int) -> tuple[int, ...]:
    """``count`` indices from the first to the last of ``frames``, evenly and rounded half to even in float32."""
    return tuple(torch.linspace(0, frames - 1, count).round().long().tolist())


def uniform_count(frames: int, fps: float, target: float, least: int = 4, most: int = 768) -> int:
    """VideoAlign's number of frames at ``target`` a second: 2 round(n/2), n = T/fps · target within the bounds.

    The upper bound, the even floor of min(most, T), wins over the lower one. 81 frames at 16 a second give 10, 88
    give 12, 3 give 2. Raises SpanTooShort for fewer than 2 frames.
    """
    bound = min(most, frames) // 2 * 2
    count = 2 * round(min(max(frames / fps * target, least), bound) / 2)
    if not 2 <= count <= frames:
        raise SpanTooShort(f"a window of {frames} frames cannot be sampled; VideoAlign needs at least 2")
    return count


@dataclass(frozen=True)
class UniformFrames(FrameSampling):
    """VideoAlign's own rule: evenly, ``fps`` frames for each second of true time, an even number of them."""

    fps: float = 2.0

    def __post_init__(self) -> None:
        if self.fps <= 0:
            raise ValueError(f"UniformFrames.fps must be positive, got {self.fps}")

    def indices(self, frames: int, fps: float, name: str) -> tuple[int, ...]:
        return spread(frames, uniform_count(frames, fps, self.fps))


@dataclass(frozen=True)
class CountedFrames(FrameSampling):
    """So many frames whatever the length, evenly: 2 round(count/2), at most all of them; then it may be odd."""

    count: int

    def __post_init__(self) -> None:
        if self.count < 2:
            raise ValueError(f"CountedFrames.count must be at least 2, got {self.count}")

    def indices(self, frames: int, fps: float, name: str) -> tuple[int, ...]:
        count = min(2 * round(self.count / 2), frames)
        if count < 2:
            raise SpanTooShort(f"a window of {frames} frames cannot be sampled; VideoAlign needs at least 2")
        return spread(frames, count)


@dataclass(frozen=True)
class MultiPointFrames(FrameSampling):
    """VideoAlign's ``multi_pts``: short bursts of ``width`` frames at ``fps``, around ``points`` places of the clip."""

    points: int = 4
    width: int = 6
    fps: float = 8.0

    def __post_init__(self) -> None:
        if self.points < 1 or self.width < 2 or self.width % 2 or self.fps <= 0:
            raise ValueError(
                f"MultiPointFrames needs points ≥ 1, an even width ≥ 2 and fps > 0, got {self.points}, {self.width} "
                f"and {self.fps}"
            )

    def indices(self, frames: int, fps: float, name: str) -> tuple[int, ...]:
        half = self.width // 2
        count = math.floor(frames * self.fps / fps)
        if count < self.width:
            raise SpanTooShort(
                f"a window of {frames} frames at {fps} a second has {count} at {self.fps}; MultiPointFrames.width "
                f"{self.width} needs as many"
            )
        shown = spread(frames, count)
        centres = torch.linspace(half, count - half - 1, self.points).round().long().tolist()
        return tuple(shown[i] for centre in centres for i in range(centre - half, centre + half))


@dataclass(frozen=True)
class AllFrames(FrameSampling):
    """Every frame: what the papers pool HPSv3 over, and 81 forwards of a 7B network for five seconds."""

    def indices(self, frames: int, fps: float, name: str) -> tuple[int, ...]:
        return tuple(range(frames))


@dataclass(frozen=True)
class StratifiedFrames(FrameSampling):
    """One frame at random out of each of ``count`` equal parts; all of them where there are not more.

    The draw is named by the seed, what is judged and the length, so siblings of a group are judged by the same frames.
    A mean over them is unbiased for the mean over all, of the best or worst share it is not. Where parts are shorter
    than two frames, one may be drawn twice.
    """

    count: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed, "StratifiedFrames.seed")
        if self.count < 1:
            raise ValueError(f"StratifiedFrames.count must be at least 1, got {self.count}")

    def indices(self, frames: int, fps: float, name: str) -> tuple[int, ...]:
        if frames <= self.count:
            return tuple(range(frames))
        random = make_generator(derive_seed(self.seed, "frames", name, frames))
        edges = [frames * i / self.count for i in range(self.count + 1)]
        drawn = torch.rand(self.count, generator=random, dtype=torch.float64).tolist()
        # parts whose ends fall inside a frame share it by how much of it is theirs
        places = [low + u * (high - low) for low, high, u in zip(edges[:-1], edges[1:], drawn, strict=True)]
        return tuple(min(int(place), frames - 1) for place in places)
