"""The reference moves when the clips that pay have moved far enough, and the distance is then zero again."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from framework.compatibility import IncompatibleRecipe, check_reference
from framework.optimization import AdamW
from framework.policies import REFERENCE
from framework.records import EndpointShift
from framework.reference import Dynamic, Frozen, ReferenceSchedule, released_resets, shift_metrics
from framework.trainer import Trainer, combine
from framework.types import Objective
from strategies.regularizers.none import NoRegularizer
from strategies.regularizers.velocity_kl import VelocityKL
from strategies.surrogates.nft import NFT
from tests.framework.test_trainer import make_trainer, weights
from tests.support import close, holds, normal, refuted

KLS = st.lists(st.floats(0, 0.05), min_size=1, max_size=60)


def times(schedule: ReferenceSchedule, kl: list[float]) -> list[int]:
    """After which steps the reference moves."""
    return [step for step, value in enumerate(kl) if schedule.due(value)]


def test_a_frozen_reference_never_moves():
    assert times(Frozen(), [1e9] * 40) == []


def plain_loop(kl: list[float], threshold: float, max_age: int) -> list[int]:
    """No average, no adaptation."""
    moved, last = [], -1
    for step, value in enumerate(kl):
        if value > threshold or step - last >= max_age:
            moved.append(step)
            last = step
    return moved


def check_against_a_loop(make: Callable[[float, int], ReferenceSchedule], kl: list[float], max_age: int) -> None:
    assert times(make(0.02, max_age), kl) == plain_loop(kl, 0.02, max_age)


def without_memory(threshold: float, max_age: int) -> Dynamic:
    return Dynamic(threshold, max_age, ema=0.0, raised=1.0, lowered=1.0)


def one_step_late(threshold: float, max_age: int) -> Dynamic:
    return without_memory(threshold, max_age + 1)


AGES = st.integers(1, 12)


def test_it_moves_past_the_threshold_or_at_the_age_limit():
    holds(partial(check_against_a_loop, without_memory), KLS, AGES)


def test_the_schedule_check_sees_an_age_limit_that_is_one_late():
    refuted(partial(check_against_a_loop, one_step_late), KLS, AGES)


def test_a_single_outlier_does_not_pass_an_average():
    kl = [0.0, 0.0, 0.015, 0.0, 0.0]
    assert times(Dynamic(0.01, 16, ema=0.5), kl) == [] and times(Dynamic(0.01, 16, ema=0.0), kl) == [2]


def test_the_threshold_rises_after_an_early_move_and_falls_after_one_by_age():
    schedule = Dynamic(0.01, 6, ema=0.0, raised=1.5, lowered=0.5, early=3)
    assert times(schedule, [0.0, 0.02]) == [1] and schedule.threshold == pytest.approx(0.015)
    assert times(schedule, [0.0] * 6) == [5] and schedule.threshold == pytest.approx(0.0075)
    assert times(schedule, [0.0] * 3 + [0.02]) == [3] and schedule.threshold == pytest.approx(0.0075)
    assert released_resets([0.2] * 3, 0.15, 15)[1] == [0.15, 0.05, 0.05]  # the release: its raise lowers, and at once


def test_without_a_clip_that_pays_only_age_counts():
    schedule = Dynamic(0.01, 3)
    assert [schedule.due(None) for _ in range(7)] == [False, False, True] * 2 + [False]
    assert math.isnan(schedule.average)


def check_resumes(save: Callable[[Dynamic], dict], kl: list[float], cut: int) -> None:
    """A schedule that is saved and loaded in the middle moves as if nothing had happened."""
    whole, first, second = (Dynamic(0.02, 7, ema=0.5) for _ in range(3))
    expected = times(whole, kl)
    done = times(first, kl[:cut])
    second.load_state_dict(save(first))
    assert done + [cut + step for step in times(second, kl[cut:])] == expected
    assert len(kl) <= cut or second.state_dict().keys() == first.state_dict().keys()


CUTS = st.integers(0, 60)


def test_its_age_average_and_threshold_survive_a_checkpoint():
    holds(partial(check_resumes, Dynamic.state_dict), KLS, CUTS)


@pytest.mark.parametrize("forgotten", [{"age": 0}, {"average": math.nan}, {"threshold": 0.02}])
def test_the_checkpoint_check_sees_each_forgotten_number(forgotten: dict):
    long = st.lists(st.floats(0, 0.05), min_size=30, max_size=60)
    refuted(partial(check_resumes, lambda s: s.state_dict() | forgotten), long, st.integers(1, 25), examples=300)


@pytest.mark.parametrize(
    "arguments", [{"threshold": 0.0}, {"max_age": 0}, {"ema": 1.0}, {"raised": 0.9}, {"lowered": 1.1}, {"lowered": 0.0}]
)
def test_meaningless_settings_are_refused_at_construction(arguments: dict):
    with pytest.raises(ValueError, match=r"Dynamic\."):
        Dynamic(**arguments)


# the KL that decides is not diluted


def check_undiluted(combined: Callable[[Objective, Tensor, Tensor, Tensor], Objective], seed: int, clips: int) -> None:
    """Mean distance over the clips that are marked and active, whatever the others did."""
    random = torch.Generator().manual_seed(seed)
    marks, active = torch.randint(2, (clips,), generator=random).float(), torch.rand(clips, generator=random) < 0.7
    distance = normal(seed, clips).square()
    loss = Objective(normal(seed + 1, clips), {EndpointShift: EndpointShift(distance)})
    sums = {name: value.sum() for name, value in combined(loss, distance, active, marks).metrics.items()}
    paying = (marks > 0) & active
    if paying.any():
        close(sums["kl_diluted"] / sums["frac_penalised"], distance[paying].mean(), atol=1e-12)
    else:
        assert sums["kl_diluted"] == 0 and sums["frac_penalised"] == 0


def ungated(loss: Objective, penalty: Tensor, active: Tensor, marks: Tensor) -> Objective:
    """A planted error: clips that take no part are measured as well."""
    return Objective(loss.per_clip, metrics=shift_metrics(loss, marks))


CLIPS = (st.integers(0, 2**20), st.integers(1, 8))


def test_the_kl_is_averaged_over_the_clips_that_pay():
    holds(partial(check_undiluted, combine), *CLIPS)


def test_the_dilution_check_sees_clips_that_take_no_part():
    refuted(partial(check_undiluted, ungated), *CLIPS)


def test_nothing_is_logged_where_nothing_was_measured():
    assert shift_metrics(Objective(torch.zeros(2)), None) == {}


# in training


def moving_trainer(reference: ReferenceSchedule) -> Trainer:
    return make_trainer(regularizer=VelocityKL(1e-3), optimizer=AdamW(1e-3), reference=reference)


def test_a_move_makes_the_current_policy_the_reference_and_the_next_kl_zero():
    trainer = moving_trainer(Dynamic(1e9, 2))
    metrics = [trainer.step() for _ in range(4)]
    kl = [float(m["train/kl_penalised"]) for m in metrics]
    assert [float(m["train/reference_reset"]) for m in metrics] == [0, 1, 0, 1]
    assert kl[0] == 0 and kl[1] > 0 and kl[2] == 0 and kl[3] > 0
    reference = trainer.policies.sets[REFERENCE].weights
    assert all(torch.equal(reference[name], value) for name, value in weights(trainer).items())


def test_a_frozen_reference_stays_the_initial_policy():
    trainer = moving_trainer(Frozen())
    start = weights(trainer)
    metrics = [trainer.step() for _ in range(3)]
    assert all(torch.equal(trainer.policies.sets[REFERENCE].weights[name], value) for name, value in start.items())
    assert "train/reference_reset" not in metrics[-1] and float(metrics[-1]["train/kl_penalised"]) > 0


def test_a_schedule_that_reads_a_distance_nobody_measures_is_refused():
    check_reference(Frozen(), NFT(), NoRegularizer())
    check_reference(Dynamic(), NFT(), VelocityKL())
    with pytest.raises(IncompatibleRecipe, match=r"Dynamic reads EndpointShift.*NFT with NoRegularizer"):
        check_reference(Dynamic(), NFT(), NoRegularizer())


def test_a_trainer_that_is_saved_and_loaded_continues_as_it_would_have():
    whole, first, second = (moving_trainer(Dynamic(1e9, 3)) for _ in range(3))
    for _ in range(2):
        whole.step()
        first.step()
    second.load_state_dict(first.state_dict())
    for _ in range(2):
        left, right = whole.step(), second.step()
        assert left.keys() == right.keys()
        for name, value in left.items():
            if not name.startswith("time/"):
                assert float(right[name]) == pytest.approx(float(value), rel=1e-6, abs=1e-9), name
    assert second.samples_seen == whole.samples_seen
