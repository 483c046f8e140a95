"""Exponential moving averages of weights, by name."""

from collections.abc import Mapping

import torch
from torch import Tensor

from framework.distributed import held


class WeightAverage:
    """average ← d · average + (1 − d) · weights, kept in the dtype of the first weights (float32 in training).

    Of sharded weights each rank averages its part."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = {name: tensor.detach().clone() for name, tensor in weights.items()}

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], decay: float) -> None:
        """One step; d = 0 copies. Raises KeyError where the names differ."""
        if weights.keys() != self.weights.keys():
            raise KeyError(f"averaged weights differ by name: {sorted(weights.keys() ^ self.weights.keys())[:5]}")
        averages = [held(average) for average in self.weights.values()]
        torch._foreach_lerp_(averages, [held(weights[name]) for name in self.weights], 1 - decay)
