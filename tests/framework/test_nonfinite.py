"""NaN and infinity never pass in silence: each is named with its step, and the run stops or counts what it left out."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from framework.advantages import GroupRelative
from framework.nonfinite import NonFinite, NonFiniteRule, Skip, Stop
from framework.optimization import AdamW
from framework.trainer import Trainer
from framework.types import Advantage, Objective, Scores, VideoBatch
from rewards.shapes import ShapesReward
from strategies.regularizers.velocity_kl import VelocityKL
from strategies.surrogates.nft import NFT
from tests.framework.test_trainer import LEVELS, make_trainer, moved, weights

BAD_STEP = 1
"""The step, counted from 0, in which a planted fault acts."""


@dataclass(frozen=True)
class FailingReward(ShapesReward):
    """A reward of which one signal fails for every clip."""

    def score(self, videos: VideoBatch) -> Scores:
        scores = super().score(videos)
        broken = torch.full_like(scores.values["MQ"], torch.nan)
        return Scores.of({**scores.values, "MQ": broken})


@dataclass(frozen=True)
class InfiniteAdvantage(GroupRelative):
    """A rule that divides by nothing."""

    def __call__(self, scores: Scores, groups: Tensor, anchors: Tensor | None = None) -> Advantage:
        advantage = super().__call__(scores, groups, anchors)
        return replace(advantage, values=advantage.values / 0)


class InfiniteLoss(NFT):
    """A surrogate whose value, and so its gradient, is infinite."""

    def objective(self, statistics: Any, advantage: Advantage) -> Objective:
        loss = super().objective(statistics, advantage)
        return replace(loss, per_clip=loss.per_clip * torch.inf)


class InfiniteValue(NFT):
    """A surrogate whose value is infinite and whose gradient is not: what a check of gradients alone lets pass."""

    def objective(self, statistics: Any, advantage: Advantage) -> Objective:
        loss = super().objective(statistics, advantage)
        return replace(loss, per_clip=loss.per_clip + torch.inf)


class InfinitePenalty(VelocityKL):
    """A regularizer that overflows."""

    def penalty(self, objective: Objective, marks: Tensor | None) -> Tensor:
        return super().penalty(objective, marks) + torch.inf


def diverge(trainer: Trainer) -> None:
    """Adapters that make NaN, as after a step that was far too long."""
    with torch.no_grad():
        next(iter(trainer.policies.parameters.values())).fill_(torch.nan)


FAULTS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "reward": (lambda: {"reward": FailingReward()}, r"non-finite reward 'MQ' for all 8 clips of step 1"),
    "advantage": (lambda: {"advantage": InfiniteAdvantage()}, r"non-finite advantage at step 1"),
    "gradient": (
        lambda: {"surrogate": InfiniteLoss(level_weights=LEVELS)},
        r"non-finite gradient in blocks\..*, loss, policy_loss at update 1",
    ),
    "loss": (lambda: {"surrogate": InfiniteValue(level_weights=LEVELS)}, r"non-finite loss, policy_loss at update 1"),
    "penalty": (lambda: {"regularizer": InfinitePenalty()}, r"non-finite loss, penalty at update 1"),
}


def run_into(fault: str, rule: NonFiniteRule) -> Trainer:
    """A trainer after a sound step, with a fault put in."""
    changes = {"regularizer": VelocityKL()} if fault == "penalty" else {}
    trainer = make_trainer(nonfinite=rule, optimizer=AdamW(1e-3), **changes)
    trainer.step()
    for name, part in FAULTS[fault][0]().items():
        setattr(trainer, name, part)
    return trainer


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_finite_is_named_with_its_step_and_moves_nothing(fault: str) -> None:
    trainer = run_into(fault, Stop())
    before = weights(trainer)
    with pytest.raises(NonFinite, match=FAULTS[fault][1]) as caught:
        trainer.step()
    assert "\n" not in str(caught.value) and moved(before, weights(trainer)) == 0


@pytest.mark.parametrize("fault", FAULTS)
def test_a_skipped_step_moves_nothing_is_counted_and_the_next_one_trains(fault: str) -> None:
    trainer = run_into(fault, Skip())
    sound = {name: getattr(make_trainer(), name) for name in ("reward", "advantage", "surrogate", "regularizer")}
    before, policies = weights(trainer), dict(trainer.policies.tensors())
    average = {name: value.clone() for name, value in policies.items()}
    metrics = trainer.step()
    assert metrics == {"train/skipped_steps": 1.0}
    assert moved(before, weights(trainer)) == 0
    assert all(torch.equal(value, average[name]) for name, value in trainer.policies.tensors().items())
    assert (trainer.steps_done, trainer.samples_seen) == (2, 16)
    for name, part in sound.items():
        setattr(trainer, name, part)
    metrics = trainer.step()
    assert metrics["train/skipped_steps"] == 1.0 and moved(before, weights(trainer)) > 0


def test_a_later_update_that_is_not_finite_leaves_the_earlier_one_of_its_step() -> None:
    trainer = make_trainer(nonfinite=Skip(), optimizer=AdamW(1e-3), updates_per_rollout=2)
    alone = make_trainer(optimizer=AdamW(1e-3))
    alone.step()

    class SecondFails(NFT):
        def objective(self, statistics: Any, advantage: Advantage) -> Objective:
            loss = super().objective(statistics, advantage)
            return replace(loss, per_clip=loss.per_clip * (torch.inf if trainer.updates_done else 1))

    trainer.surrogate = SecondFails(level_weights=LEVELS)
    assert trainer.step() == {"train/skipped_steps": 1.0} and trainer.updates_done == 1
    assert moved(weights(alone), weights(trainer)) == 0


def test_a_run_that_only_skips_ends() -> None:
    trainer = run_into("gradient", Skip(limit=3))
    for _ in range(2):
        trainer.step()
    with pytest.raises(NonFinite, match=r"3 steps in a row, Skip\.limit=3"):
        trainer.step()


def test_sound_steps_in_between_start_the_count_anew_and_a_resumed_run_knows_it() -> None:
    rule = Skip(limit=2)
    rule.answer(NonFinite("one"))
    rule.passed()
    rule.answer(NonFinite("two"))
    other = Skip(limit=2)
    other.load_state_dict(rule.state_dict())
    assert other == rule and dict(other.metrics()) == {"train/skipped_steps": 2.0}
    with pytest.raises(NonFinite, match="three"):
        other.answer(NonFinite("three"))
    with pytest.raises(ValueError, match=r"Skip\.limit must be at least 1"):
        Skip(limit=0)


def test_a_policy_that_has_diverged_is_seen_in_its_latents() -> None:
    trainer = make_trainer()
    diverge(trainer)
    with pytest.raises(NonFinite, match=r"non-finite latents in the rollout of step 0: the policy has diverged"):
        trainer.step()


def test_a_run_that_stops_logs_nothing_that_it_did_not_before() -> None:
    assert "train/skipped_steps" not in make_trainer().step()


def test_one_failed_score_leaves_its_clip_out_and_the_step_goes_on() -> None:
    @dataclass(frozen=True)
    class OneFails(ShapesReward):
        def score(self, videos: VideoBatch) -> Scores:
            scores = super().score(videos)
            values = scores.values["MQ"].clone()
            values[0] = torch.nan
            return Scores.of({**scores.values, "MQ": values})

    metrics = make_trainer(reward=OneFails()).step()
    assert metrics["train/active_clips"] == 7 and float(metrics["train/frac_invalid"]) == pytest.approx(1 / 8)


def test_without_the_check_of_the_loss_an_infinite_value_would_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = run_into("loss", Stop())
    before = weights(trainer)
    monkeypatch.setattr("framework.trainer.terms", lambda metrics: {})
    trainer.step()
    assert moved(before, weights(trainer)) > 0, "the planted fault is one that gradients do not show"
