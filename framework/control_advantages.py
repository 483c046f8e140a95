"""A control for advantage rules: rewards that are real, but handed to the wrong siblings."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from framework.interfaces import AdvantageRule
from framework.records import Record
from framework.rng import derive_seed, make_generator
from framework.types import Advantage, Scores


def sibling_permutation(groups: Tensor, seed: int) -> Tensor:
    """An index [N] that permutes the members of each group among themselves, drawn from (seed, group id)."""
    index = torch.arange(len(groups))
    for group in groups.unique().tolist():
        members = torch.nonzero(groups == group).squeeze(1)
        order = torch.randperm(len(members), generator=make_generator(derive_seed(seed, "shuffle", group)))
        index[members] = members[order]
    return index


@dataclass(frozen=True)
class ShuffledSiblings(AdvantageRule):
    """Another rule on rewards that were permuted inside each group, anchors included.

    Every group keeps its rewards, so spread, clipping and step size stay those of the real run, and only the knowledge
    of who earned what is gone: a method that still gains does so for another reason, and one that loses much is fragile
    against a broken reward. rule: the rule under control. seed: of the permutations.
    """

    rule: AdvantageRule
    seed: int = 0

    @property
    def reads(self) -> frozenset[type[Record]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What the rule under control reads."""
        return self.rule.reads

    def __call__(self, scores: Scores, groups: Tensor, anchors: Tensor | None = None) -> Advantage:
        index = sibling_permutation(groups, self.seed)

        def permuted(signals: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: value[index] for name, value in signals.items()}

        shuffled = replace(scores, values=permuted(scores.values), valid=permuted(scores.valid))
        return self.rule(shuffled, groups, anchors)
