"""The branch policy is the Gibbs distribution of its energies, and the branch KL is a difference of free energies.

Statement. With F(p) = Σ_i p_i E_i + τ Σ_i p_i log p_i over the distributions p on a group's branches,
π_i = exp(−E_i/τ)/Z and Z = Σ_j exp(−E_j/τ),

    Σ_i π_i = 1,        F(π) = −τ log Z,        F(p) − F(π) = τ KL(p ‖ π) ≥ 0,

so π is the only minimiser of F. A constant added to all energies adds itself to F and leaves π alone: drift that all
branches share is seen neither by π nor by the KL.
"""

import torch
from torch import Tensor

from strategies.regularizers.branch_kl import branch_kl
from strategies.surrogates.gibbs_tve import log_gibbs
from theory_checks.statement import Finding, worst


def free_energy(log_p: Tensor, energies: Tensor, tau: float) -> Tensor:
    """F(p) = ⟨E⟩_p − τ H(p)."""
    return (log_p.exp() * (energies + tau * log_p)).sum()


def violation(policy: Tensor, shifted: Tensor, energies: Tensor, other: Tensor, tau: float) -> float:
    """Largest error of the three identities and of the shift, for log π, log π of shifted energies, and any log p."""
    least = free_energy(policy, energies, tau)
    divergence = branch_kl(other, policy, torch.zeros(len(policy), dtype=torch.long))[0]
    errors = (
        policy.exp().sum() - 1,
        least + tau * (-energies / tau).logsumexp(0),
        free_energy(other, energies, tau) - least - tau * divergence,
        (shifted - policy).abs().max(),
    )
    return worst(*(float(error.abs()) for error in errors))


def check() -> Finding:
    """Random energies in float64; planted: the temperature left out of π."""
    random = torch.Generator().manual_seed(3)
    group, branches = torch.zeros(8, dtype=torch.long), torch.ones(8, dtype=torch.bool)
    residual = planted = 0.0
    for tau in (0.1, 0.5, 2.0):
        energies = torch.rand(8, 1, generator=random, dtype=torch.float64)
        other = torch.randn(8, generator=random, dtype=torch.float64).log_softmax(0)
        right, wrong = ([log_gibbs(e, t, group, branches) for e in (energies, energies + 3)] for t in (tau, 1.0))
        residual = worst(residual, violation(right[0], right[1], energies.squeeze(1), other, tau))
        planted = max(planted, violation(wrong[0], wrong[1], energies.squeeze(1), other, tau))
    return Finding("Σπ = 1, F(π) = −τ log Z, F(p) − F(π) = τ KL(p ‖ π)", "G = 8, τ ∈ {.1, .5, 2}, fp64",
                   residual, 1e-13, planted)  # fmt: skip
