"""The KL of two sampler steps.

Statement. Policy and reference step with the same std, so per element KL(N(μ, std²) ‖ N(μ_ref, std²)) =
(μ − μ_ref)² / (2 std²); for plain re-noise that is

    (1 − σ')² (x̂0 − x̂0_ref)² / (2 σ'²),

.0022, .0201 and .180 times (x̂0 − x̂0_ref)² on the steps of the integer grid 1000, 938, 833, 625. Dividing by g² in place
of std² = g² D, as Flow-GRPO's release does, makes it smaller by D.
"""

import torch
from torch.distributions import Normal, kl_divergence

from framework.flow import x0_from_velocity
from framework.kernels import Consistency, EulerMaruyama, FlowGRPO
from framework.schedules import FewStepSchedule
from strategies.surrogates.gaussian_kernel import kernel_divergence
from theory_checks.statement import Finding, worst

COEFFICIENTS = (0.0022, 0.0201, 0.1800)
"""Of RAVEN's three stochastic steps, rounded."""


def check() -> Finding:
    """Against torch.distributions, the form in x̂0 and the coefficients; planted: g² in place of the step's variance."""
    random = torch.Generator().manual_seed(0)
    x, velocity, reference = torch.randn(3, 4, 1, 2, 3, 2, 2, generator=random, dtype=torch.float64)
    residual, planted = 0.0, float("inf")
    grid = FewStepSchedule(integer_timesteps=True).transitions[:3]
    for kernel in (Consistency(), Consistency(0.4), FlowGRPO(0.7)):
        for pair, coefficient in zip(grid, COEFFICIENTS, strict=True):
            mean, towards = (kernel.mean(x, v, *pair) for v in (velocity, reference))
            std = torch.full((4, 1), kernel.std(*pair), dtype=x.dtype)
            closed = kernel_divergence(mean, towards, std)
            exact = kl_divergence(Normal(mean, kernel.std(*pair)), Normal(towards, kernel.std(*pair)))
            residual = worst(residual, float((closed - exact.flatten(2).mean(2)).abs().max() / exact.mean()))
            if kernel == Consistency():
                moved = (x0_from_velocity(x, velocity, pair[0]) - x0_from_velocity(x, reference, pair[0])).square()
                in_x0 = ((1 - pair[1]) / pair[1]) ** 2 / 2 * moved.flatten(2).mean(2)
                residual = worst(residual, float((closed - in_x0).abs().max() / exact.mean()))
                rounded = abs(round(((1 - pair[1]) / pair[1]) ** 2 / 2, 4) - coefficient)
                residual = worst(residual, rounded)
            if isinstance(kernel, EulerMaruyama):
                released = kernel_divergence(mean, towards, std * 0 + kernel.squared_diffusion(*pair) ** 0.5)
                planted = min(planted, float((released - closed).abs().max() / closed.mean()))
    return Finding("KL of a step = ⟨(μ − μ_ref)²⟩ / (2 std²)", "three kernels, RAVEN's grid, fp64",
                   residual, 1e-12, planted)  # fmt: skip
