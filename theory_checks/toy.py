"""A toy generator for theory: the exact denoiser of a Gaussian mixture, in closed form at every noise level."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from framework.kernels import TransitionKernel


@dataclass(frozen=True)
class Mixture:
    """x0 ~ Σ_k w_k N(m_k, s_k² I) in D dimensions, and everything that follows for x_σ = (1 − σ) x0 + σ ε.

    weights [K], positive and of sum 1. means [K, D]. stds [K]; 0 makes a point of an enumerable distribution. States x
    are [N, D], levels σ in (0, 1].
    """

    weights: Tensor
    means: Tensor
    stds: Tensor

    def log_joint(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """log w_k + log N(x; (1 − σ) m_k, ((1 − σ)² s_k² + σ²) I): [N, K]."""
        variance = self.variances(sigma)
        squares = (x.unsqueeze(1) - (1 - sigma) * self.means).square().sum(2)
        dimensions = self.means.shape[1]
        return self.weights.log() - squares / (2 * variance) - dimensions / 2 * (2 * math.pi * variance).log()

    def variances(self, sigma: Tensor | float) -> Tensor:
        """Of x_σ in every component [K]."""
        return (1 - sigma) ** 2 * self.stds.square() + sigma**2

    def log_density(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """log p_σ(x): [N]."""
        return self.log_joint(x, sigma).logsumexp(1)

    def posterior(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """p(k | x_σ = x): [N, K]."""
        return self.log_joint(x, sigma).softmax(1)

    def x0(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """E[x0 | x_σ = x]: [N, D], the mean of each component's own posterior mean."""
        gain = ((1 - sigma) * self.stds.square() / self.variances(sigma)).unsqueeze(1)
        each = self.means + gain * (x.unsqueeze(1) - (1 - sigma) * self.means)
        return (self.posterior(x, sigma).unsqueeze(2) * each).sum(1)

    def velocity(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """E[ε − x0 | x_σ = x] = (x − x̂0) / σ: [N, D]."""
        return (x - self.x0(x, sigma)) / sigma

    def tilted(self, factors: Tensor) -> "Mixture":
        """The mixture of weights ∝ w_k f_k; factors [K], not negative."""
        weights = self.weights * factors
        return Mixture(weights / weights.sum(), self.means, self.stds)

    def sample(self, kernel: TransitionKernel, grid: Sequence[tuple[float, float]], noise: Tensor) -> Tensor:
        """Where the few-step sampler arrives from noise [1 + len(grid), N, D]: [N, D]."""
        x = noise[0]
        for (sigma, sigma_next), fresh in zip(grid, noise[1:], strict=True):
            x = kernel.step(x, self.velocity(x, sigma), sigma, sigma_next, fresh)
        return x


def mixture(seed: int, components: int, dimensions: int, spread: float) -> Mixture:
    """Random weights and means, stds around ``spread``; 0 for an enumerable distribution."""
    random = torch.Generator().manual_seed(seed)
    weights = torch.rand(components, generator=random, dtype=torch.float64) + 0.5
    means = torch.randn(components, dimensions, generator=random, dtype=torch.float64)
    stds = spread * (torch.rand(components, generator=random, dtype=torch.float64) + 0.5)
    return Mixture(weights / weights.sum(), means, stds)
