"""Why advantages are centred inside the prompt, and what that does not do.

Statement. At a state x_σ let a = E[r | x_σ] be the mean preference, x̄ = E[x0 | x_σ] and x̄⁺ = E[r x0 | x_σ]/a. The
minimiser of the NFT loss moves x_old by

    δ* = (2a/β)(x̄⁺ − x̄) + ((2a − 1)/β)(x̄ − x_old).

The second term pulls towards the mean of the samples whatever the reward says, i.e. towards blur; it vanishes iff a = ½
or x_old = x̄. Let advantages be centred over the group and none of them be clipped, so that E[r] = ½. Then

1. at σ = 1 the state knows nothing of the sample, a = E[r] = ½, and the term is 0 at every state;
2. at σ < 1 its coefficient is 0 on average, E[2a − 1] = 2 E[r] − 1 = 0, and not at single states: there the term
   remains, and since it is correlated with x̄ − x_old it need not average to 0 either.
"""

import torch
from torch import Tensor

from framework.advantages import group_relative
from strategies.surrogates.nft import preference
from theory_checks.nft_improvement import mean_imbalance, minimiser_shift
from theory_checks.statement import Finding, worst
from theory_checks.toy import Mixture

LIMIT = 5.0
BELOW = 0.625
"""A level at which states know something of the sample."""


def terms(p: Tensor, r: Tensor, x0: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """(contrast, blur) of β δ* [N, D] for posteriors p [N, K] of a group's endpoints [K, D] and x_old [N, D]."""
    a, mean = (p * r).sum(1, keepdim=True), p @ x0
    return 2 * a * ((p * r) @ x0 / a - mean), (2 * a - 1) * (mean - old)


def check() -> Finding:
    """δ* against its terms, statements 1 and 2; planted: advantages off centre, and statement 1 claimed at σ < 1."""
    random = torch.Generator().manual_seed(1)
    x0, old, x = (torch.randn(rows, 20, generator=random, dtype=torch.float64) for rows in (8, 5, 5))
    rewards = torch.rand(8, generator=random, dtype=torch.float64)
    advantage = group_relative(rewards, torch.zeros(8, dtype=torch.long), 1e-8)
    alike = torch.full((8,), 1 / 8, dtype=torch.float64)
    group, line = (Mixture(alike, points, torch.zeros_like(alike)) for points in (x0, x0[:, :1]))

    def violation(values: Tensor, level: float = 1.0) -> float:
        """Of the split at both levels, of statement 1 at ``level``, and of statement 2."""
        r = preference(values, LIMIT)
        errors = []
        for sigma in (1.0, BELOW):
            p = group.posterior(x, sigma)
            contrast, blur = terms(p, r, x0, old)
            errors.append(float((minimiser_shift(p, r, x0, old, 1.0) - contrast - blur).abs().max()))
            errors += [float(blur.abs().max())] if sigma == level else []
        return worst(*errors, mean_imbalance(line, r, BELOW))

    planted = min(violation(advantage + 0.5), violation(advantage, BELOW))
    return Finding(
        "δ* = 2a(x̄⁺−x̄)/β + (2a−1)(x̄−x_old)/β; centred: a = ½ at σ = 1, E[a] = ½ over states of any σ",
        "G = 8, 20 dimensions and a line, σ ∈ {1, .625}, fp64", violation(advantage), 1e-12, planted,
    )  # fmt: skip
