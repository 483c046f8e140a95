"""What a claim is, and how a paired interval over seeds decides it: agrees, disagrees, or undecided.

    claim:      an effect d lies in the region (low, high)
    agrees      the whole 95 % interval of d lies in the region
    disagrees   no point of the interval does
    undecided   anything else

The interval is about other seeds and other captions alike. With d_sc the effect of seed s on caption c, averaged over
noises, S seeds and C captions,

    h² = (t_{S−1} · std_s(d̄_s) / √S)² + b²        t the two-sided 95 % quantile of Student's distribution,

b the half width on that side of the bootstrap over captions at the seeds that were run. Both parts contain the error of
single clips, so the interval is a little wide rather than narrow. One seed says nothing about others: h = ∞.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from statistics import NormalDist, fmean, stdev
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from framework.reporting.report import TOTAL
from framework.reporting.statistics import clustered_bootstrap
from framework.reporting.summary import read_scores
from framework.weights import read_tensors

STUDENT = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)
"""t_ν(.975) for ν = 1 … 9."""


class Verdict(StrEnum):
    """What an interval says about a claim. FAILED: there is none, since something did not run."""

    AGREES = "agrees"
    DISAGREES = "disagrees"
    UNDECIDED = "undecided"
    FAILED = "failed"


class Interval(NamedTuple):
    """An effect and its 95 % interval."""

    mean: float
    low: float
    high: float


def decide(interval: Interval, low: float = -math.inf, high: float = math.inf) -> Verdict:
    """Whether an effect lies in the open region (low, high). Raises ValueError for an empty region or interval."""
    if not low < high or not interval.low <= interval.high:
        raise ValueError(f"the region ({low}, {high}) and the interval {interval[1:]} must not be empty")
    if low < interval.low and interval.high < high:
        return Verdict.AGREES
    if interval.high <= low or high <= interval.low:
        return Verdict.DISAGREES
    return Verdict.UNDECIDED


def student_quantile(freedom: int) -> float:
    """t_ν(.975); from ν = 10 on by the expansion in 1/ν (Abramowitz & Stegun 26.7.5), right to 1e-4."""
    if freedom < 1:
        raise ValueError(f"Student's distribution needs at least 1 degree of freedom, got {freedom}")
    if freedom <= len(STUDENT):
        return STUDENT[freedom - 1]
    z, v = NormalDist().inv_cdf(0.975), freedom
    terms = (
        z,
        (z**3 + z) / (4 * v),
        (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2),
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3),
    )
    return sum(terms)


def interval_over_seeds(effects: Sequence[Tensor]) -> Interval:
    """The interval of the module's docstring, from effects [C, M] of every seed: C captions, M noises.

    Raises ValueError for no seed, different shapes, fewer than two captions, or values that are not finite.
    """
    if not effects or len({tuple(effect.shape) for effect in effects}) > 1:
        raise ValueError(f"effects must be of equal shape, at least one; got {[tuple(e.shape) for e in effects]}")
    mean, low, high = clustered_bootstrap(torch.cat(list(effects), 1))
    seeds = [float(effect.double().mean()) for effect in effects]
    if len(seeds) == 1:
        return Interval(mean, -math.inf, math.inf)
    of_seeds = student_quantile(len(seeds) - 1) * stdev(seeds) / math.sqrt(len(seeds))
    return Interval(mean, mean - math.hypot(of_seeds, mean - low), mean + math.hypot(of_seeds, high - mean))


class Recipe(NamedTuple):
    """A run that evidence reads. command: of `armillary`. file: its gin file, packaged or yours."""

    command: str
    file: str


class Evidence(ABC):
    """Where the effect of a claim comes from: training runs, a measurement, or a measurement on what runs trained.

    A frozen dataclass of plain values, whose repr says all that its effects depend on beside the runs it reads.
    """

    exact: ClassVar[bool] = False
    """Whether effects are counted and equal for all seeds: asked once, without an interval."""

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """The runs that are read, each with every seed; none for a measurement alone."""
        return ()

    @abstractmethod
    def effects(self, seed: int, runs: Mapping[str, Path]) -> Tensor:
        """Effects [C, M] of one seed: C captions that are drawn together, M noises. runs: folder by gin file."""


@dataclass(frozen=True)
class HeldOutDifference(Evidence):
    """Held-out reward after training: one configuration minus another, on the same captions, noises and seeds.

    arm, baseline: gin files. signal: of the held-out reward, or "total", their mean. command: what trains both.
    """

    arm: str
    baseline: str
    signal: str = TOTAL
    command: str = "train"

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        return Recipe(self.command, self.arm), Recipe(self.command, self.baseline)

    def effects(self, seed: int, runs: Mapping[str, Path]) -> Tensor:
        """Raises ValueError for a signal that the runs were not judged by."""
        return self._after(runs[self.arm]) - self._after(runs[self.baseline])

    def _after(self, folder: Path) -> Tensor:
        _, after = read_scores(read_tensors(folder / "evaluation.safetensors"))
        scores = after | {TOTAL: torch.stack(list(after.values())).mean(0)}
        if self.signal not in scores:
            raise ValueError(
                f"HeldOutDifference.signal={self.signal!r}, but {folder} was judged by {', '.join(sorted(scores))}"
            )
        return scores[self.signal]


@dataclass(frozen=True)
class Claim:
    """One row of the table: what a paper says, how it is tested at toy scale, and which effects would bear it out.

    name: short, for files and ``--only``. statement: the claim. paper: its figure, as the paper reports it. source:
    where. measures: what the effect is, and its unit. low, high: the region that the effect lies in if the claim holds
    here; None for unbounded. digits: shown after the point.
    """

    name: str
    statement: str
    paper: str
    source: str
    measures: str
    evidence: Evidence
    low: float | None = 0.0
    high: float | None = None
    digits: int = 3

    def __post_init__(self) -> None:
        if not self.name.replace("_", "").isalnum():
            raise ValueError(f"Claim.name={self.name!r} names files; use letters, digits and '_'")
        if self.low is None and self.high is None:
            raise ValueError(f"claim {self.name} says nothing: give Claim.low or Claim.high")
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise ValueError(f"claim {self.name}: Claim.low={self.low} must lie below Claim.high={self.high}")

    @property
    def region(self) -> tuple[float, float]:
        """(low, high), infinite where unbounded."""
        return -math.inf if self.low is None else self.low, math.inf if self.high is None else self.high

    @property
    def rule(self) -> str:
        """The region in words."""
        low, high = self.region
        if math.isinf(high):
            return f"> {low:g}"
        return f"< {high:g}" if math.isinf(low) else f"in ({low:g}, {high:g})"

    def judge(self, effects: Sequence[Tensor]) -> tuple[Interval, Verdict]:
        """The interval of effects [C, M] of every seed, and what it says."""
        if self.evidence.exact:
            mean = fmean(float(effect.double().mean()) for effect in effects)
            interval = Interval(mean, mean, mean)
        else:
            interval = interval_over_seeds(effects)
        return interval, decide(interval, *self.region)
