"""In which precision a network computes. It acts around the calls of the network and around nothing else.

Weights, adapters, their optimiser, latents, timesteps and their embedding, the sampler's arithmetic, losses and scores
stay in float32: a bf16 adapter stops moving at a rate of 1e-5, and a bf16 timestep of 937.5 is 936.
"""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch


class Precision(ABC):
    """How the matrix products of a network are computed."""

    @abstractmethod
    def around(self, device: torch.device) -> AbstractContextManager:
        """To be entered for each call of the network, and left before anything else is computed."""


@dataclass(frozen=True)
class AsWeights(Precision):
    """In the precision of the weights: float32 where they are float32."""

    def around(self, device: torch.device) -> AbstractContextManager:
        return nullcontext()


@dataclass(frozen=True)
class BFloat16(Precision):
    """bfloat16 autocast on float32 weights: products in 8 bits of precision, norms and sums in 24.

    A replay in other batches then differs from its rollout by roundings of up to a percent: ``train.replay_tolerance``
    has to allow it. No loss scaling: the exponent is that of float32.
    """

    def around(self, device: torch.device) -> AbstractContextManager:
        return torch.autocast(device.type, torch.bfloat16)
