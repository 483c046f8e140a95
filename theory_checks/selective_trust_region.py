"""What a penalty on flagged samples alone guarantees, and what it leaves open.

Statement. Let S be the flagged set, p the policy, q the reference on a finite space, φ(s, t) = s log(s/t) − s + t ≥ 0,
and D_S = Σ_{x ∈ S} φ(p(x), q(x)), the part of KL(p ‖ q) = D_S + D_{S^c} that lies on S.

1. Price. A penalty λ Σ_i M_i d_i added to a policy loss L gives, wherever the sum is no larger than at the reference,
   Σ_i M_i d_i ≤ (L(ref) − L(θ)) / λ; clips with M_i = 0 have exactly the gradient that they have without a penalty.
2. Bound on the flagged set. D_S ≥ φ(p(S), q(S)) ≥ (p(S) − q(S))² / (2 max(p(S), q(S))), so

       |p(S) − q(S)| ≤ √(2 max(p(S), q(S)) D_S) ≤ √(2 D_S),        Σ_S |p − q| ≤ √(2 D_S Σ_S max(p, q)):

   a Pinsker bound that needs the divergence on S alone; better than Pinsker's √(KL/2) where both masses are under ¼.
3. Nothing outside. Moving mass inside the complement leaves D_S = 0 and makes KL(p ‖ q) as large as one likes.

Astrolabe's Theorem 2 (2603.17051) claims a trust region for its selective KL; this is the part that we can prove, on
distributions. What is trained is d_i = ⟨(v_θ − v_ref)²⟩ at clips of the behaviour policy, which is such a divergence
for Gaussian steps (`closed_form_kls`), of the conditional at visited states, not of the distribution of videos.
"""

import torch
from torch import Tensor

from framework.flow import velocity_distance
from framework.records import EndpointShift
from framework.types import Objective, Scores
from strategies.regularizers.selective_kl import ConstantRatio, SelectiveKL
from theory_checks.statement import Finding, worst


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """φ(p, q) by element."""
    return p * (p / q).log() - p + q


def flagged(count: int, seed: int) -> tuple[SelectiveKL, Tensor]:
    """(the regularizer, its mask as 0 and 1 [count]) for random scores of one prompt."""
    random = torch.Generator().manual_seed(seed)
    scores = Scores.of({name: torch.randn(count, generator=random) for name in ("main", "other")})
    selective = SelectiveKL("main", ("other",), weight=0.7, ratio=ConstantRatio(0.5))
    return selective, selective.prepare(scores, torch.zeros(count, dtype=torch.long)).per_clip.double()


def excess(p: Tensor, q: Tensor, inside: Tensor, penalised: Tensor, share: float = 1.0) -> float:
    """By how much the bounds of statement 2 for the set ``inside`` fail, given the divergence on ``penalised``.

    share: what part of that divergence is counted; less than all of it must be refuted.
    """
    part = share * divergence(p, q)[penalised].sum()
    heavier = torch.maximum(p[inside].sum(), q[inside].sum())
    change = (p[inside].sum() - q[inside].sum()).abs()
    each = (p - q)[inside].abs().sum()
    slack = (
        change - (2 * heavier * part).sqrt(),
        each - (2 * part * torch.maximum(p, q)[inside].sum()).sqrt(),
        divergence(p[inside].sum(), q[inside].sum()) - part,
    )
    return worst(0.0, *(float(s) for s in slack))


def price(seed: int) -> tuple[float, float]:
    """(violation of statement 1 after a descent, change of the gradient of unflagged clips)."""
    selective, mask = flagged(12, seed)
    random = torch.Generator().manual_seed(seed + 1)
    reference, goal = torch.randn(2, 12, 5, generator=random, dtype=torch.float64)
    current = reference.clone().requires_grad_()

    def terms() -> tuple[Tensor, Tensor]:
        loss, distance = (current - goal).square().mean(1), velocity_distance(current, reference)
        return loss, selective.penalty(Objective(loss, {EndpointShift: EndpointShift(distance)}), mask)

    for _ in range(40):
        loss, penalty = terms()
        (gradient,) = torch.autograd.grad((loss + penalty).sum(), current)
        current = (current - 0.3 * gradient).detach().requires_grad_()
    loss, penalty = terms()
    paid = (mask * velocity_distance(current, reference)).sum().detach()
    earned = ((reference - goal).square().mean(1) - loss.detach()).sum() / selective.weight
    (with_penalty,) = torch.autograd.grad((loss + penalty).sum(), current, retain_graph=True)
    (without,) = torch.autograd.grad(loss.sum(), current)
    outside = (with_penalty - without)[mask == 0].abs().max()
    return worst(0.0, float(paid - earned)), float(outside)


def check() -> Finding:
    """The mask of `SelectiveKL` on random distributions; planted: the mask inverted, and half of the divergence."""
    residual, planted = 0.0, [0.0, 0.0]
    for seed in range(20):
        random = torch.Generator().manual_seed(100 + seed)
        _, mask = flagged(12, seed)
        inside = mask > 0
        q, p = (3 * torch.randn(2, 12, generator=random, dtype=torch.float64)).softmax(1)
        residual = worst(residual, excess(p, q, inside, inside), *price(seed))
        # statement 3: as the reference on the flagged set, all other mass on one point
        elsewhere = torch.where(inside, q, 1e-12)
        elsewhere[int((~inside).nonzero()[0])] += 1 - elsewhere.sum()
        whole = float(divergence(elsewhere, q).sum())
        residual = worst(residual, float(divergence(elsewhere, q)[inside].abs().sum()), 0.1 - whole)
        # the flagged set made a tenth likelier, all else in proportion: where the bound is nearly reached
        moved = torch.where(inside, 1.1 * q, q * (1 - 1.1 * q[inside].sum()) / (1 - q[inside].sum()))
        if bool((moved > 0).all()):
            residual = worst(residual, excess(moved, q, inside, inside))
            wrong = excess(moved, q, inside, ~inside), excess(moved, q, inside, inside, share=0.5)
            planted = [max(pair) for pair in zip(planted, wrong, strict=True)]
    return Finding("|p(S) − q(S)| ≤ √(2 max(p(S), q(S)) D_S) on the flagged set S; none outside",
                   "12 outcomes, 20 random pairs, masks of SelectiveKL, fp64",
                   residual, 1e-12, min(planted))  # fmt: skip
