"""The gradient of the NFT loss.

Statement. With L = r ⟨(x⁺ − x0)²⟩ + (1 − r) ⟨(x⁻ − x0)²⟩, x⁺ = β x_θ + (1 − β) x_old, x⁻ = (1 + β) x_old − β x_θ and D
elements per sample,

    dL/dx_θ = (2 β / D) [ (2r − 1)(x_old − x0) + β (x_θ − x_old) ],

at θ = old and away from it. So L / β has a policy gradient that does not depend on β.
"""

import torch

from strategies.surrogates.nft import nft_gradient, nft_loss
from theory_checks.statement import Finding, worst


def check() -> Finding:
    """Autograd against the closed form on random tensors in float64; planted: the proximal term left out."""
    random = torch.Generator().manual_seed(0)
    old, target, step = torch.randn(3, 4, 2, 3, 5, 5, generator=random, dtype=torch.float64)
    r = torch.rand(4, generator=random, dtype=torch.float64)
    residual = planted = 0.0
    for beta in (0.1, 1.0, 1.7):
        for distance in (0.0, 0.3):
            current = (old + distance * step).requires_grad_()
            (gradient,) = torch.autograd.grad(nft_loss(current, old, target, r, beta).sum(), current)
            closed = nft_gradient(current.detach(), old, target, r, beta)
            residual = worst(residual, float((gradient - closed).abs().max()))
            planted = max(planted, float((gradient - nft_gradient(old, old, target, r, beta)).abs().max()))
    return Finding("d NFT / dx = (2β/D)[(2r−1)(x_old−x0) + β(x−x_old)]", "β ∈ {.1, 1, 1.7}, θ = old and away, fp64",
                   residual, 1e-14, planted)  # fmt: skip
