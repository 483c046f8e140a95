"""Velocity-space KL to the reference policy: λ ⟨(v_θ − v_ref)²⟩ per clip.

For Gaussian transitions of equal std the KL of two policies is a squared distance of their predictions; in velocity
space it does not fade with σ (Astrolabe, 2603.17051, sec. 3.4; DiffusionNFT). With marks only marked clips pay, and the
sum is still divided by all clips of the batch, so a lone marked clip weighs 1/B.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from framework.interfaces import Regularizer
from framework.records import EndpointShift, Record
from framework.types import Objective


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the masked entries only, 0 for an empty mask: the released normalisation."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def batch_normalised(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over the masked entries divided by the batch size: our normalisation."""
    return (values * mask).sum() / len(values)


@dataclass(frozen=True)
class VelocityKL(Regularizer):
    """A uniform pull of every clip towards the reference policy's velocity.

    weight: λ; 1e-4 is the published value and nearly inert, 1e-2 … 4e-2 acts."""

    weight: float = 1e-2

    reads: ClassVar[frozenset[type[Record]]] = frozenset({EndpointShift})
    views: ClassVar[frozenset[str]] = frozenset({"current", "reference"})

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"VelocityKL.weight must be 0 or more and finite, got {self.weight}")

    def penalty(self, objective: Objective, marks: Tensor | None) -> Tensor:
        shift: EndpointShift = objective.written[EndpointShift]
        return self.weight * (shift.distance if marks is None else marks * shift.distance)
