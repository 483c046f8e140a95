"""Where the clipped ratio of branch policies stops pulling.

Statement. With π_i = exp(−E_i/τ)/Z over G branches, ρ_i = π_i/π_old(i) and
L = −(1/G) Σ_i min(ρ_i A_i, clip(ρ_i, 1 − ε_low, 1 + ε_high) A_i),

    dL/dE_i = (1/(G τ)) (c_i − π_i Σ_j c_j),     c_i = 0      where A_i > 0 and ρ_i > 1 + ε_high,
                                                 c_i = 0      where A_i < 0 and ρ_i < 1 − ε_low,
                                                 c_i = ρ_i A_i elsewhere,

and Σ_i dL/dE_i = 0: nothing pulls on drift that all branches share. A branch whose own term is flat is still moved,
through the normaliser, by those that are not.
"""

import itertools
import math

import torch

from strategies.surrogates.gibbs_tve import branch_ratio, clipped_surrogate, energy_gradient, log_gibbs
from theory_checks.statement import Finding, worst

BOUNDS = 0.9, 1.2


def check() -> Finding:
    """Autograd against the closed form where all six cases of (sign, region) occur; planted: no clip in c."""
    random = torch.Generator().manual_seed(4)
    size = 12
    group, branches = torch.zeros(size, dtype=torch.long), torch.ones(size, dtype=torch.bool)
    residual = planted = 0.0
    for tau, away in itertools.product((0.1, 0.5, 2.0), (0.0, 0.5)):
        old, step = torch.randn(2, size, 1, generator=random, dtype=torch.float64)
        advantage = torch.randn(size, generator=random, dtype=torch.float64)
        energies = (old + away * tau * step).requires_grad_()
        log_pi, log_old = (log_gibbs(e, tau, group, branches) for e in (energies, old))
        ratio = branch_ratio(log_pi, log_old)
        (slope,) = torch.autograd.grad(-clipped_surrogate(ratio, advantage, *BOUNDS).mean(), energies)

        log_pi, ratio = log_pi.detach(), ratio.detach()
        clipped = energy_gradient(log_pi, ratio, advantage, *BOUNDS, tau)
        unclipped = energy_gradient(log_pi, ratio, advantage, 0.0, math.inf, tau)
        residual = worst(residual, float((slope.squeeze(1) - clipped).abs().max() + slope.sum().abs()))
        planted = max(planted, float((slope.squeeze(1) - unclipped).abs().max()))
    return Finding("dL/dE_i = (c_i − π_i Σc)/(Gτ), c = 0 where clipped; Σ_i = 0",
                   "G = 12, τ ∈ {.1, .5, 2}, θ = old and away, fp64", residual, 1e-13, planted)  # fmt: skip
