"""The NFT loss: its gradient has a closed form, and winners and losers are treated alike."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from framework.advantages import GroupCentred
from framework.types import Scores
from strategies.surrogates.nft import branch_losses, implicit_policies, nft_gradient, nft_loss, preference
from tests.support import close, holds, normal, over, refuted


@dataclass(frozen=True)
class Case:
    """Predictions of a few samples with per-element weights; at the old policy or away from it."""

    current: Tensor
    old: Tensor
    target: Tensor
    advantage: Tensor
    weight: Tensor
    beta: float

    @property
    def r(self) -> Tensor:
        return preference(self.advantage, 1.0)


@st.composite
def cases(draw, on_policy: bool | None = None) -> Case:
    seed, samples = draw(st.integers(0, 2**20)), draw(st.integers(1, 4))
    shape = (samples, 1, 2, draw(st.integers(1, 3)), 2, 2)
    still = draw(st.booleans()) if on_policy is None else on_policy
    old = normal(seed, *shape)
    return Case(
        current=old if still else old + normal(seed + 1, *shape),
        old=old,
        target=normal(seed + 2, *shape),
        advantage=normal(seed + 3, samples),
        weight=normal(seed + 4, *shape).square(),
        beta=draw(st.floats(0.05, 2.0)),
    )


Loss = Callable[[Tensor, Case], Tensor]
"""The current prediction and the rest of a case → loss per sample [N]."""


def real_loss(current: Tensor, case: Case) -> Tensor:
    return nft_loss(current, case.old, case.target, case.r, case.beta, case.weight)


def gradient_of(loss: Loss, case: Case) -> Tensor:
    current = case.current.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(current, case).sum(), current)
    return gradient


def closed_form(case: Case) -> Tensor:
    """(2 β w / D) [(2r − 1)(old − target) + β (current − old)], element by element."""
    out = torch.empty_like(case.current)
    for n in range(len(out)):
        signed = 2 * min(max(case.advantage[n].item() / 2 + 0.5, 0.0), 1.0) - 1
        pull = signed * (case.old[n] - case.target[n]) + case.beta * (case.current[n] - case.old[n])
        out[n] = 2 * case.beta * case.weight[n] * pull / out[n].numel()
    return out


def check_gradient(loss: Loss, case: Case) -> None:
    close(gradient_of(loss, case), closed_form(case), atol=1e-12)


def with_a_one_sided_negative(current: Tensor, case: Case) -> Tensor:
    """A negative policy that forgets the second old prediction: (1 − β) old − β θ + … instead of (1 + β) old − β θ."""
    plus, _ = implicit_policies(current, case.old, case.beta)
    minus = 2 * case.old - current
    losses = [(case.weight * (x - case.target).square()).flatten(1).mean(1) for x in (plus, minus)]
    return case.r * losses[0] + (1 - case.r) * losses[1]


def with_a_live_old_policy(current: Tensor, case: Case) -> Tensor:
    """The old prediction not detached: at θ = old the two branches pull on one another."""
    old = current + (case.old - case.current)
    return nft_loss(current, old, case.target, case.r, case.beta, case.weight)


def with_adaptive_weights(current: Tensor, case: Case) -> Tensor:
    """Each branch divided by its own distance."""
    positive, negative = branch_losses(current, case.old, case.target, case.beta, case.weight)
    return case.r * positive / positive.detach() + (1 - case.r) * negative / negative.detach()


LOSS_MUTANTS = [with_a_one_sided_negative, with_a_live_old_policy, with_adaptive_weights]


@pytest.mark.parametrize("on_policy", [True, False], ids=["at old", "away from old"])
def test_the_gradient_equals_its_closed_form(on_policy: bool):
    holds(partial(check_gradient, real_loss), cases(on_policy))


@pytest.mark.parametrize("mutant", LOSS_MUTANTS)
@pytest.mark.parametrize("on_policy", [True, False], ids=["at old", "away from old"])
def test_the_gradient_check_sees_another_loss(mutant: Loss, on_policy: bool):
    refuted(partial(check_gradient, mutant), cases(on_policy))


@over(cases())
def test_the_published_closed_form_is_the_one_of_the_library(case: Case):
    close(nft_gradient(case.current, case.old, case.target, case.r, case.beta, case.weight), closed_form(case), 1e-12)


def check_the_value_hides_the_reward(loss: Loss, case: Case) -> None:
    """At θ = old the value is the same for every advantage; the gradient is not."""
    other = replace(case, advantage=0.5 - (case.advantage > 0).double())
    close(loss(case.current, case), loss(other.current, other), atol=1e-12)
    assert (gradient_of(loss, case) - gradient_of(loss, other)).abs().max() > 1e-6


def test_at_the_old_policy_only_the_gradient_knows_the_reward():
    holds(partial(check_the_value_hides_the_reward, real_loss), cases(on_policy=True))


def test_the_value_check_sees_rewards_in_the_value_and_gradients_without_them():
    def weighted_by_advantage(current: Tensor, case: Case) -> Tensor:
        return case.r * real_loss(current, case)

    def blind(current: Tensor, case: Case) -> Tensor:
        return nft_loss(current, case.old, case.target, torch.full_like(case.r, 0.7), case.beta, case.weight)

    for mutant in (weighted_by_advantage, blind):
        refuted(partial(check_the_value_hides_the_reward, mutant), cases(on_policy=True))


Preference = Callable[[Tensor, float], Tensor]


def check_antisymmetric(to_r: Preference, case: Case) -> None:
    """Turning the advantage round and mirroring the policy at the old one changes nothing."""
    mirrored = 2 * case.old - case.current
    plus, minus = implicit_policies(case.current, case.old, case.beta)
    swapped = implicit_policies(mirrored, case.old, case.beta)
    close(plus, swapped[1], atol=1e-12)
    close(minus, swapped[0], atol=1e-12)
    there = nft_loss(case.current, case.old, case.target, to_r(case.advantage, 1.0), case.beta, case.weight)
    back = nft_loss(mirrored, case.old, case.target, to_r(-case.advantage, 1.0), case.beta, case.weight)
    close(there, back, atol=1e-10)


def lenient(advantage: Tensor, limit: float) -> Tensor:
    """A clip that lets winners go further than losers."""
    return (advantage.clamp(-limit, 2 * limit) / (2 * limit) + 0.5).clamp(min=0)


def shifted(advantage: Tensor, limit: float) -> Tensor:
    return preference(advantage + 0.1 * limit, limit)


def test_the_loss_is_symmetric_under_a_swap_of_winners_and_losers():
    holds(partial(check_antisymmetric, preference), cases(on_policy=False))


@pytest.mark.parametrize("mutant", [lenient, shifted])
def test_the_symmetry_check_sees_a_lopsided_preference(mutant: Preference):
    refuted(partial(check_antisymmetric, mutant), cases(on_policy=False))


def check_balanced(to_r: Preference, seed: int, size: int) -> None:
    """Σ (2r − 1) = 0 in every group that the clip does not touch, so that the loss has no mean pull."""
    groups = torch.arange(3 * size) % 3
    advantage = GroupCentred(clip=None)(Scores.of({"a": normal(seed, 3 * size).clamp(-2, 2)}), groups).values.double()
    signed = 2 * to_r(advantage, 5.0) - 1
    for group in range(3):
        assert abs(signed[groups == group].sum()) < 1e-5


def test_preferences_of_a_group_balance():
    holds(partial(check_balanced, preference), st.integers(0, 2**20), st.integers(2, 24))


def test_the_balance_check_sees_a_shifted_preference():
    refuted(partial(check_balanced, shifted), st.integers(0, 2**20), st.integers(2, 24))


@over(st.floats(-20, 20), st.floats(0.1, 10))
def test_a_preference_is_a_clipped_line_through_one_half(advantage: float, limit: float):
    expected = 0.5 + 0.5 * max(-1.0, min(1.0, advantage / limit))
    assert math.isclose(preference(torch.tensor(advantage, dtype=torch.float64), limit), expected, abs_tol=1e-12)
