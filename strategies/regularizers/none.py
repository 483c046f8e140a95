"""No regularizer: the surrogate alone decides how far the policy moves."""

from dataclasses import dataclass

import torch
from torch import Tensor

from framework.interfaces import Regularizer
from framework.types import Objective


@dataclass(frozen=True)
class NoRegularizer(Regularizer):
    """A penalty of exactly zero that reads no view, so no reference forward is paid for."""

    def penalty(self, objective: Objective, marks: Tensor | None) -> Tensor:
        return torch.zeros_like(objective.per_clip)
