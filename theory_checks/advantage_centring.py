"""Why advantages are centred inside the prompt.

Statement. Let a = E[r] be the mean preference of a group, x̄ its mean endpoint and x̄⁺ = E[r x0]/a. The minimiser of the
NFT loss moves x_old by

    δ* = (2a/β)(x̄⁺ − x̄) + ((2a − 1)/β)(x̄ − x_old).

The second term pulls towards the mean of the samples whatever the reward says, i.e. towards blur; it vanishes iff
a = ½, which centred and symmetrically clipped advantages give.
"""

import torch

from framework.advantages import group_relative
from strategies.surrogates.nft import preference
from theory_checks.statement import Finding


def shift(r: torch.Tensor, x0: torch.Tensor, old: torch.Tensor, beta: float) -> torch.Tensor:
    """δ* = E[(2r − 1)(x0 − x_old)] / β, the minimiser found by setting the closed-form gradient to zero."""
    return ((2 * r - 1)[:, None] * (x0 - old)).mean(0) / beta


def check() -> Finding:
    """δ* against its two terms, and the second term under centred advantages; planted: advantages off centre."""
    random = torch.Generator().manual_seed(1)
    x0 = torch.randn(8, 20, generator=random, dtype=torch.float64)
    old = torch.randn(20, generator=random, dtype=torch.float64)
    rewards = torch.rand(8, generator=random, dtype=torch.float64)
    advantage = group_relative(rewards, torch.zeros(8, dtype=torch.long), 1e-8)

    def violation(values: torch.Tensor) -> float:
        r = preference(values, 5.0)
        a, mean, better = r.mean(), x0.mean(0), (r[:, None] * x0).mean(0) / r.mean()
        contrast = 2 * a * (better - mean)
        blur = (2 * a - 1) * (mean - old)
        split = (shift(r, x0, old, 1.0) - contrast - blur).abs().max()
        return float(split + blur.abs().max())

    return Finding("δ* = 2a(x̄⁺−x̄)/β, the blur term gone, iff advantages are centred", "G = 8, 20 dimensions, fp64",
                   violation(advantage), 1e-12, violation(advantage + 0.5))  # fmt: skip
