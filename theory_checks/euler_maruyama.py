"""The stochastic sampler of Flow-GRPO and DanceGRPO has the marginals of the ODE.

Statement. For any diffusion g(σ) the SDE whose Euler–Maruyama step is

    x_{σ−D} = x − D v − (g² D / 2σ) ε̂ + g √D · noise,    v = E[ε − x0 | x_σ = x],  ε̂ = E[ε | x_σ = x]

keeps the marginals of x_σ = (1 − σ) x0 + σ ε: −ε̂/σ is the score of x_σ, and the drift (g²/2) × score undoes the
spread of the noise. So in one step mean and variance change at the rate of the path's own: the error over D vanishes
with D.

Instance. x0 ~ N(m, c²), where v is linear in x and mean and variance of a step are exact numbers. At σ = 1 g is
infinite and both releases replace it by something that does not vanish with D; there the statement says nothing.
"""

import math

from framework.kernels import DanceGRPO, EulerMaruyama, FlowGRPO, RavenEulerMaruyama
from theory_checks.statement import Finding, worst

MEAN, SPREAD = 0.7, 0.4
"""m and c of the data."""


def path(sigma: float) -> tuple[float, float]:
    """Mean and variance of x_σ."""
    return (1 - sigma) * MEAN, (1 - sigma) ** 2 * SPREAD**2 + sigma**2


def velocity(sigma: float) -> tuple[float, float]:
    """(k, d) of v(x) = k x + d."""
    mean, variance = path(sigma)
    slope = (sigma - (1 - sigma) * SPREAD**2) / variance
    return slope, -MEAN - slope * mean


def after(kernel: EulerMaruyama, sigma: float, sigma_next: float) -> tuple[float, float]:
    """Mean and variance of the next state, from those of the path, through the kernel's linear map."""
    (of_x, of_velocity), (slope, offset) = kernel.coefficients(sigma, sigma_next), velocity(sigma)
    mean, variance = path(sigma)
    gain = of_x + of_velocity * slope
    return gain * mean + of_velocity * offset, gain**2 * variance + kernel.std(sigma, sigma_next) ** 2


def rate(kernel: EulerMaruyama, sigma: float, drop: float) -> float:
    """How fast mean or variance leave the path, per unit of σ."""
    reached, wanted = after(kernel, sigma, sigma - drop), path(sigma - drop)
    return worst(*(abs(r - w) for r, w in zip(reached, wanted, strict=True))) / drop


def without_score(kernel: EulerMaruyama, sigma: float, drop: float) -> float:
    """The same when noise is added to the plain ODE step."""
    (slope, _), variance = velocity(sigma), path(sigma)[1]
    reached = (1 - drop * slope) ** 2 * variance + kernel.std(sigma, sigma - drop) ** 2
    return abs(reached - path(sigma - drop)[1]) / drop


def check() -> Finding:
    """The rate at D = 1e-6 and its order; planted: the step without its score term."""
    residual, planted = 0.0, math.inf
    for kernel in (FlowGRPO(0.7), RavenEulerMaruyama(0.3), DanceGRPO(0.3)):
        for sigma in (0.95, 0.8, 0.5, 0.2):
            residual = worst(residual, rate(kernel, sigma, 1e-6))
            # first order: a tenth of the step has a tenth of the rate
            residual = worst(residual, abs(rate(kernel, sigma, 1e-4) / rate(kernel, sigma, 1e-3) - 0.1) / 100)
            planted = min(planted, without_score(kernel, sigma, 1e-6))
    return Finding("an Euler–Maruyama step keeps the path's marginals as D → 0", "x0 ~ N(.7, .4²), three kernels, fp64",
                   residual, 1e-4, planted)  # fmt: skip
