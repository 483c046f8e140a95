"""An advantage compares siblings: nothing but the differences inside a prompt's group may reach it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from framework.advantages import (
    GroupCentred,
    GroupRelative,
    PerRewardCentred,
    advantage_bound,
    batch_std,
    centre,
    group_mean,
    group_relative,
    group_std,
    per_reward_centred,
)
from framework.types import Scores
from tests.support import close, holds, normal, over, refuted

Rule = Callable[[Tensor, Tensor], Tensor]
"""Rewards [N], group ids [N] → advantages [N], float64 and unclipped."""


@dataclass(frozen=True)
class Batch:
    """Rewards of whole groups, placed in any order under any ids."""

    rewards: Tensor
    groups: Tensor
    size: int
    seed: int


@st.composite
def batches(draw, largest: int = 8) -> Batch:
    prompts, size, seed = draw(st.integers(1, 4)), draw(st.integers(2, largest)), draw(st.integers(0, 2**20))
    ids = draw(st.lists(st.integers(-5, 10**9), min_size=prompts, max_size=prompts, unique=True))
    random = torch.Generator().manual_seed(seed)
    place = torch.randperm(prompts * size, generator=random)
    return Batch(normal(seed, prompts * size), torch.tensor(ids).repeat_interleave(size)[place], size, seed)


def relative(rewards: Tensor, groups: Tensor, floor: float = 1e-4) -> Tensor:
    return group_relative(rewards, groups, floor)


def per_reward(rewards: Tensor, groups: Tensor, floor: float = 1e-4) -> Tensor:
    values = {"a": rewards, "b": rewards.flip(0)}
    return per_reward_centred(values, {"a": 1.0, "b": 0.5}, groups, floor)


RULES: dict[str, Rule] = {"relative": relative, "centred": centre, "per reward": per_reward}
ABOVE_THE_FLOOR = 1e-8
"""A floor that no drawn spread comes near."""
SCALE_FREE: dict[str, Rule] = {
    "relative": partial(relative, floor=ABOVE_THE_FLOOR),
    "per reward": partial(per_reward, floor=ABOVE_THE_FLOOR),
}


# planted errors, each a rule that somebody has shipped


def over_the_batch(rewards: Tensor, groups: Tensor) -> Tensor:
    """Centred over the batch: prompts are compared with each other."""
    return (rewards - rewards.mean()) / rewards.std(correction=0)


def by_place(rewards: Tensor, groups: Tensor) -> Tensor:
    """Groups by their place in the batch instead of by id."""
    sizes = groups.unique(return_counts=True)[1]
    return relative(rewards, torch.arange(len(sizes)).repeat_interleave(int(sizes[0])))


def with_absolute_floor(rewards: Tensor, groups: Tensor) -> Tensor:
    """A constant added to the deviation: the scale of the reward stays in."""
    return centre(rewards, groups) / (group_std(rewards, groups) + 0.1)


def without_floor(rewards: Tensor, groups: Tensor) -> Tensor:
    return centre(rewards, groups) / group_std(rewards, groups)


def by_mean_deviation(rewards: Tensor, groups: Tensor) -> Tensor:
    """The mean absolute deviation is smaller than the standard one: outliers pass the bound."""
    centred = centre(rewards, groups)
    return centred / group_mean(centred.abs(), groups)


# sums to zero


def check_sums_to_zero(rule: Rule, batch: Batch) -> None:
    advantages = rule(batch.rewards, batch.groups)
    for group in batch.groups.unique():
        assert abs(advantages[batch.groups == group].sum()) < 1e-9


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_advantages_sum_to_zero_in_every_group(rule: Rule):
    holds(partial(check_sums_to_zero, rule), batches())


def test_the_zero_sum_check_sees_a_mean_over_the_batch():
    refuted(partial(check_sums_to_zero, over_the_batch), batches())


@over(batches())
def test_the_classes_sum_to_zero_to_float32_before_clipping(batch: Batch):
    scores = Scores.of({"a": batch.rewards, "b": batch.rewards.flip(0)})
    for rule in (GroupRelative(clip=None), GroupCentred(clip=None), PerRewardCentred(clip=None)):
        values = rule(scores, batch.groups).values
        assert values.dtype == torch.float32
        assert group_mean(values.double(), batch.groups).abs().max() < 1e-6


# scale, shift, prompt difficulty


def check_scale_free(rule: Rule, batch: Batch, scale: float, shift: float) -> None:
    close(rule(scale * batch.rewards + shift, batch.groups), rule(batch.rewards, batch.groups), atol=1e-7)


SCALES = st.floats(0.05, 50.0)
SHIFTS = st.floats(-100.0, 100.0)


@pytest.mark.parametrize("rule", SCALE_FREE.values(), ids=SCALE_FREE)
def test_scaling_and_shifting_all_rewards_changes_nothing_above_the_floor(rule: Rule):
    holds(partial(check_scale_free, rule), batches(), SCALES, SHIFTS)


@pytest.mark.parametrize("mutant", [with_absolute_floor, centre])
def test_the_scale_check_sees_an_absolute_term_in_the_deviation(mutant: Rule):
    refuted(partial(check_scale_free, mutant), batches(), SCALES, SHIFTS)


def check_prompt_difficulty_is_removed(rule: Rule, batch: Batch) -> None:
    """A constant per prompt, of any size, changes no advantage."""
    _, index = batch.groups.unique(return_inverse=True)
    difficulty = 30 * normal(batch.seed + 1, int(index.max()) + 1)
    rewards = batch.rewards + difficulty[index]
    close(rule(rewards, batch.groups), rule(batch.rewards, batch.groups), atol=1e-7)


def single_per_reward(rewards: Tensor, groups: Tensor) -> Tensor:
    return per_reward_centred({"a": rewards}, {"a": 1.0}, groups, 1e-4)


@pytest.mark.parametrize("rule", [relative, centre, single_per_reward])
def test_a_constant_per_prompt_changes_nothing(rule: Rule):
    holds(partial(check_prompt_difficulty_is_removed, rule), batches())


def by_raw_std(rewards: Tensor, groups: Tensor) -> Tensor:
    """The deviation of the raw values: prompt difficulty enters through the scale."""
    return centre(rewards, groups) / batch_std(rewards)


@pytest.mark.parametrize("mutant", [over_the_batch, by_raw_std])
def test_the_difficulty_check_sees_statistics_across_prompts(mutant: Rule):
    refuted(partial(check_prompt_difficulty_is_removed, mutant), batches())


# the bound


def check_bounded(rule: Rule, batch: Batch) -> None:
    assert rule(batch.rewards**5, batch.groups).abs().max() <= advantage_bound(batch.size) * (1 + 1e-12)


@over(batches(largest=32))
def test_no_advantage_exceeds_the_square_root_of_group_size_minus_one(batch: Batch):
    check_bounded(relative, batch)


def test_the_bound_check_sees_a_smaller_deviation():
    refuted(partial(check_bounded, by_mean_deviation), batches(largest=32))


@over(st.integers(2, 64))
def test_a_lone_winner_reaches_the_bound(size: int):
    rewards = torch.zeros(size, dtype=torch.float64).index_fill_(0, torch.tensor(size // 2), 1.0)
    advantages = relative(rewards, torch.zeros(size, dtype=torch.long))
    assert math.isclose(advantages.max(), math.sqrt(size - 1), rel_tol=1e-12)
    assert advantage_bound(size) == math.sqrt(size - 1)


# placement


def check_permutation_equivariant(rule: Rule, batch: Batch) -> None:
    order = torch.randperm(len(batch.rewards), generator=torch.Generator().manual_seed(batch.seed + 7))
    permuted = rule(batch.rewards[order], batch.groups[order])
    close(permuted, rule(batch.rewards, batch.groups)[order], atol=1e-9)


@pytest.mark.parametrize("rule", [relative, centre, single_per_reward])
def test_permuting_the_clips_permutes_the_advantages(rule: Rule):
    holds(partial(check_permutation_equivariant, rule), batches())


def test_the_permutation_check_sees_groups_by_place():
    refuted(partial(check_permutation_equivariant, by_place), batches())


def check_placement_does_not_matter(rule: Rule, batch: Batch) -> None:
    """A prompt's clips give the same advantages when they stand together, alone and under another id."""
    advantages = rule(batch.rewards, batch.groups)
    for group in batch.groups.unique():
        members = batch.groups == group
        alone = rule(batch.rewards[members], torch.zeros(batch.size, dtype=torch.long))
        close(advantages[members], alone, atol=1e-9)


@pytest.mark.parametrize("rule", [relative, centre])
def test_where_and_under_which_id_a_group_stands_does_not_matter(rule: Rule):
    holds(partial(check_placement_does_not_matter, rule), batches())


@pytest.mark.parametrize("mutant", [by_place, over_the_batch])
def test_the_placement_check_sees_groups_that_leak(mutant: Rule):
    refuted(partial(check_placement_does_not_matter, mutant), batches())


# groups without spread


def check_no_spread_gives_zero(rule: Rule, batch: Batch, tie: float) -> None:
    """A constant group has advantage exactly 0; ties broken by rounding noise are not blown up."""
    constant = batch.rewards[:1].float().double().expand(batch.size)
    groups = torch.zeros(batch.size, dtype=torch.long)
    assert torch.equal(rule(constant, groups), torch.zeros_like(constant))
    noisy = constant + tie * normal(batch.seed + 3, batch.size)
    assert rule(noisy, groups).abs().max() <= 100 * tie / 1e-4


TIES = st.floats(1e-10, 1e-8)


@pytest.mark.parametrize("rule", [relative, centre, single_per_reward])
def test_a_group_without_spread_has_no_advantage(rule: Rule):
    holds(partial(check_no_spread_gives_zero, rule), batches(), TIES)


def test_the_spread_check_sees_a_deviation_without_a_floor():
    refuted(partial(check_no_spread_gives_zero, without_floor), batches(), TIES)


@over(batches(), st.floats(0.01, 3.0))
def test_a_constant_group_is_exactly_zero_under_any_weight(batch: Batch, weight: float):
    rewards = batch.rewards[:1].float().expand(batch.size)
    for rule in (GroupRelative({"a": weight}), GroupCentred({"a": weight}), PerRewardCentred({"a": weight})):
        advantage = rule(Scores.of({"a": rewards}), torch.zeros(batch.size, dtype=torch.long))
        assert torch.equal(advantage.values, torch.zeros(batch.size))
        assert advantage.metrics["frac_zero_std"] == 1
