"""Selective KL: only clips that the primary reward alone likes are pulled back to the reference.

Astrolabe (2603.17051, sec. 3.4), after GARDO (2512.24138). A clip that the primary signal ranks much higher among its
siblings than the auxiliary signals do is probably exploiting the primary one:

    w_k(i) = (#{j : r_kj < r_ki} + ½ #{j ≠ i : r_kj = r_ki}) / G      rank among the G clips of the prompt, 0 the lowest
    U_i    = w_primary(i) − mean_aux w_aux(i)                         positive: over-rated by the primary
    D⁺     = {U_i ≥ 0} over the whole step                            τ = percentile(D⁺, 100 (1 − ρ)),  M_i = [U_i > τ]
    ρ      ← 1.1 ρ where mean(D⁺) exceeds all it remembers, .9 ρ where it falls below, clipped

so ρ is a share of D⁺, about half of the clips, and not of the batch; and a bound: ⌈ρ (|D⁺| − 1)⌉ clips at most have U >
τ, fewer where gaps tie, and nobody pays where the largest gap is shared by more, which few branches with their coarse
ranks make common. The strict > is the paper's and the released one: U ≥ τ would flag all clips wherever the signals
agree. Deviations from the released code: it counts ranks from the best, which flags what the primary *under*-rates
(`UnderRated` here); it ranks prompts against each other; and it divides by the flagged clips, where we divide by all,
so that a lone flagged clip weighs 1/B.
"""

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from framework.interfaces import Regularizer
from framework.records import EndpointShift, Record
from framework.rng import Streams
from framework.types import Marks, Objective, Scores


def midranks(values: Tensor, groups: Tensor) -> Tensor:
    """How many of its group a value exceeds, ties counting half: float64 [N] in [0, group size − 1]."""
    siblings = groups[:, None] == groups
    below = (values < values[:, None]) & siblings
    equal = (values == values[:, None]) & siblings
    return below.sum(1) + 0.5 * (equal.sum(1) - 1).double()


def rank_gap(primary: Tensor, auxiliaries: Sequence[Tensor], groups: Tensor) -> Tensor:
    """U of scores [N] in ranks: rank of the primary minus mean rank of the auxiliaries, positive where over-rated."""
    ranks = torch.stack([midranks(values, groups) for values in auxiliaries])
    return midranks(primary, groups) - ranks.mean(0)


def group_sizes(groups: Tensor) -> Tensor:
    """Clips in each one's group [N]."""
    return (groups[:, None] == groups).sum(1)


def risk_threshold(positive: Tensor, ratio: float) -> float:
    """percentile(D⁺, 100 (1 − ρ)), linear between neighbours."""
    return float(np.percentile(positive.double().numpy(), 100 * (1 - ratio)))


class RiskRatio(ABC):
    """ρ: which share of the over-rated clips is flagged."""

    @abstractmethod
    def update(self, mean_gap: float) -> float:
        """Once a step: the ratio to use now, given the mean of D⁺."""

    def state_dict(self) -> dict:
        """What `update` remembers."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict`."""
        if state:
            raise ValueError(f"{type(self).__name__} remembers nothing, but the state to load has {sorted(state)}")


@dataclass(frozen=True)
class ConstantRatio(RiskRatio):
    """The same ρ at every step."""

    value: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.value <= 1:
            raise ValueError(f"ConstantRatio.value must lie in (0, 1], got {self.value}")

    def update(self, mean_gap: float) -> float:
        return self.value


class AdaptiveRatio(RiskRatio):
    """ρ grows when the disagreement is larger than all that is remembered and shrinks when it is smaller.

    base: ρ of the first step. step: relative change. low, high: bounds from the second step on. memory: how many mean
    gaps are remembered.
    """

    def __init__(
        self, base: float = 0.1, step: float = 0.1, low: float = 0.02, high: float = 0.2, memory: int = 20
    ) -> None:
        if not (0 < base <= 1 and 0 < low <= high <= 1):
            raise ValueError(
                f"AdaptiveRatio needs base in (0, 1] and 0 < low ≤ high ≤ 1, got base={base}, low={low}, high={high}"
            )
        if not 0 <= step < 1 or memory < 1:
            raise ValueError(f"AdaptiveRatio needs step in [0, 1) and memory of at least 1, got {step} and {memory}")
        self.ratio, self.step, self.low, self.high = base, step, low, high
        self.remembered: deque[float] = deque(maxlen=memory)

    def update(self, mean_gap: float) -> float:
        if self.remembered:
            if mean_gap > max(self.remembered):
                self.ratio *= 1 + self.step
            elif mean_gap < min(self.remembered):
                self.ratio *= 1 - self.step
            self.ratio = min(max(self.ratio, self.low), self.high)
        self.remembered.append(mean_gap)
        return self.ratio

    def state_dict(self) -> dict:
        return {"ratio": self.ratio, "remembered": list(self.remembered)}

    def load_state_dict(self, state: dict) -> None:
        self.ratio = state["ratio"]
        self.remembered = deque(state["remembered"], self.remembered.maxlen)


Flag = Callable[[Tensor], Tensor]
"""Gaps [N] → which of them are too large, bool [N]; adapts ρ once."""


class Selection(ABC):
    """Which clips pay, given the gap of each and the rule that flags large gaps."""

    @abstractmethod
    def __call__(self, gap: Tensor, flag: Flag, step: int) -> Tensor:
        """Mask, bool [N]."""


@dataclass(frozen=True)
class OverRated(Selection):
    """The clips that the primary signal over-rates: the method."""

    def __call__(self, gap: Tensor, flag: Flag, step: int) -> Tensor:
        return flag(gap)


@dataclass(frozen=True)
class UnderRated(Selection):
    """The clips that the primary signal under-rates: a control, and what the released code selects."""

    def __call__(self, gap: Tensor, flag: Flag, step: int) -> Tensor:
        return flag(-gap)


@dataclass(frozen=True)
class AtRandom(Selection):
    """As many clips as `OverRated` selects, drawn from all of them: the control of the same total weight."""

    seed: int = 0

    def __call__(self, gap: Tensor, flag: Flag, step: int) -> Tensor:
        mask = flag(gap)
        return mask[torch.randperm(len(mask), generator=Streams(self.seed)("mask", step))]


class SelectiveKL(Regularizer):
    """λ ⟨(v_θ − v_ref)²⟩ for the clips that the primary signal over-rates, 0 for all others.

    primary: the signal that may be exploited. auxiliaries: signals it is compared with, one or more others. weight: λ.
    ratio: which share of the over-rated clips pays. within_prompt: rank siblings, or all clips of the step as the
    released code does, where prompt difficulty dominates the ranks. selection: the clips that pay.
    """

    reads: ClassVar[frozenset[type[Record]]] = frozenset({EndpointShift})
    views: ClassVar[frozenset[str]] = frozenset({"current", "reference"})

    def __init__(
        self,
        primary: str,
        auxiliaries: Sequence[str],
        weight: float = 1e-2,
        ratio: RiskRatio | None = None,
        within_prompt: bool = True,
        selection: Selection | None = None,
    ) -> None:
        if primary in auxiliaries:
            raise ValueError(
                f"SelectiveKL.auxiliaries={list(auxiliaries)} contain the primary signal {primary!r}, which cannot "
                f"disagree with itself; leave it out"
            )
        if not auxiliaries or len(set(auxiliaries)) < len(auxiliaries):
            raise ValueError(
                f"SelectiveKL.auxiliaries must name at least one signal, each once, got {list(auxiliaries)}"
            )
        if not 0 <= weight < math.inf:
            raise ValueError(f"SelectiveKL.weight must be 0 or more and finite, got {weight}")
        self.primary, self.auxiliaries = primary, tuple(auxiliaries)
        self.weight = weight
        self.ratio = ratio or AdaptiveRatio()
        self.within_prompt = within_prompt
        self.selection = selection or OverRated()
        self.steps = 0

    @property
    def signals(self) -> frozenset[str]:
        return frozenset({self.primary, *self.auxiliaries})

    def prepare(self, scores: Scores, groups: Tensor, anchors: Tensor | None = None) -> Marks:
        """The mask. Clips without all of the signals and anchors are neither ranked nor marked."""
        usable = torch.stack([scores.valid[name] for name in sorted(self.signals)]).all(0)
        if anchors is not None:
            usable = usable & ~anchors
        rows = usable.nonzero().squeeze(1)
        ranked = groups[rows] if self.within_prompt else torch.zeros_like(rows)
        gap = rank_gap(
            scores.values[self.primary][rows], [scores.values[name][rows] for name in self.auxiliaries], ranked
        ) / group_sizes(ranked).clamp(min=1)
        used: dict[str, float] = {}

        def flag(gap: Tensor) -> Tensor:
            positive = gap[gap >= 0]
            if not len(positive):
                return torch.zeros_like(gap, dtype=torch.bool)
            used["mean_gap"] = float(positive.mean())
            used["risk_ratio"] = self.ratio.update(used["mean_gap"])
            return gap > risk_threshold(positive, used["risk_ratio"])

        mask = self.selection(gap, flag, self.steps)
        self.steps += 1
        marks = torch.zeros(len(groups)).index_put((rows,), mask.float())
        return Marks(marks, {"mask_fraction": marks.mean(), **used})

    def penalty(self, objective: Objective, marks: Tensor | None) -> Tensor:
        if marks is None:
            raise ValueError("SelectiveKL.penalty needs the marks of `prepare`")
        shift: EndpointShift = objective.written[EndpointShift]
        return self.weight * marks * shift.distance

    def state_dict(self) -> dict:
        return {"steps": self.steps, "ratio": self.ratio.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.steps = state["steps"]
        self.ratio.load_state_dict(state["ratio"])
