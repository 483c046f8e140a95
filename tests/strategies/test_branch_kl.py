"""The branch KL is a divergence of two distributions per group; the anchor's term sees what it cannot see."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from framework.records import AnchorShift, BranchLogits
from framework.types import Objective
from strategies.regularizers.anchor_velocity import AnchorVelocityKL
from strategies.regularizers.branch_kl import BranchKL, branch_kl
from tests.support import close, holds, normal, over, refuted

SEEDS = st.integers(0, 2**20)


@dataclass(frozen=True)
class Batch:
    """Log-probabilities [N] of two policies over groups of equal size; the last clip of each is its anchor."""

    current: Tensor
    reference: Tensor
    groups: Tensor
    prompts: int


@st.composite
def batches(draw) -> Batch:
    prompts, branches, seed = draw(st.integers(1, 3)), draw(st.integers(2, 6)), draw(SEEDS)
    spread = draw(st.sampled_from([0.1, 1.0, 5.0]))

    def log_policy(seed: int) -> Tensor:
        table = (spread * normal(seed, prompts, branches)).log_softmax(1)
        return torch.cat([table, torch.zeros(prompts, 1)], 1).flatten()

    groups = torch.tensor([3, 1, 8][:prompts]).repeat_interleave(branches + 1)
    return Batch(log_policy(seed), log_policy(seed + 1), groups, prompts)


Divergence = Callable[..., Tensor]


def check_divergence(kl: Divergence, batch: Batch) -> None:
    """Σ π log(π/π_ref) by a loop; not negative, 0 at equality and only there."""
    values = kl(batch.current, batch.reference, batch.groups)
    for group in batch.groups.unique():
        rows = batch.groups == group
        pairs = list(zip(batch.current[rows].tolist(), batch.reference[rows].tolist(), strict=True))[:-1]
        expected = sum(math.exp(p) * (p - q) for p, q in pairs)
        close(values[rows], torch.full_like(values[rows], expected), atol=1e-11)
        assert expected > 0
    assert bool((kl(batch.current, batch.current, batch.groups) == 0).all())


def reversed_kl(current: Tensor, reference: Tensor, groups: Tensor) -> Tensor:
    return branch_kl(reference, current, groups)


def own_terms(current: Tensor, reference: Tensor, groups: Tensor) -> Tensor:
    """A planted error: each clip pays its own term, which may be negative."""
    return current.exp() * (current - reference)


def of_the_batch(current: Tensor, reference: Tensor, groups: Tensor) -> Tensor:
    return branch_kl(current, reference, torch.zeros_like(groups))


def mean_of_terms(current: Tensor, reference: Tensor, groups: Tensor) -> Tensor:
    return branch_kl(current, reference, groups) / (groups == groups[0]).sum()


MUTANTS = [reversed_kl, own_terms, of_the_batch, mean_of_terms]


def test_the_branch_kl_is_a_divergence_in_every_group():
    holds(partial(check_divergence, branch_kl), batches())


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_divergence_check_sees_other_sums(mutant: Divergence):
    refuted(partial(check_divergence, mutant), batches())


def check_pull(kl: Divergence, batch: Batch, learning_rate: float) -> None:
    """No slope at the reference; away from it a small step along −gradient of the logits lowers the KL."""
    free = batch.current.reshape(batch.prompts, -1)[:, :-1].clone().requires_grad_()

    def total(logits: Tensor) -> Tensor:
        table = torch.cat([logits.log_softmax(1), torch.zeros(batch.prompts, 1)], 1)
        return kl(table.flatten(), batch.reference, batch.groups).sum()

    before = total(free)
    (gradient,) = torch.autograd.grad(before, free)
    assert gradient.abs().max() > 1e-9
    assert total(free.detach() - learning_rate * gradient) < before
    still = batch.reference.reshape(batch.prompts, -1)[:, :-1].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(total(still), still)
    close(gradient, torch.zeros_like(gradient), atol=1e-12)


def detached(current: Tensor, reference: Tensor, groups: Tensor) -> Tensor:
    """A planted error: the logarithms are detached, so the gradient is that of Σ π × constant."""
    return branch_kl(current, reference + 0.3 * current.detach(), groups)


def test_the_branch_kl_pulls_towards_the_reference():
    holds(partial(check_pull, branch_kl), batches(), st.floats(1e-5, 1e-4))


def test_the_pull_check_sees_another_target():
    refuted(partial(check_pull, detached), batches(), st.floats(1e-5, 1e-4))


@over(batches(), st.floats(0.0, 20.0))
def test_the_mean_over_active_clips_is_the_mean_over_prompts(batch: Batch, weight: float):
    objective = Objective(
        torch.zeros_like(batch.current),
        {BranchLogits: BranchLogits(batch.current, batch.reference, batch.groups)},
    )
    penalty = BranchKL(weight).penalty(objective, None)
    active = torch.ones(batch.prompts, len(penalty) // batch.prompts, dtype=torch.bool)
    active[:, -1] = False  # anchors
    per_prompt = branch_kl(batch.current, batch.reference, batch.groups).reshape(batch.prompts, -1)[:, 0]
    close(penalty[active.flatten()].mean(), weight * per_prompt.mean(), atol=1e-10)


def test_the_released_constant_raises_the_kl_by_no_more_than_itself_per_branch():
    batch_groups = torch.zeros(4, dtype=torch.long)
    current, reference = normal(0, 4).log_softmax(0), normal(1, 4).log_softmax(0)
    raised = branch_kl(current, reference, batch_groups, 1e-4) - branch_kl(current, reference, batch_groups)
    assert bool((raised > 0).all()) and bool((raised <= 4e-4).all())


def test_the_anchor_term_is_the_weighted_shift_of_the_groups_anchor():
    objective = Objective(torch.zeros(3), {AnchorShift: AnchorShift(torch.tensor([0.5, 0.5, 2.0]))})
    close(AnchorVelocityKL(0.2).penalty(objective, None), torch.tensor([0.1, 0.1, 0.4]), atol=1e-7)


@pytest.mark.parametrize("kind", [BranchKL, AnchorVelocityKL])
def test_a_negative_weight_is_refused(kind: type):
    with pytest.raises(ValueError, match=rf"{kind.__name__}\.weight"):
        kind(-1e-3)
