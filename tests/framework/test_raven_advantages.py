"""RAVEN's advantage compares a clip with its whole group, reward by reward, wherever its siblings were made."""

import statistics
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from framework.advantages import advantage_bound, batch_std, group_mean, group_std, weighted_sum
from framework.raven_advantages import (
    RavenAdvantage,
    normalised_sum,
    normalize_then_sum,
    sum_then_normalize,
    weighted_mean,
    z_score,
)
from framework.types import Scores
from tests.framework.test_advantages import SCALES, SHIFTS, TIES, Batch, batches
from tests.support import close, holds, normal, over, refuted

WEIGHTS = {"flow": 0.35, "text": 2.0, "shake": -1.0}
FREE = RavenAdvantage(WEIGHTS, std_floor=1e-8, score_floor=1e-8, std_eps=0.0, clip=None)
"""No constant that any drawn spread comes near."""
Rule = Callable[[Scores, Tensor], Tensor]


def rewards(batch: Batch) -> dict[str, Tensor]:
    """Three rewards of the batch's clips, one of them on a much larger scale."""
    flow = 200 * normal(batch.seed + 4, len(batch.rewards))
    return {"flow": flow, "text": batch.rewards, "shake": normal(batch.seed + 5, len(batch.rewards))}


def raven(scores: Scores, groups: Tensor) -> Tensor:
    return FREE(scores, groups).values.double()


# planted errors


def of_ranks(clips: int) -> Rule:
    """The released rule: rewards are normalised over the clips that stand side by side on one rank."""

    def rule(scores: Scores, groups: Tensor) -> Tensor:
        order = groups.argsort(stable=True)
        rank = torch.empty_like(order).index_put((order,), torch.arange(len(order)) // clips)
        values = {name: value.double() for name, value in scores.values.items()}
        return normalize_then_sum(values, WEIGHTS, groups, rank, 1e-8, 0.0)

    return rule


def summed_raw(scores: Scores, groups: Tensor) -> Tensor:
    return sum_then_normalize(scores.values, WEIGHTS, groups, 1e-8, 0.0)


def normalised_once(scores: Scores, groups: Tensor) -> Tensor:
    return 4 * normalised_sum(scores.values, WEIGHTS, groups, 1e-8, 0.0)


def over_the_batch(scores: Scores, groups: Tensor) -> Tensor:
    return raven(scores, torch.zeros_like(groups))


# what it is


def check_is_the_formula(rule: Rule, batch: Batch) -> None:
    """Group by group with Python's statistics."""
    values, expected = rewards(batch), torch.empty(len(batch.rewards), dtype=torch.float64)
    for group in batch.groups.unique():
        members = torch.nonzero(batch.groups == group).squeeze(1).tolist()

        def z(numbers: list[float]) -> list[float]:
            return [(x - statistics.fmean(numbers)) / statistics.pstdev(numbers) for x in numbers]

        scaled = {name: z(values[name][members].tolist()) for name in WEIGHTS}
        total = [sum(w * scaled[name][i] for name, w in WEIGHTS.items()) / 3.35 for i in range(len(members))]
        expected[members] = torch.tensor(z(total), dtype=torch.float64)
    close(rule(Scores.of(values), batch.groups), expected, atol=1e-5)


def test_it_is_a_z_score_of_the_weighted_mean_of_z_scores():
    holds(partial(check_is_the_formula, raven), batches())


@pytest.mark.parametrize("mutant", [of_ranks(2), summed_raw, normalised_once, over_the_batch])
def test_the_formula_check_sees_ranks_raw_sums_one_normalisation_and_other_prompts(mutant: Rule):
    refuted(partial(check_is_the_formula, mutant), batches())


# placement


def check_placement_does_not_matter(rule: Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor], batch: Batch) -> None:
    """The same clips, other numbers of them per rank and another order: the same advantages."""
    values = rewards(batch)
    order = torch.randperm(len(batch.groups), generator=torch.Generator().manual_seed(batch.seed + 7))
    moved = {name: value[order] for name, value in values.items()}
    reference = rule(batch.groups, torch.arange(len(order)), values)
    for clips in (1, 2, 3):
        close(rule(batch.groups[order], torch.arange(len(order)) // clips, moved), reference[order], atol=1e-5)


def whole_group(groups: Tensor, rank: Tensor, values: dict[str, Tensor]) -> Tensor:
    return raven(Scores.of(values), groups)


def per_rank(groups: Tensor, rank: Tensor, values: dict[str, Tensor]) -> Tensor:
    return normalize_then_sum(values, WEIGHTS, groups, rank * 10 + groups % 10)


def test_doubling_the_clips_per_rank_or_moving_them_changes_nothing():
    holds(partial(check_placement_does_not_matter, whole_group), batches())


def test_the_placement_check_sees_the_released_subgroups():
    refuted(partial(check_placement_does_not_matter, per_rank), batches())


def test_subgroups_of_four_flip_signs_of_a_group_of_thirty_two():
    """Rough numbers of the method: 4-wide deviations reverse about a sixth of the preferences of clips alike in law."""
    values = {name: normal(k, 32 * 64) for k, name in enumerate(WEIGHTS)}
    groups, ranks = torch.arange(32 * 64) // 32, torch.arange(32 * 64) // 4
    paper, released = (normalize_then_sum(values, WEIGHTS, groups, sub) for sub in (groups, ranks))
    flipped = (paper * released < 0).double().mean()
    assert 0.08 < flipped < 0.3
    assert torch.equal(normalize_then_sum(values, WEIGHTS, groups, groups), paper)


# invariances


def check_scale_free(rule: Rule, batch: Batch, scale: float, shift: float) -> None:
    values = rewards(batch)
    changed = values | {"flow": scale * values["flow"] + shift}
    close(rule(Scores.of(changed), batch.groups), rule(Scores.of(values), batch.groups), atol=1e-5)


def test_every_reward_may_be_scaled_and_shifted_alone():
    holds(partial(check_scale_free, raven), batches(), SCALES, SHIFTS)


def test_the_scale_check_sees_a_sum_of_raw_rewards():
    refuted(partial(check_scale_free, summed_raw), batches(), SCALES, SHIFTS)


@over(batches(), SCALES)
def test_the_shipped_constants_leave_ordinary_rewards_scale_free(batch: Batch, scale: float):
    values = {"flow": batch.rewards + 3 * normal(batch.seed + 4, len(batch.rewards))}
    assume(group_std(values["flow"], batch.groups).min() > 0.1)
    rule = RavenAdvantage(clip=None)
    scaled = rule(Scores.of({"flow": scale * values["flow"]}), batch.groups)
    close(scaled.values, rule(Scores.of(values), batch.groups).values, atol=1e-2)


def check_zero_mean_and_bound(rule: Rule, batch: Batch) -> None:
    values = {name: value**5 for name, value in rewards(batch).items()}
    advantage = rule(Scores.of(values), batch.groups)
    assert group_mean(advantage, batch.groups).abs().max() < 1e-5
    assert advantage.abs().max() <= advantage_bound(batch.size) * (1 + 1e-6)


@over(batches(largest=32))
def test_advantages_have_zero_mean_and_stay_below_the_square_root_of_group_size_minus_one(batch: Batch):
    check_zero_mean_and_bound(raven, batch)


@pytest.mark.parametrize("mutant", [normalised_once, over_the_batch])
def test_the_bound_check_sees_one_normalisation_and_other_prompts(mutant: Rule):
    refuted(partial(check_zero_mean_and_bound, mutant), batches(largest=32))


def test_the_papers_clip_acts_on_a_lone_winner_of_thirty_two_alone():
    scores, groups = Scores.of({"flow": torch.eye(32)[5]}), torch.zeros(32, dtype=torch.long)
    advantage = RavenAdvantage({"flow": 1.0})(scores, groups)
    assert advantage.values[5] == 5.0 and advantage.metrics["advantage_clip_fraction"] == 1 / 32
    ordinary = RavenAdvantage({"flow": 1.0})(Scores.of({"flow": normal(0, 32)}), groups)
    assert ordinary.metrics["advantage_clip_fraction"] == 0


# what is no preference


def check_ties_are_no_preference(rule: RavenAdvantage, batch: Batch, tie: float) -> None:
    groups = torch.zeros(batch.size, dtype=torch.long)
    equal = batch.rewards[:1].expand(batch.size)
    assert torch.equal(rule(Scores.of({"flow": equal}), groups).values, torch.zeros(batch.size))
    noisy = equal + tie * normal(batch.seed + 3, batch.size)
    assert rule(Scores.of({"flow": noisy}), groups).values.abs().max() <= 1000 * tie / 1e-4


def test_rewards_equal_to_rounding_give_no_advantage():
    holds(partial(check_ties_are_no_preference, RavenAdvantage({"flow": 1.0})), batches(), TIES)


def test_the_tie_check_sees_the_two_floors_of_the_release():
    released = RavenAdvantage({"flow": 1.0}, score_floor=1e-4)
    refuted(partial(check_ties_are_no_preference, released), batches(), TIES)


def test_a_reward_without_spread_leaves_the_others_alone():
    text, groups = normal(0, 8), torch.zeros(8, dtype=torch.long)
    both = RavenAdvantage()(Scores.of({"text": text, "flow": torch.ones(8)}), groups).values
    close(both, RavenAdvantage()(Scores.of({"text": text}), groups).values, atol=1e-4)


# who takes part


def check_others_take_no_part(rule: RavenAdvantage, batch: Batch, anchored: bool) -> None:
    """Failed clips and anchors get 0, and their siblings what they would get if those did not exist."""
    absent = torch.rand(len(batch.rewards), generator=torch.Generator().manual_seed(batch.seed + 9)) < 0.3
    values = rewards(batch)
    if anchored:
        advantage = rule(Scores.of(values), batch.groups, absent)
    else:
        failed = values | {"text": values["text"].masked_fill(absent, torch.nan)}
        advantage = rule(Scores.of(failed), batch.groups)
    assert not advantage.values[absent].any() and torch.equal(advantage.active, ~absent)
    if not bool(absent.all()):
        rest = Scores.of({name: value[~absent] for name, value in values.items()})
        close(advantage.values[~absent], rule(rest, batch.groups[~absent]).values, atol=1e-5)


class Everybody(RavenAdvantage):
    """A planted error: failures and anchors are dropped at the end only."""

    def __call__(self, scores: Scores, groups: Tensor, anchors: Tensor | None = None):
        found = super().__call__(scores, groups, anchors)
        values = {name: value.nan_to_num() for name, value in scores.values.items()}
        whole = super().__call__(Scores.of(values), groups)
        return type(found)(whole.values * found.active, found.active, groups, found.metrics)


@pytest.mark.parametrize("anchored", [False, True])
def test_failed_clips_and_anchors_take_no_part(anchored: bool):
    holds(partial(check_others_take_no_part, RavenAdvantage(WEIGHTS)), batches(), st.just(anchored))


@pytest.mark.parametrize("anchored", [False, True])
def test_the_membership_check_sees_clips_that_are_dropped_at_the_end(anchored: bool):
    refuted(partial(check_others_take_no_part, Everybody(WEIGHTS)), batches(), st.just(anchored))


def test_weights_follow_the_signals():
    scores = Scores.of({"flow": normal(0, 4), "text": normal(1, 4)})
    with pytest.raises(ValueError, match=r"sharpness.*flow.*text"):
        RavenAdvantage({"sharpness": 1.0})(scores, torch.zeros(4, dtype=torch.long))


@pytest.mark.parametrize("setting", [{"std_floor": 0.0}, {"score_floor": -1.0}, {"std_eps": -1e-5}])
def test_meaningless_constants_are_refused(setting: dict):
    with pytest.raises(ValueError, match=next(iter(setting))):
        RavenAdvantage(**setting)


@over(batches())
def test_the_parts_are_what_they_say(batch: Batch):
    values = rewards(batch)
    close(weighted_mean(values, WEIGHTS), weighted_sum(values, WEIGHTS) / 3.35, atol=1e-9)
    alone = torch.zeros_like(batch.groups)
    close(z_score(batch.rewards, alone, 1e-9, 0.0) * batch_std(batch.rewards),
          batch.rewards - batch.rewards.mean(), atol=1e-9)  # fmt: skip
