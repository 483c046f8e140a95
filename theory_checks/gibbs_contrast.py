"""The gradient of the Gibbs policy contrasts branches by their reward.

Statement. With energies E_i(θ), π = softmax(−E/τ) over G branches and rewards R,

    ∇ Σ_i π_i R_i = −(1/τ) Cov_π(R, ∇E) = −(1/2τ) Σ_ij π_i π_j (R_i − R_j)(∇E_i − ∇E_j),

and at θ = old with Σ_i A_i = 0 the clipped loss has

    ∇L = (1/(G τ)) Σ_i A_i ∇E_i = (1/(2 G² τ)) Σ_ij (A_i − A_j)(∇E_i − ∇E_j).

With E_i = ⟨(v̂_i − v_θ)²⟩ over D elements and one prediction v_θ for all branches it is −(2/(G τ D)) Σ_i A_i v̂_i: the
policy's own velocity drops out, better branches attract and worse ones repel, π and the reward's constant are gone, and
τ is a learning rate. A constant added to all R changes nothing in any of them.
"""

import torch
from torch import Tensor

from strategies.surrogates.gibbs_tve import branch_ratio, clipped_surrogate, log_gibbs, trajectory_velocity_energy
from theory_checks.statement import Finding, worst

BRANCHES, WIDTH = 7, 6
GROUP = torch.zeros(BRANCHES, dtype=torch.long), torch.ones(BRANCHES, dtype=torch.bool)


def energies(weights: Tensor, states: Tensor, recorded: Tensor) -> Tensor:
    """E [G, 1] of the one-layer network v_θ(x) = tanh(x W) W^T at the states [G, WIDTH]."""
    velocity = (states @ weights).tanh() @ weights.T
    return trajectory_velocity_energy(velocity[:, None], recorded[:, None])


def pairwise(scores: Tensor, slopes: Tensor, weights: Tensor) -> Tensor:
    """½ Σ_ij w_i w_j (s_i − s_j)(g_i − g_j) for slopes g [G, …]."""
    pairs = weights[:, None] * weights * (scores[:, None] - scores)
    return torch.einsum("ij,ijab->ab", pairs, slopes[:, None] - slopes) / 2


def check() -> Finding:
    """Autograd through a small network against the three forms; planted: the mean over π left out of the contrast."""
    random = torch.Generator().manual_seed(6)
    weights = torch.randn(WIDTH, WIDTH, generator=random, dtype=torch.float64, requires_grad=True)
    states, recorded = torch.randn(2, BRANCHES, WIDTH, generator=random, dtype=torch.float64)
    rewards = torch.randn(BRANCHES, generator=random, dtype=torch.float64) + 2
    advantage = rewards - rewards.mean()
    energy = energies(weights, states, recorded)
    slopes = torch.stack([torch.autograd.grad(e, weights, retain_graph=True)[0] for e in energy.squeeze(1)])
    even = torch.full((BRANCHES,), 1 / BRANCHES, dtype=torch.float64)
    residual, planted = 0.0, float("inf")
    for tau in (0.3, 1.0, 4.0):
        log_pi = log_gibbs(energy, tau, *GROUP)
        pi = log_pi.detach().exp()
        (of_reward,) = torch.autograd.grad((log_pi.exp() * rewards).sum(), weights, retain_graph=True)
        covariance = torch.einsum("i,iab->ab", pi * (rewards - pi @ rewards), slopes)
        ratio = branch_ratio(log_pi, log_pi)
        loss = -clipped_surrogate(ratio, advantage, 0.9, 1.2).mean()
        (of_loss,) = torch.autograd.grad(loss, weights, retain_graph=True)

        shared = torch.randn(WIDTH, generator=random, dtype=torch.float64, requires_grad=True)
        close = trajectory_velocity_energy(shared.expand(BRANCHES, 1, WIDTH), recorded[:, None])
        at_once = log_gibbs(close, tau, *GROUP)
        surrogate = -clipped_surrogate(branch_ratio(at_once, at_once), advantage, 0.9, 1.2).mean()
        (of_shared,) = torch.autograd.grad(surrogate, shared)

        errors = (
            of_reward + covariance / tau,
            of_reward + pairwise(rewards, slopes, pi) / tau,
            of_loss - torch.einsum("i,iab->ab", advantage, slopes) / (BRANCHES * tau),
            of_loss - pairwise(advantage, slopes, even) / tau,
            of_shared + 2 / (BRANCHES * tau * WIDTH) * advantage @ recorded,
        )
        residual = worst(residual, *(float(error.abs().max()) for error in errors))
        uncentred = torch.einsum("i,iab->ab", pi * rewards, slopes)
        planted = min(planted, float((of_reward + uncentred / tau).abs().max()))
    return Finding("∇Σπ_i R_i = −Cov_π(R, ∇E)/τ; at θ = old ∇L = Σ A_i ∇E_i/(Gτ)",
                   "G = 7, a network of 36 weights, τ ∈ {.3, 1, 4}, fp64", residual, 1e-12, planted)  # fmt: skip
