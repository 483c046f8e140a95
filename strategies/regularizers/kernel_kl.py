"""The KL of the sampler's Gaussian steps to the reference policy's, in closed form (RAVEN, 2605.15190; Flow-GRPO).

Policy and reference share the kernel's std, so KL = ⟨(μ_θ − μ_ref)²⟩ / (2 std²): here averaged over elements and over
the trained steps with the weights ρ of the policy term, i.e. in exactly the units of log π. The release of RAVEN
multiplies its policy term by 100 and not this one, so its β is a hundred times ours.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from framework.interfaces import Regularizer
from framework.records import KernelShift, Record
from framework.types import Objective


@dataclass(frozen=True)
class KernelKL(Regularizer):
    """weight · KL(π_θ ‖ π_ref) of the trained sampler steps. weight: β, in units of the policy term's log π."""

    weight: float = 0.04

    reads: ClassVar[frozenset[type[Record]]] = frozenset({KernelShift})
    views: ClassVar[frozenset[str]] = frozenset({"current", "reference"})

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"KernelKL.weight must be 0 or more and finite, got {self.weight}")

    def penalty(self, objective: Objective, marks: Tensor | None) -> Tensor:
        shift: KernelShift = objective.written[KernelShift]
        return self.weight * (shift.divergence if marks is None else marks * shift.divergence)
