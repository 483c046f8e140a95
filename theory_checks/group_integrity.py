"""An advantage belongs to a clip and its group, not to the place where either was computed.

Statement. For every group-relative rule A(scores, groups), any permutation σ of the clips and any renaming of the group
ids, A(σ scores, σ groups) = σ A(scores, groups), and Σ A = 0 over every group in which no bound acts. So how many clips
a rank or a micro-batch holds, and in which order, cannot change an update.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from framework.advantages import GroupCentred, GroupRelative, PerRewardCentred, PrimaryOnly, SumFirst
from framework.interfaces import AdvantageRule
from framework.raven_advantages import RavenAdvantage
from framework.types import Scores
from theory_checks.statement import Finding, worst

WEIGHTS = {"look": 1.0, "move": 0.5}
RULES: tuple[AdvantageRule, ...] = (
    GroupRelative(WEIGHTS, clip=None), GroupCentred(WEIGHTS, clip=None), PerRewardCentred(WEIGHTS, clip=None),
    PrimaryOnly("look", clip=None), SumFirst(WEIGHTS, clip=None), RavenAdvantage(WEIGHTS),
)  # fmt: skip
GROUPS, SIZE = 4, 6
Apply = Callable[[AdvantageRule, dict[str, Tensor], Tensor], Tensor]


def at_once(rule: AdvantageRule, values: dict[str, Tensor], groups: Tensor) -> Tensor:
    return rule(Scores.of(values), groups).values


def in_halves(rule: AdvantageRule, values: dict[str, Tensor], groups: Tensor) -> Tensor:
    """Two ranks, each judging the clips that it made."""
    middle = len(groups) // 2
    parts = slice(0, middle), slice(middle, None)
    return torch.cat([at_once(rule, {name: v[part] for name, v in values.items()}, groups[part]) for part in parts])


def violation(apply: Apply, rule: AdvantageRule, seed: int) -> float:
    """Largest change by placement, and largest sum over a group."""
    random = torch.Generator().manual_seed(seed)
    groups = torch.arange(GROUPS).repeat_interleave(SIZE)
    difficulty = torch.randn(GROUPS, generator=random).repeat_interleave(SIZE)
    values = {name: difficulty + torch.randn(len(groups), generator=random) for name in WEIGHTS}
    expected = at_once(rule, values, groups)
    order = torch.randperm(len(groups), generator=random)
    names = torch.randperm(100, generator=random)[:GROUPS]
    found = apply(rule, {name: value[order] for name, value in values.items()}, names[groups[order]])
    sums = torch.zeros(GROUPS).index_add_(0, groups[order], found)
    return worst(float((found - expected[order]).abs().max()), float(sums.abs().max()))


def check() -> Finding:
    """Six rules, random orders and names; planted: each half of the clips judged where it was made."""
    seeds = range(5)
    residual = worst(*(violation(at_once, rule, seed) for rule in RULES for seed in seeds))
    planted = min(violation(in_halves, rule, seed) for rule in RULES for seed in seeds)
    return Finding("advantages ignore placement and names of groups; Σ_group A = 0", "6 rules, 4 groups of 6, fp32 out",
                   residual, 5e-6, planted)  # fmt: skip
