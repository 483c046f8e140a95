"""The denoiser of the toy mixture is exact: its noise is the score, and its velocity carries the marginals.

Statement. With x̂0 = E[x0 | x_σ], v = (x_σ − x̂0)/σ, ε̂ = x_σ + (1 − σ) v and p_σ the density of x_σ,

    ∇ log p_σ(x) = −ε̂/σ                                  (Tweedie)
    ∂_σ log p_σ + v · ∇ log p_σ + ∇ · v = 0              (continuity)

so the flow of v takes the marginal of every level to that of every other, and checks that need a network which is
right everywhere can use this one.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from framework.flow import noise_from_velocity
from theory_checks.statement import Finding, worst
from theory_checks.toy import Mixture, mixture


def violation(data: Mixture, velocity: Callable[[Tensor, Tensor | float], Tensor], sigma: float) -> float:
    """Largest error of both identities at random states."""
    random = torch.Generator().manual_seed(7)
    level = torch.tensor(sigma, dtype=torch.float64, requires_grad=True)
    x = 1.5 * torch.randn(6, 3, generator=random, dtype=torch.float64)
    x.requires_grad_()
    score, rates = [], []
    for row in range(len(x)):  # one state at a time: σ is shared, its derivative is not
        slope, rate = torch.autograd.grad(data.log_density(x, level)[row], (x, level))
        score.append(slope[row])
        rates.append(rate)
    v = velocity(x, level)
    divergence = sum(torch.autograd.grad(v[:, d].sum(), x, retain_graph=True)[0][:, d] for d in range(x.shape[1]))
    tweedie = torch.stack(score) + noise_from_velocity(x, v, sigma) / sigma
    continuity = torch.stack(rates) + (v * torch.stack(score)).sum(1) + divergence
    return float(torch.cat([tweedie.flatten(), continuity]).detach().abs().max())


def check() -> Finding:
    """Autograd of the log density against the closed form; planted: a denoiser that picks the likeliest component."""
    data = mixture(0, 4, 3, 0.4)

    def decided(x: Tensor, sigma: Tensor | float) -> Tensor:
        return (x - data.means[data.posterior(x, sigma).argmax(1)]) / sigma

    levels = (1.0, 0.9375, 0.625, 0.2)
    residual = worst(*(violation(data, data.velocity, sigma) for sigma in levels))
    planted = min(violation(data, decided, sigma) for sigma in levels)
    return Finding("∇ log p_σ = −ε̂/σ;  ∂_σ log p + v·∇ log p + ∇·v = 0", "mixture of 4 in 3 dimensions, 4 levels, fp64",
                   residual, 1e-11, planted)  # fmt: skip
