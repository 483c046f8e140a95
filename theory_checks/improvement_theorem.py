"""Which loss the coefficient of Astrolabe's improvement theorem belongs to, and that it is not the one that is trained.

Statement. With a = E[r | x_σ], x̄⁺ = E[r x0 | x_σ]/a and x̄⁻ = E[(1 − r) x0 | x_σ]/(1 − a), the loss

    L₁ = E⁺ ‖x − x0‖² + b E⁻ ‖x − x0‖²

(the winners' posterior and the losers', both attracting) is smallest at x̄ + κ (x̄⁺ − x̄) with

    κ = [1 − a (1 + b)] / [(1 + b)(1 − a)].

That is the coefficient of the paper's Theorem 1 (2603.17051). L₁ is the loss that has it as a minimiser; that it is the
one meant there is our reading. κ > 0 iff a (1 + b) < 1, and κ = 0 at a = ½, b = 1: no improvement at all where
advantages are centred and β = 1. The loss that is trained mixes the losers in with the opposite sign, and moves by
(2a/β)(x̄⁺ − x̄) from x_old = x̄: never backwards, and by 1/β at a = ½ (`nft_improvement`).
"""

import torch
from torch import Tensor

from theory_checks.nft_improvement import slope
from theory_checks.statement import Finding, worst
from theory_checks.toy import mixture


def coefficient(a: Tensor, b: float) -> Tensor:
    """κ."""
    return (1 - a * (1 + b)) / ((1 + b) * (1 - a))


def two_sided_slope(at: Tensor, p: Tensor, r: Tensor, points: Tensor, b: float) -> Tensor:
    """Gradient of L₁ at states [N, D], by autograd."""
    asked = at.clone().requires_grad_()
    squares = (asked.unsqueeze(1) - points).square().sum(2)
    winners, losers = (weight / weight.sum(1, keepdim=True) for weight in (p * r, p * (1 - r)))
    return torch.autograd.grad(((winners + b * losers) * squares).sum(), asked)[0]


def check() -> Finding:
    """Both minimisers by their zero gradient, κ at (½, 1); planted: κ taken for the trained loss's coefficient."""
    random = torch.Generator().manual_seed(5)
    data = mixture(3, 6, 3, 0.0)
    x = torch.randn(5, 3, generator=random, dtype=torch.float64)
    r = torch.rand(6, generator=random, dtype=torch.float64)
    residual, planted = float(coefficient(torch.tensor(0.5), 1.0).abs()), float("inf")
    for sigma in (1.0, 0.8, 0.4):
        p, mean = data.posterior(x, sigma), data.x0(x, sigma)
        a = (p * r).sum(1, keepdim=True)
        towards = (p * r) @ data.means / a - mean
        for b in (0.3, 1.0, 2.0):
            kappa = coefficient(a, b)
            residual = worst(residual, float(two_sided_slope(mean + kappa * towards, p, r, data.means, b).abs().max()))
            beta = b  # one weight of the losers in either loss
            trained = slope(mean + 2 * a / beta * towards, mean, p, r, data.means, beta)
            misread = slope(mean + kappa * towards, mean, p, r, data.means, beta)
            residual = worst(residual, float(trained.abs().max()))
            planted = min(planted, float(misread.abs().max()))
    return Finding("Theorem 1's κ minimises E⁺‖x−x0‖² + bE⁻‖x−x0‖²; the trained loss has 2a/β",
                   "6 points in 3 dimensions, x_old = x̄, b ∈ {.3, 1, 2}, 3 levels, fp64",
                   residual, 1e-12, planted)  # fmt: skip
