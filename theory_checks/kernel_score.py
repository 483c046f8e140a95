"""The score of a sampler step in the network's prediction.

Statement. For a step N(μ, std² I) with μ = a x_σ + b v and s = dμ/dx̂0 = −b/σ, per element (log π is a mean over D),

    D ∇ log π(x' | x_σ) = s (x' − μ)/std²        in x̂0, which on the policy's own step x' = μ + std ε is (s/std) ε,

for plain re-noise ((1 − σ')/σ') ε: .0667, .2 and .6 on the usual grid, nine times more in the last stochastic step than
in the first. The regression ⟨(x̂0 − sg[x̂0 − g])²⟩ with g = −A s (x' − μ)/(2 std²) has the gradient −A ∇ log π.
"""

import torch
from torch import Tensor

from framework.flow import x0_from_velocity
from framework.kernels import Consistency, FlowGRPO, TransitionKernel
from framework.schedules import FewStepSchedule
from strategies.surrogates.gaussian_kernel import log_density, score_pull, x0_regression
from theory_checks.statement import Finding, worst

CLIPS, ELEMENTS = 4, (2, 1, 2, 2)
TABLE = (0.0667, 0.2, 0.6)
"""(1 − σ')/σ' of the three stochastic steps of the default grid, rounded."""


def scores(kernel: TransitionKernel, pair: tuple[float, float], x: Tensor, x0: Tensor, following: Tensor) -> Tensor:
    """D ∇ log π in x̂0 by autograd, all tensors [CLIPS, 1, *ELEMENTS]."""
    asked = x0.clone().requires_grad_()
    mean = kernel.mean(x, (x - asked) / pair[0], *pair)
    std = torch.full(x.shape[:2], kernel.std(*pair), dtype=x.dtype)
    (slope,) = torch.autograd.grad(log_density(following, mean, std).sum(), asked)
    return slope * x[0, 0].numel()


def check() -> Finding:
    """Autograd, the regression and the table; planted: the level of the state in place of the next one."""
    random = torch.Generator().manual_seed(8)
    x, velocity, noise = torch.randn(3, CLIPS, 1, *ELEMENTS, generator=random, dtype=torch.float64)
    advantage = torch.randn(CLIPS, generator=random, dtype=torch.float64)
    residual, planted = 0.0, float("inf")
    for kernel in (Consistency(), Consistency(0.4), FlowGRPO(0.7)):
        for pair, rounded in zip(FewStepSchedule().transitions[:3], TABLE, strict=True):
            sigma = pair[0]
            x0, std = x0_from_velocity(x, velocity, sigma), kernel.std(*pair)
            slope = -kernel.coefficients(*pair)[1] / sigma
            mean = kernel.mean(x, velocity, *pair)
            found = scores(kernel, pair, x, x0, mean + std * noise)
            residual = worst(residual, float((found - slope / std * noise).abs().max()))

            asked = x0.clone().requires_grad_()
            full = torch.full((CLIPS, 1), std, dtype=x.dtype)
            pull = score_pull(advantage, mean + std * noise, mean, torch.full_like(full, slope), full)
            regression = x0_regression(asked, pull).flatten(2).mean(2).sum()
            (regressed,) = torch.autograd.grad(regression, asked)
            along = -advantage.view(-1, 1, 1, 1, 1, 1) * found / x[0, 0].numel()
            residual = worst(residual, float((regressed - along).abs().max()))
            if kernel == Consistency():
                residual = worst(residual, abs(round(slope / std, 4) - rounded))
                shifted = (1 - sigma) / sigma * noise
                planted = min(planted, float((found - shifted).abs().max()))
    return Finding("D ∇ log π = s (x' − μ)/std² in x̂0, (1−σ')/σ' · ε for re-noise", "three kernels, three steps, fp64",
                   residual, 1e-12, planted)  # fmt: skip
