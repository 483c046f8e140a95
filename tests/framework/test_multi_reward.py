"""Which signal an advantage comes from: one of several, their raw sum, or each on its own scale."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from framework.advantages import (
    GroupCentred,
    PerRewardCentred,
    PrimaryOnly,
    SumFirst,
    astrolabe_released,
)
from framework.interfaces import AdvantageRule
from framework.types import Scores
from tests.framework.test_advantages import Batch, batches
from tests.support import close, holds, normal, refuted

NO_FLOOR = 1e-8
"""A floor that no drawn spread comes near."""


def scores_of(batch: Batch, scale: float = 1.0, shift: float = 0.0) -> Scores:
    """Two signals; ``main`` in other units."""
    return Scores.of({"main": scale * batch.rewards + shift, "other": normal(batch.seed + 5, len(batch.rewards))})


def check_other_signals_do_not_matter(rule: AdvantageRule, batch: Batch) -> None:
    scores = scores_of(batch)
    loud = Scores.of({**scores.values, "other": 1e3 * scores.values["other"]})
    close(rule(loud, batch.groups).values, rule(scores, batch.groups).values, atol=1e-5)


def test_the_primary_signal_decides_alone():
    holds(partial(check_other_signals_do_not_matter, PrimaryOnly("main", NO_FLOOR)), batches())


@pytest.mark.parametrize("rule", [GroupCentred(), SumFirst()])
def test_the_primary_check_sees_sums_of_raw_scores(rule: AdvantageRule):
    refuted(partial(check_other_signals_do_not_matter, rule), batches())


def check_units_do_not_matter(rule: AdvantageRule, batch: Batch, scale: float, shift: float) -> None:
    """Scaling or shifting one signal changes no advantage."""
    close(rule(scores_of(batch, scale, shift), batch.groups).values, rule(scores_of(batch), batch.groups).values, 1e-4)


UNITS = (st.floats(0.1, 20.0), st.floats(-20.0, 20.0))


@pytest.mark.parametrize("rule", [PrimaryOnly("main", NO_FLOOR), PerRewardCentred(std_floor=NO_FLOOR)])
def test_the_units_of_a_signal_do_not_matter(rule: AdvantageRule):
    holds(partial(check_units_do_not_matter, rule), batches(), *UNITS)


@pytest.mark.parametrize("rule", [GroupCentred(), SumFirst()])
def test_the_unit_check_sees_sums_of_raw_scores(rule: AdvantageRule):
    refuted(partial(check_units_do_not_matter, rule), batches(), *UNITS)


def released(values: Tensor, weights: dict[str, float], batch: Batch) -> Tensor:
    raw = weights["main"] * values + weights["other"] * normal(batch.seed + 5, len(values))
    means = torch.stack([raw[batch.groups == g].mean() for g in batch.groups])
    return (raw - means) / (raw.var(correction=0).sqrt() + 1e-4)


def check_released(rule: Callable[[dict[str, float]], AdvantageRule], batch: Batch, weight: float) -> None:
    weights = {"main": weight, "other": 1.0}
    found = rule(weights)(scores_of(batch), batch.groups).values
    close(found, released(batch.rewards, weights, batch), atol=1e-4)


def test_the_sum_first_is_the_released_rule():
    holds(partial(check_released, lambda w: SumFirst(w, clip=None)), batches(), st.floats(0.1, 5.0))


@pytest.mark.parametrize("rule", [lambda w: GroupCentred(w, clip=None), lambda w: PerRewardCentred(w, clip=None)])
def test_the_release_check_sees_the_other_rules(rule: Callable[[dict[str, float]], AdvantageRule]):
    refuted(partial(check_released, rule), batches(), st.floats(0.1, 5.0))


def test_a_failed_auxiliary_does_not_stop_a_clip_that_the_primary_scored():
    scores = Scores.of({"main": torch.tensor([0.1, 0.9, torch.nan, 0.4]), "other": torch.full((4,), torch.nan)})
    advantage = PrimaryOnly("main")(scores, torch.zeros(4, dtype=torch.long))
    assert advantage.active.tolist() == [True, True, False, True]
    assert not PerRewardCentred()(scores, torch.zeros(4, dtype=torch.long)).active.any()


def test_failed_scores_are_in_no_deviation_of_the_released_rule():
    values, valid = torch.tensor([0.0, 1.0, 99.0, 3.0]).double(), torch.tensor([True, True, False, True])
    groups = torch.zeros(4, dtype=torch.long)
    found = astrolabe_released(values, groups, 1e-4, valid)
    close(found[valid], astrolabe_released(values[valid], groups[valid]), atol=1e-12)
    assert found[2] == 0


def test_anchors_are_no_siblings():
    scores = Scores.of({"main": torch.tensor([5.0, 0.1, 0.9, 0.4])})
    anchors, groups = torch.tensor([True, False, False, False]), torch.zeros(4, dtype=torch.long)
    for rule in (PrimaryOnly("main"), SumFirst()):
        found, alone = rule(scores, groups, anchors), rule(Scores.of({"main": scores.values["main"][1:]}), groups[1:])
        assert found.active.tolist() == [False, True, True, True]
        close(found.values[1:], alone.values, atol=1e-6)


def test_a_primary_signal_that_the_reward_does_not_give_is_refused():
    with pytest.raises(ValueError, match="HPS"):
        PrimaryOnly("HPS")(Scores.of({"VQ": torch.zeros(2)}), torch.zeros(2, dtype=torch.long))
