"""From scores to advantages: failed scores, precision, weights and several signals."""

import math
import statistics
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from framework.advantages import (
    GroupCentred,
    GroupRelative,
    PerRewardCentred,
    centre,
    group_mean,
    group_relative,
    per_reward_centred,
)
from framework.types import Scores
from tests.framework.test_advantages import Batch, batches, relative
from tests.support import close, holds, over, refuted

# invalid scores


def centred_where_valid(rewards: Tensor, groups: Tensor, valid: Tensor) -> Tensor:
    return centre(rewards, groups, valid)


def relative_where_valid(rewards: Tensor, groups: Tensor, valid: Tensor) -> Tensor:
    return group_relative(rewards, groups, 1e-4, valid)


def invalid_as_zero(rewards: Tensor, groups: Tensor, valid: Tensor) -> Tensor:
    """A failed score taken for a reward of zero."""
    return relative(torch.where(valid, rewards, 0.0), groups)


def invalid_in_the_mean(rewards: Tensor, groups: Tensor, valid: Tensor) -> Tensor:
    """Dropped at the end only."""
    return torch.where(valid, centre(rewards, groups), 0.0)


def check_invalid_entries_take_no_part(rule: Callable[[Tensor, Tensor, Tensor], Tensor], batch: Batch) -> None:
    """The valid clips get what they would get if the invalid ones did not exist; those get 0."""
    valid = torch.rand(len(batch.rewards), generator=torch.Generator().manual_seed(batch.seed + 9)) < 0.7
    advantages = rule(torch.where(valid, batch.rewards, 1e6), batch.groups, valid)
    assert torch.equal(advantages[~valid], torch.zeros(int((~valid).sum()), dtype=torch.float64))
    if valid.any():
        alone = rule(batch.rewards[valid], batch.groups[valid], torch.ones(int(valid.sum()), dtype=torch.bool))
        close(advantages[valid], alone, atol=1e-9)


@pytest.mark.parametrize("rule", [relative_where_valid, centred_where_valid])
def test_invalid_scores_take_no_part_and_get_no_weight(rule):
    holds(partial(check_invalid_entries_take_no_part, rule), batches())


@pytest.mark.parametrize("mutant", [invalid_as_zero, invalid_in_the_mean])
def test_the_validity_check_sees_failed_scores_in_the_statistics(mutant):
    refuted(partial(check_invalid_entries_take_no_part, mutant), batches())


@pytest.mark.parametrize("rule", [GroupRelative(), GroupCentred(), PerRewardCentred()])
def test_a_clip_with_one_failed_signal_is_inactive_and_weightless(rule):
    good = torch.tensor([0.1, 0.9, 0.4, 0.6])
    scores = Scores.of({"a": good, "b": torch.tensor([0.2, torch.nan, 0.5, 0.3])})
    advantage = rule(scores, torch.zeros(4, dtype=torch.long))
    assert advantage.active.tolist() == [True, False, True, True]
    assert advantage.values[1] == 0 and bool(advantage.values.isfinite().all())
    assert advantage.metrics["frac_invalid"] == 0.25
    rest = Scores.of({name: value[[0, 2, 3]] for name, value in scores.values.items()})
    close(advantage.values[[0, 2, 3]], rule(rest, torch.zeros(3, dtype=torch.long)).values, atol=1e-6)


# precision


def statistics_oracle(rewards: Tensor, groups: Tensor, floor: float) -> Tensor:
    """Group by group with exact fractions."""
    out = torch.empty(len(rewards), dtype=torch.float64)
    for i, group in enumerate(groups.tolist()):
        members = [r for r, g in zip(rewards.tolist(), groups.tolist(), strict=True) if g == group]
        centred = rewards[i].item() - statistics.mean(members)
        out[i] = centred / max(statistics.pstdev(members), floor)
    return out


def check_precise(rule: Callable[[Tensor, Tensor], Tensor], batch: Batch) -> None:
    """float32 scores near 1000 that differ in their last bits: what a large raw scale leaves of a reward."""
    rewards = (1000 + 1e-3 * batch.rewards).float()
    close(rule(rewards, batch.groups), statistics_oracle(rewards, batch.groups, 1e-6), atol=1e-5)


def in_float64(rewards: Tensor, groups: Tensor) -> Tensor:
    return GroupRelative(std_floor=1e-6)(Scores.of({"a": rewards}), groups).values


def in_float32(rewards: Tensor, groups: Tensor) -> Tensor:
    """The textbook formula in the dtype of the scores."""
    centred = rewards - group_mean(rewards, groups)
    return centred / group_mean(centred.square(), groups).sqrt().clamp(min=1e-6)


@over(batches(), examples=25)
def test_float32_scores_are_compared_in_float64(batch: Batch):
    check_precise(in_float64, batch)


def test_the_precision_check_sees_float32_arithmetic():
    refuted(partial(check_precise, in_float32), batches())


# weights, clipping, several signals


@pytest.mark.parametrize("rule", [GroupRelative, GroupCentred, PerRewardCentred])
def test_a_weight_for_a_signal_that_no_reward_gives_is_refused(rule):
    scores = Scores.of({"VQ": torch.rand(4), "MQ": torch.rand(4)})
    with pytest.raises(ValueError, match=r"sharpness.*VQ.*MQ"):
        rule({"VQ": 1.0, "sharpness": 1.0})(scores, torch.zeros(4, dtype=torch.long))


@pytest.mark.parametrize("rule", [GroupRelative, GroupCentred, PerRewardCentred])
def test_no_weight_at_all_is_refused(rule):
    with pytest.raises(ValueError, match="weights"):
        rule({})(Scores.of({"VQ": torch.rand(4)}), torch.zeros(4, dtype=torch.long))


@over(batches(), st.floats(0.1, 2.0))
def test_clipping_is_symmetric_and_counted(batch: Batch, limit: float):
    scores, flipped = Scores.of({"a": batch.rewards}), Scores.of({"a": -batch.rewards})
    rule = GroupRelative(clip=limit)
    advantage, mirrored = rule(scores, batch.groups), rule(flipped, batch.groups)
    close(advantage.values, -mirrored.values, atol=1e-6)
    free = GroupRelative(clip=None)(scores, batch.groups).values
    close(advantage.values, free.clamp(-limit, limit), atol=1e-6)
    cut = (relative(batch.rewards, batch.groups).abs() > limit).double().mean()
    assert advantage.metrics["advantage_clip_fraction"] == cut


def check_no_signal_dominates(rule: Callable[[dict[str, Tensor], Tensor], Tensor], batch: Batch, scale: float) -> None:
    """Two rewards, one of them on a far larger raw scale: rescaling it changes nothing."""
    values = {"a": batch.rewards, "b": batch.rewards.flip(0).square()}
    scaled = values | {"b": 9 + scale * values["b"]}
    close(rule(scaled, batch.groups), rule(values, batch.groups), atol=1e-6)


def test_every_reward_counts_on_its_own_scale():
    def rule(values: dict[str, Tensor], groups: Tensor) -> Tensor:
        return per_reward_centred(values, {"a": 1.0, "b": 1.0}, groups, 1e-9)

    holds(partial(check_no_signal_dominates, rule), batches(), st.floats(0.5, 100.0))


def test_the_dominance_check_sees_a_sum_of_raw_rewards():
    def raw_sum(values: dict[str, Tensor], groups: Tensor) -> Tensor:
        return relative(values["a"] + values["b"], groups)

    refuted(partial(check_no_signal_dominates, raw_sum), batches(), st.floats(0.5, 100.0))


@over(batches())
def test_the_metrics_say_what_the_groups_looked_like(batch: Batch):
    metrics = GroupRelative()(Scores.of({"a": batch.rewards}), batch.groups).metrics
    spreads = [batch.rewards[batch.groups == g].std(correction=0) for g in batch.groups.unique()]
    assert math.isclose(metrics["group_std_mean"], torch.stack(spreads).mean(), rel_tol=1e-9)
    assert metrics["frac_zero_std"] == 0 and metrics["frac_invalid"] == 0
