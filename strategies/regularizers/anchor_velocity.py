"""A velocity-space KL on the anchor's trajectory alone: λ ⟨(v_θ − v_ref)²⟩ at the states that no route has touched.

Ratio and branch KL of a Gibbs policy see differences of energies, so drift that all branches share is free; on the
anchor, generated under the canonical history, it is what a viewer gets. Ours: KVPO's paper has no such term.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from framework.interfaces import Regularizer
from framework.records import AnchorShift, Record
from framework.types import Objective


@dataclass(frozen=True)
class AnchorVelocityKL(Regularizer):
    """A pull of the canonical trajectory towards the reference's velocity.

    weight: λ, in the units of `VelocityKL.weight`. Every clip carries its group's term, so a gated prompt pays
    nothing."""

    weight: float = 1e-2

    reads: ClassVar[frozenset[type[Record]]] = frozenset({AnchorShift})
    views: ClassVar[frozenset[str]] = frozenset({"current", "reference"})

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"AnchorVelocityKL.weight must be 0 or more and finite, got {self.weight}")

    def penalty(self, objective: Objective, marks: Tensor | None) -> Tensor:
        shift: AnchorShift = objective.written[AnchorShift]
        return self.weight * shift.distance
