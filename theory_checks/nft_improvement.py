"""What the NFT loss that is trained improves, state by state.

Statement. Let x0 take finitely many values x_k with preferences r_k, p_k = p(k | x_σ), a = E[r | x_σ], x̄ = E[x0 | x_σ],
x̄⁺ = E[r x0 | x_σ]/a. The expected loss at a state is smallest at x_old + δ*,

    δ* = E[(2r − 1)(x0 − x_old)]/β = (2a/β)(x̄⁺ − x̄) + ((2a − 1)/β)(x̄ − x_old).

1. Conditional improvement. Where x_old = x̄, x̄ + δ* = Σ_k q_k x_k with q_k = p_k (1 + (2/β)(r_k − a)): Σ q = 1 and
   E_q[r] − E_p[r] = (2/β) Var(r | x_σ) ≥ 0, with equality only where the state leaves no preference.
2. First order. Let π'(k) ∝ π(k)(1 + c (r_k − ā)), c = 2/β, ā = E[r]. Then E_π'[r] − E_π[r] = c Var(r), and with x̂0'
   the exact denoiser of π', δ* = (1 + c (a − ā)) (x̂0' − x̄): up to O(β⁻²) the update is the denoiser of the improved
   distribution. π' is a distribution for every r in [0, 1] iff β ≥ 1 where ā = ½.
3. Blur. A few-step student is not the posterior mean of its own samples, x_old ≠ x̄. The second term of δ* pulls it
   there, whatever was rewarded; it vanishes iff a = ½. Centred advantages give a = ½ at σ = 1, where the state knows
   nothing of the sample, and on the average over states at every other level; not state by state.

A claim about networks follows only as far as they can reach the minimiser of every state at once.
"""

import torch
from torch import Tensor

from strategies.surrogates.nft import nft_loss, preference
from theory_checks.statement import Finding, worst
from theory_checks.toy import Mixture, mixture

BETAS = (1.0, 2.0, 10.0)


def centred_preferences(weights: Tensor, seed: int) -> Tensor:
    """r of random rewards [K], centred under the weights as advantages are inside a group."""
    rewards = torch.randn(len(weights), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rewards = rewards - (weights * rewards).sum()
    return preference(rewards / rewards.abs().max(), 1.0)


def minimiser_shift(p: Tensor, r: Tensor, points: Tensor, old: Tensor, beta: float) -> Tensor:
    """δ* [N, D] = Σ_k p_k (2 r_k − 1)(x_k − x_old) / β for posteriors p [N, K] and x_old [N, D]."""
    return torch.einsum("nk,nkd->nd", p * (2 * r - 1), points - old.unsqueeze(1)) / beta


def slope(current: Tensor, old: Tensor, p: Tensor, r: Tensor, points: Tensor, beta: float) -> Tensor:
    """Gradient of E[nft_loss | x_σ] in x_θ, by autograd [N, D]."""
    asked = current.clone().requires_grad_()
    count = len(old)
    each = [nft_loss(asked, old, x.expand_as(old), r_k.expand(count), beta) for x, r_k in zip(points, r, strict=True)]
    return torch.autograd.grad((p.T * torch.stack(each)).sum(), asked)[0]


def violation(data: Mixture, r: Tensor, sigma: float, beta: float, shift=minimiser_shift) -> float:
    """Largest error of the minimiser and of statements 1 to 3 at random states."""
    random = torch.Generator().manual_seed(2)
    points, c, mean_r = data.means, 2 / beta, (data.weights * r).sum()
    x = torch.randn(5, points.shape[1], generator=random, dtype=torch.float64)
    bias = torch.randn(x.shape, generator=random, dtype=torch.float64)
    p, mean = data.posterior(x, sigma), data.x0(x, sigma)
    a = (p * r).sum(1, keepdim=True)

    off = shift(p, r, points, mean + bias, beta)
    errors = [slope(mean + bias + off, mean + bias, p, r, points, beta)]
    better = ((p * r) @ points) / a
    errors.append(off - 2 * a / beta * (better - mean) - (2 * a - 1) / beta * (mean - (mean + bias)))

    on = shift(p, r, points, mean, beta)
    q = p * (1 + c * (r - a))
    gain, spread = (q * r).sum(1) - a.squeeze(1), (p * (r - a).square()).sum(1)
    errors += [mean + on - q @ points, q.sum(1) - 1, gain - c * spread]

    tilted = data.tilted(1 + c * (r - mean_r))
    errors.append(on - (1 + c * (a - mean_r)) * (tilted.x0(x, sigma) - mean))
    gained = (tilted.weights * r).sum() - mean_r - c * (data.weights * (r - mean_r).square()).sum()
    return worst(*(float(error.abs().max()) for error in [*errors, gained]))


def mean_imbalance(data: Mixture, r: Tensor, sigma: float) -> float:
    """|E[2 a(x_σ) − 1]| over the states of a mixture on the line, by quadrature."""
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64).unsqueeze(1)
    a = (data.posterior(x, sigma) * r).sum(1)
    return abs(float((data.log_density(x, sigma).exp() * (2 * a - 1)).sum() * (x[1] - x[0])))


def only_winners(p: Tensor, r: Tensor, points: Tensor, old: Tensor, beta: float) -> Tensor:
    """The minimiser without the negative branch."""
    return torch.einsum("nk,nkd->nd", p * r, points - old.unsqueeze(1)) / beta


def check() -> Finding:
    """Closed forms against autograd and the tilted denoiser; planted: no negative branch, and r off centre."""
    data, line = mixture(1, 6, 3, 0.0), mixture(2, 6, 1, 0.0)
    r, on_line = centred_preferences(data.weights, 3), centred_preferences(line.weights, 4)
    residual, planted = 0.0, float("inf")
    for sigma in (1.0, 0.9375, 0.625, 0.3):
        for beta in BETAS:
            residual = worst(residual, violation(data, r, sigma, beta))
            planted = min(planted, violation(data, r, sigma, beta, only_winners))
        residual = worst(residual, mean_imbalance(line, on_line, sigma))
        planted = min(planted, mean_imbalance(line, (on_line + 0.1).clamp(0, 1), sigma))
    return Finding("NFT moves x̄ to E_q[x0], E_q[r] − a = (2/β) Var(r|x_σ); blur ∝ 2a − 1",
                   "6 points in 3 dimensions and on a line, β ∈ {1, 2, 10}, 4 levels, fp64",
                   residual, 1e-12, planted)  # fmt: skip
