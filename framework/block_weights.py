"""How much each block of a clip counts in a loss that reaches it also through the encoding of its history.

A clean block takes gradient from its own loss and, through the keys and values it is encoded to, from the loss of every
later block. RAVEN (2605.15190) weighs the direct losses by the share of the clip that is still to come at block j,

    p_j = Σ_{k ≥ j} n_k / Σ_k n_k        1 = p_1 > p_2 > … > p_T > 0,

n_k the frames of block k (all elements of a frame count alike). A family gives raw weights; they are scaled so that the
mean over *elements* is 1, which leaves the size of the loss and the meaning of a learning rate as they were:

    w_j = w̃_j · Σ_k n_k / Σ_k w̃_k n_k
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise


def participation(frames: Sequence[int]) -> tuple[float, ...]:
    """p_j of every block from the frames n_j of each. Raises ValueError for no block or an empty one."""
    if not frames or min(frames) < 1:
        raise ValueError(f"a clip needs at least one block, each of at least one frame; got {tuple(frames)} frames")
    total = sum(frames)
    return tuple(sum(frames[j:]) / total for j in range(len(frames)))


def block_weights(raw: Sequence[float], frames: Sequence[int]) -> tuple[float, ...]:
    """Raw weights of blocks of n_j frames scaled to element mean 1. Raises ValueError where that cannot be done."""
    total = sum(w * n for w, n in zip(raw, frames, strict=True))
    if not (math.isfinite(total) and total > 0 and min(raw) >= 0):
        raise ValueError(f"block weights must be finite, at least 0 and not all 0, got {tuple(raw)}; choose others")
    return tuple(w * sum(frames) / total for w in raw)


class BlockWeights(ABC):
    """How much each block of a clip counts in the loss."""

    @abstractmethod
    def raw(self, frames: Sequence[int]) -> Sequence[float]:
        """Weight w̃_j ≥ 0 of every block before it is scaled; ``frames``: n_j ≥ 1 of each."""

    def __call__(self, frames: Sequence[int]) -> tuple[float, ...]:
        """Weight w_j of every block, element mean 1, from the frames of each block."""
        return block_weights(self.raw(frames), frames)

    def per_frame(self, frames: Sequence[int]) -> tuple[float, ...]:
        """The same once per frame: Σ n_j values of mean 1."""
        return tuple(w for w, n in zip(self(frames), frames, strict=True) for _ in range(n))


@dataclass(frozen=True)
class Uniform(BlockWeights):
    """Every block counts alike."""

    def raw(self, frames: Sequence[int]) -> Sequence[float]:
        return [1.0 for _ in participation(frames)]


@dataclass(frozen=True)
class FutureParticipation(BlockWeights):
    """RAVEN's chunk weights, one family of hyperbolas through both ends.

        α > 0:  w̃ = α p / (1 + (α − 1) p)                          early blocks count more
        α = 0:  w̃ = 1                                              by convention, not as a limit
        α < 0:  w̃ = |α| q / (1 + (|α| − 1) q),  q = p_T / p_j      late blocks count more; −1 is the paper's

    The closer α is to 0, the more one end outweighs the rest; α = 0 itself is uniform.
    """

    alpha: float = -1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.alpha):
            raise ValueError(f"FutureParticipation.alpha must be finite, got {self.alpha}; 0 is uniform")

    def raw(self, frames: Sequence[int]) -> Sequence[float]:
        p = participation(frames)
        if self.alpha == 0:
            return [1.0] * len(p)
        share = p if self.alpha > 0 else [p[-1] / p_j for p_j in p]
        a = abs(self.alpha)
        return [a * s / (1 + (a - 1) * s) for s in share]


@dataclass(frozen=True)
class LogitNormal(BlockWeights):
    """Mass that a logit-normal law puts on [p_{j+1}, p_j], divided by its width: logit p ~ N(mean, std²).

    A negative mean favours late blocks, a positive one early blocks.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.mean) or not 0 < self.std < math.inf:
            raise ValueError(f"LogitNormal needs a finite mean and a std above 0, got {self.mean} and {self.std}")

    def raw(self, frames: Sequence[int]) -> Sequence[float]:
        return _density_of_blocks(frames, self.cdf)

    def cdf(self, p: float) -> float:
        """P(X ≤ p), 0 ≤ p ≤ 1."""
        if p <= 0 or p >= 1:
            return float(p >= 1)
        return 0.5 * math.erfc(-(math.log(p / (1 - p)) - self.mean) / (self.std * math.sqrt(2)))


@dataclass(frozen=True)
class Mode(BlockWeights):
    """Mass of Stable Diffusion 3's mode density (2403.03206, eq. 20) on [p_{j+1}, p_j], divided by its width.

        p = f(u) = 1 − u − s (cos²(π u / 2) − 1 + u),   u ~ U[0, 1]

    s > 0 favours the middle of the clip, s < 0 its ends. scale: s in [−1, 2 / (π − 2)], where f is monotone.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        highest = 2 / (math.pi - 2)
        if not -1 <= self.scale <= highest:
            raise ValueError(f"Mode.scale must lie in [-1, {highest:.4f}], got {self.scale}; outside it is no density")

    def raw(self, frames: Sequence[int]) -> Sequence[float]:
        return _density_of_blocks(frames, self.cdf)

    def cdf(self, p: float) -> float:
        """P(f(U) ≤ p) = 1 − f⁻¹(p): f falls from 1 to 0, its inverse is found by bisection."""
        low, high = 0.0, 1.0
        for _ in range(60):  # beyond the precision of a float
            u = (low + high) / 2
            f = 1 - u - self.scale * (math.cos(math.pi * u / 2) ** 2 - 1 + u)
            low, high = (u, high) if f > p else (low, u)
        return 1 - (low + high) / 2


def _density_of_blocks(frames: Sequence[int], cdf: Callable[[float], float]) -> list[float]:
    """(cdf(p_j) − cdf(p_{j+1})) / (p_j − p_{j+1}), p_{T+1} = 0."""
    edges = (*participation(frames), 0.0)
    return [max(0.0, cdf(high) - cdf(low)) / (high - low) for high, low in pairwise(edges)]
