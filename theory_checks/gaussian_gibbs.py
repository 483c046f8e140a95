"""The Gaussian surrogate and the Gibbs policy pull a shared prediction in the same direction.

Statement. Let the G branches of a group stand at the same x_σ, be recorded at predictions x̂0_i made under histories of
their own, and step with the same noise ε,

    x'_i = μ_i + std ε,    μ = a x_σ + b v,    s = dμ/dx̂0 = −b/σ    (plain re-noise: s/std = (1 − σ')/σ'),

while the policy predicts x_θ for all of them. With Σ_i A_i = 0 and θ = old

    d/dx_θ [ −(1/G) Σ_i A_i log π_θ(x'_i | x_σ) ]  =  (τ/2) (s/std)² · d/dx_θ [ −(1/G) Σ_i ρ_i A_i ],

ρ_i the ratio of the Gibbs policies of the energies E_i = ⟨(x̂0_i − x_θ)²⟩ at temperature τ, and log π averaged over
elements like E. For velocity energies ⟨(v̂_i − v_θ)²⟩ = E_i/σ² multiply the right side by σ². At τ = 2 the factor is
((1 − σ')/σ')².

Proof. x'_i − μ_θ = s (x̂0_i − x_θ) + std ε, and the noise drops out of Σ_i A_i (x'_i − μ_θ) = s Σ_i A_i (x̂0_i − x_θ).
The Gibbs side is Σ_i (A_i − π_i Σ_j A_j)/(G τ) · dE_i/dx_θ, whose second term vanishes.

So the two differ in the weight of a step alone, as long as branches share their state and their past: in the first step
of the first routed block. With noise of each branch's own the Gaussian side has −(s/std) ⟨A ε⟩ beside it, which is all
of its gradient where branches explored by noise.
"""

import torch
from torch import Tensor

from framework.flow import x0_from_velocity
from framework.kernels import Consistency, FlowGRPO, TransitionKernel
from framework.schedules import FewStepSchedule
from strategies.surrogates.gaussian_kernel import log_density
from strategies.surrogates.gibbs_tve import branch_ratio, log_gibbs, trajectory_velocity_energy
from theory_checks.statement import Finding, worst

BRANCHES, ELEMENTS = 6, (2, 3, 2, 2)
Pair = tuple[float, float]


def gaussian_gradient(
    kernel: TransitionKernel, pair: Pair, x: Tensor, velocity: Tensor, following: Tensor, advantage: Tensor
) -> Tensor:
    """d/dv_θ of −(1/G) Σ A log π for one shared v_θ [C, F, H, W]."""
    asked = velocity.clone().requires_grad_()
    mean = kernel.mean(x, asked, *pair).expand_as(following)
    std = torch.full((BRANCHES, 1), kernel.std(*pair), dtype=x.dtype)
    log_pi = log_density(following[:, None], mean[:, None], std)[:, 0]
    return torch.autograd.grad(-(advantage * log_pi).mean(), asked)[0]


def gibbs_gradient(
    x: Tensor, velocity: Tensor, recorded: Tensor, advantage: Tensor, sigma: float, tau: float, space: str
) -> Tensor:
    """d/dv_θ of −(1/G) Σ ρ A at θ = old, energies of x̂0 or of velocities."""
    asked = velocity.clone().requires_grad_()
    current, goal = (
        x0_from_velocity(x, v, sigma) if space == "x0" else v for v in (asked.expand_as(recorded), recorded)
    )
    energies = trajectory_velocity_energy(current[:, None], goal[:, None])
    groups, branches = torch.zeros(BRANCHES, dtype=torch.long), torch.ones(BRANCHES, dtype=torch.bool)
    log_pi = log_gibbs(energies, tau, groups, branches)
    ratio = branch_ratio(log_pi, log_pi)
    return torch.autograd.grad(-(advantage * ratio).mean(), asked)[0]


def check() -> Finding:
    """Both gradients by autograd on every stochastic step; planted: a noise of each branch's own."""
    random = torch.Generator().manual_seed(0)
    x, velocity, shared = torch.randn(3, *ELEMENTS, generator=random, dtype=torch.float64)
    recorded, own = torch.randn(2, BRANCHES, *ELEMENTS, generator=random, dtype=torch.float64)
    advantage = torch.randn(BRANCHES, generator=random, dtype=torch.float64)
    advantage -= advantage.mean()
    residual, planted = 0.0, float("inf")
    for kernel in (Consistency(), Consistency(0.4), FlowGRPO(0.7)):
        for pair in FewStepSchedule().transitions[:3]:
            sigma, std = pair[0], kernel.std(*pair)
            weight = (kernel.coefficients(*pair)[1] / (sigma * std)) ** 2
            means = torch.stack([kernel.mean(x, v, *pair) for v in recorded])
            together, apart = (
                gaussian_gradient(kernel, pair, x, velocity, means + std * noise, advantage) for noise in (shared, own)
            )
            for space, factor in (("x0", 1.0), ("v", sigma**2)):
                for tau in (0.5, 2.0):
                    gibbs = gibbs_gradient(x, velocity, recorded, advantage, sigma, tau, space)
                    expected = tau / 2 * weight * factor * gibbs
                    residual = worst(residual, float((together - expected).abs().max()))
                    planted = min(planted, float((apart - expected).abs().max()))
    return Finding("Gaussian gradient = (τ/2)(s/std)² × Gibbs gradient, shared x_σ and noise, ΣA = 0, θ = old",
                   "G = 6, three kernels, three steps, x0 and v energies, τ ∈ {.5, 2}, fp64",
                   residual, 1e-14, planted)  # fmt: skip
