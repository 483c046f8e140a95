"""The divergences that the regularizers charge, against those of the distributions they stand for.

Statement. For the categorical policies of G branches Σ_i π_i log(π_i/π_ref,i) is KL(π ‖ π_ref). For two steps of one
kernel, N(a x + b v, std²) and N(a x + b v_ref, std²),

    KL = (b²/(2 std²)) ⟨(v − v_ref)²⟩        averaged over elements,

so the velocity penalty is the Gaussian KL with the step's weight left out: for plain re-noise σ² (1 − σ')²/(2 σ'²),
.0022, .0176 and .125 on the usual grid. It charges all levels alike where the KL charges the last stochastic step over
fifty times the first.
"""

import torch
from torch import Tensor
from torch.distributions import Categorical, Normal, kl_divergence

from framework.flow import velocity_distance
from framework.kernels import Consistency, FlowGRPO
from framework.records import EndpointShift
from framework.schedules import FewStepSchedule
from framework.types import Objective
from strategies.regularizers.branch_kl import branch_kl
from strategies.regularizers.velocity_kl import VelocityKL
from theory_checks.statement import Finding, worst

WEIGHTS = (0.0022, 0.0176, 0.125)
"""σ² (1 − σ')²/(2 σ'²) of the three stochastic steps, rounded."""


def of_branches(logits: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """(our KL of each group, Categorical's) for logits [P, G]; every group is followed by an anchor."""
    tables = [torch.cat([t.log_softmax(1), torch.zeros(len(t), 1, dtype=t.dtype)], 1) for t in (logits, reference)]
    groups = torch.arange(len(logits)).repeat_interleave(tables[0].shape[1])
    ours = branch_kl(tables[0].flatten(), tables[1].flatten(), groups).view(len(logits), -1)[:, 0]
    return ours, kl_divergence(Categorical(logits=logits), Categorical(logits=reference))


def check() -> Finding:
    """Against torch.distributions; planted: the branch KL reversed, and std in place of the variance."""
    random = torch.Generator().manual_seed(9)
    logits, reference = torch.randn(2, 3, 5, generator=random, dtype=torch.float64)
    ours, exact = of_branches(logits, reference)
    residual = float((ours - exact).abs().max())
    planted = float((of_branches(reference, logits)[0] - exact).abs().max())

    x, v, v_ref = torch.randn(3, 4, 3, 2, 2, 2, generator=random, dtype=torch.float64)
    distance = velocity_distance(v, v_ref)
    charged = VelocityKL(0.3).penalty(Objective(distance, {EndpointShift: EndpointShift(distance)}), None)
    for kernel in (Consistency(), Consistency(0.4), FlowGRPO(0.7)):
        for pair, rounded in zip(FewStepSchedule().transitions[:3], WEIGHTS, strict=True):
            std = kernel.std(*pair)
            steps = [Normal(kernel.mean(x, velocity, *pair), std) for velocity in (v, v_ref)]
            divergence = kl_divergence(*steps).flatten(1).mean(1)
            weight = kernel.coefficients(*pair)[1] ** 2 / (2 * std**2)
            residual = worst(residual, float((divergence - weight / 0.3 * charged).abs().max()))
            planted = min(planted, float((divergence - weight * std / 0.3 * charged).abs().max()))
            if kernel == Consistency():
                residual = worst(residual, abs(round(weight, 4) - rounded))
    return Finding("branch KL = categorical KL; velocity KL = (2 std²/b²) × the Gaussian KL of a step",
                   "3 × 5 branches with anchors; three kernels, three steps, fp64",
                   residual, 1e-12, planted)  # fmt: skip
