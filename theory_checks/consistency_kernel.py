"""The re-noise step of a few-step student as a Gaussian policy.

Statement. If x̂0 = x0 exactly, the transition N((1 − σ') x̂0 + √(σ'² − s²) ε̂, s² I), s = σ' sin(η π/2), maps the marginal
x_σ = (1 − σ) x0 + σ ε to the marginal at σ', for every η ∈ (0, 1]: mean (1 − σ') x0 and standard deviation σ'.
"""

import math

import torch

from framework.flow import add_noise, velocity_target
from framework.kernels import Consistency
from framework.schedules import FewStepSchedule
from theory_checks.statement import Finding, worst


def check() -> Finding:
    """Exact first and second moments through the kernel's linear map; planted: a std of η σ' instead."""
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    residual = planted = 0.0
    for eta in (0.2, 0.5, 1.0):
        kernel = Consistency(eta)
        for sigma, sigma_next in FewStepSchedule().transitions:
            # the mean is linear in (x0, ε): probe it at the unit vectors
            from_data = kernel.mean(add_noise(one, zero, one * sigma), velocity_target(one, zero), sigma, sigma_next)
            from_noise = kernel.mean(add_noise(zero, one, one * sigma), velocity_target(zero, one), sigma, sigma_next)
            deviation = math.hypot(float(from_noise), kernel.std(sigma, sigma_next))
            wrong = math.hypot(float(from_noise), eta * sigma_next)
            residual = worst(residual, abs(float(from_data) - (1 - sigma_next)), abs(deviation - sigma_next))
            planted = max(planted, abs(wrong - sigma_next))
    return Finding("re-noise keeps the marginals N((1−σ')x0, σ'²)", "η ∈ {.2, .5, 1}, the four-step grid, fp64",
                   residual, 1e-12, planted)  # fmt: skip
