"""The KL of the branch distribution from the reference's: λ Σ_i π_θ(i) log(π_θ(i) / π_ref(i)) per group.

KVPO (2605.14278). Exact, since a group is a finite set; it sees differences of energies only, so drift that all
branches share costs nothing here (`AnchorVelocityKL` sees that). Every clip of a group carries the group's whole KL, so
that the mean over the active clips is the mean over prompts and a prompt that is gated pays nothing.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from framework.interfaces import Regularizer
from framework.records import BranchLogits, Record
from framework.types import Objective


def branch_kl(current: Tensor, reference: Tensor, groups: Tensor, eps: float = 0.0) -> Tensor:
    """KL(π_θ ‖ π_ref) ≥ 0 of each clip's group [N], from log-probabilities [N]; anchors hold 0 in both and add nothing.

    eps: added to π_θ inside its logarithm; the released code has 1e-10, which raises it by at most G × eps.
    """
    inside = current if eps == 0 else (current.exp() + eps).log()
    terms = current.exp() * (inside - reference)
    same = groups.unsqueeze(1) == groups
    return terms.expand(len(terms), -1).where(same, torch.zeros_like(terms)).sum(1)


@dataclass(frozen=True)
class BranchKL(Regularizer):
    """A pull of the distribution over branches towards the reference's.

    weight: λ; 10 in the released configs."""

    weight: float = 10.0

    reads: ClassVar[frozenset[type[Record]]] = frozenset({BranchLogits})
    views: ClassVar[frozenset[str]] = frozenset({"current", "reference"})

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"BranchKL.weight must be 0 or more and finite, got {self.weight}")

    def penalty(self, objective: Objective, marks: Tensor | None) -> Tensor:
        logits: BranchLogits = objective.written[BranchLogits]
        return self.weight * branch_kl(logits.current, logits.reference, logits.groups)
