"""One loop trains: everything trainable moves, nothing that is gated does, and the same seed is the same run."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from framework.accounting import Scalars
from framework.adapters import LoRA
from framework.advantages import GroupRelative
from framework.compatibility import check_recipe
from framework.optimization import AdamW, Constant
from framework.policies import AVERAGE, REFERENCE, Policies
from framework.records import OnPolicyTransitions
from framework.rng import Streams
from framework.rollout import roll_out
from framework.trainer import Trainer, combine
from framework.types import Advantage, Loss, Objective, Scene, Scores, VideoBatch
from rewards.shapes import ShapesReward
from strategies.exploration.noise_endpoint import NoiseEndpoint
from strategies.regularizers.none import NoRegularizer
from strategies.regularizers.velocity_kl import VelocityKL
from strategies.surrogates.nft import NFT
from tests.support import PROMPTS, Brightness, close, holds, normal, refuted, tiny_generator

LEVELS = (0.0, 1.0, 1.0, 1.0)


def make_trainer(**changes: Any) -> Trainer:
    """Two prompts × four branches of a tiny generator; ``adaptation`` and any field of Trainer can be changed."""
    generator = tiny_generator(clip_blocks=2)
    adaptation = changes.pop("adaptation", LoRA(4))
    fields: dict[str, Any] = {
        "generator": generator, "exploration": NoiseEndpoint(4), "surrogate": NFT(level_weights=LEVELS),
        "reward": ShapesReward(), "advantage": GroupRelative(), "regularizer": NoRegularizer(),
        "policies": Policies(generator, adaptation, Constant(0.0), 0.9, seed=0), "optimizer": AdamW(1e-5),
        "scenes": tuple(Scene.single(prompt) for prompt in PROMPTS), "seed": 0, "prompts_per_step": 2,
        "updates_per_rollout": 1, "micro_batch_size": 48,
    } | changes  # fmt: skip
    parts = [fields[name] for name in ("exploration", "surrogate", "advantage", "regularizer")]
    return Trainer(**fields, keep=check_recipe(*parts))


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.policies.parameters.items()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    """Share of the entries that changed."""
    changed = sum(int((before[name] != after[name]).sum()) for name in before)
    return changed / sum(value.numel() for value in before.values())


# it trains


def check_everything_moves(trainer: Trainer) -> None:
    """At B = 0 the gradient of A is zero: B alone moves in the first step, everything after the second."""
    start = weights(trainer)
    trainer.step()
    first = weights(trainer)
    assert all(torch.equal(start[name], first[name]) for name in start if ".lora_A." in name)
    assert moved(*({n: v for n, v in w.items() if ".lora_B." in n} for w in (start, first))) > 0.99
    trainer.step()
    assert moved(start, weights(trainer)) > 0.99


@dataclass(frozen=True)
class HalfPrecisionLoRA(LoRA):
    """A planted error: adapters in bf16, whose last bit is larger than a step of 1e-5."""

    def attach(self, network: nn.Module, seed: int) -> dict[str, nn.Parameter]:
        parameters = super().attach(network, seed)
        for parameter in parameters.values():
            parameter.data = parameter.data.bfloat16()
        return parameters


def test_all_adapter_entries_move_in_two_steps_at_a_rate_of_one_in_a_hundred_thousand():
    check_everything_moves(make_trainer())


def test_the_movement_check_sees_adapters_in_half_precision():
    with pytest.raises(AssertionError):
        check_everything_moves(make_trainer(adaptation=HalfPrecisionLoRA(4)))


TAGS = {
    "train/loss", "train/policy_loss", "train/penalty", "train/grad_norm", "train/lr", "train/distance_to_old",
    "train/advantage_abs_mean", "train/advantage_clip_fraction", "train/group_std_mean", "train/frac_zero_std",
    "train/frac_invalid", "train/active_clips", "reward/VQ/mean", "reward/VQ/std", "reward/MQ/mean", "reward/MQ/std",
    "reward/TA/mean", "reward/TA/std", "reward/total", "time/rollout_s", "time/reward_s", "time/update_s",
}  # fmt: skip


def test_a_step_reports_finite_numbers_under_the_public_tags():
    trainer = make_trainer()
    for step in range(2):
        metrics = trainer.step()
        assert metrics.keys() == TAGS
        assert all(math.isfinite(float(value)) for value in metrics.values())
        assert not any(isinstance(value, Tensor) and value.requires_grad for value in metrics.values())
        assert metrics["train/active_clips"] == 8 and trainer.samples_seen == 8 * (step + 1)
        total = sum(float(metrics[f"reward/{name}/mean"]) for name in ("VQ", "MQ", "TA")) / 3
        assert float(metrics["reward/total"]) == pytest.approx(total, abs=1e-6)


def trajectory(**changes: Any) -> list[dict[str, float]]:
    trainer = make_trainer(**changes)
    return [timeless(trainer.step()) for _ in range(2)]


def timeless(metrics: Scalars) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if not name.startswith("time/")}


def test_the_same_seed_is_the_same_run_whatever_was_drawn_before():
    torch.manual_seed(1)
    first = trajectory(seed=3)
    torch.manual_seed(2)
    torch.rand(10)
    assert trajectory(seed=3) == first
    assert trajectory(seed=4) != first


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_the_micro_batch_changes_no_result(micro_batch_size: int):
    whole, split = trajectory()[0], trajectory(micro_batch_size=micro_batch_size)[0]
    for name, value in whole.items():
        assert split[name] == pytest.approx(value, rel=1e-4, abs=1e-6)


def test_several_updates_share_a_rollout():
    trainer = make_trainer(updates_per_rollout=3)
    trainer.step()
    assert (trainer.steps_done, trainer.updates_done, trainer.samples_seen) == (1, 3, 8)


def check_work(trainer: Trainer, replays: int) -> None:
    """How many forward passes an update costs: a policy that nobody reads, or that equals the current one, is free."""
    calls: list[int] = []
    real = trainer.generator.replay
    trainer.generator.replay = lambda probes: calls.append(1) or real(probes)
    trainer.step()
    calls.clear()
    trainer.step()
    assert len(calls) == replays


def test_an_update_pays_only_for_the_policies_that_are_read():
    check_work(make_trainer(), 1)
    check_work(make_trainer(regularizer=VelocityKL(1e-2)), 2)
    with pytest.raises(AssertionError):
        check_work(make_trainer(regularizer=VelocityKL(1e-2)), 1)


def test_the_kl_to_the_reference_is_zero_in_the_first_step_and_not_in_the_third():
    trainer = make_trainer(regularizer=VelocityKL(1.0), optimizer=AdamW(1e-3))
    penalties = [float(trainer.step()["train/penalty"]) for _ in range(3)]
    assert penalties[0] == 0 and penalties[1] > 0 and penalties[2] > 0


# gates


@dataclass(frozen=True)
class Failing(Brightness):
    """A reward that cannot score every ``every``-th clip."""

    every: int = 1

    def score(self, videos: VideoBatch) -> Scores:
        scores = super().score(videos)
        failed = torch.arange(len(videos)) % self.every == 0
        return Scores.of({name: value.masked_fill(failed, torch.nan) for name, value in scores.values.items()})


@dataclass(frozen=True)
class Closed(GroupRelative):
    """A rule whose gate lets nothing through."""

    def __call__(self, scores: Scores, groups: Tensor, anchors: Tensor | None = None) -> Advantage:
        advantage = super().__call__(scores, groups, anchors)
        return replace(advantage, active=torch.zeros_like(advantage.active))


def test_without_an_active_clip_nothing_moves_not_even_by_momentum():
    trainer = make_trainer(regularizer=VelocityKL(1.0), optimizer=AdamW(1e-3), reward=Brightness())
    trainer.step()
    before, updates = weights(trainer), trainer.updates_done
    trainer.advantage = Closed()
    metrics = trainer.step()
    assert moved(before, weights(trainer)) == 0 and trainer.updates_done == updates
    assert metrics["train/active_clips"] == 0
    assert "train/loss" not in metrics
    trainer.advantage = GroupRelative()
    trainer.step()
    assert moved(before, weights(trainer)) > 0.9


def test_a_failed_score_drops_its_clip_and_no_other():
    metrics = make_trainer(reward=Failing(every=4)).step()
    assert metrics["train/active_clips"] == 6 and metrics["train/frac_invalid"] == 0.25
    assert all(math.isfinite(float(value)) for value in metrics.values())


Combine = Callable[[Objective, Tensor, Tensor], Objective]


def check_gate(combined: Combine, seed: int, clips: int) -> None:
    """A gated clip has gradient exactly 0 in policy term and penalty; the others are untouched by the gate."""
    active = torch.rand(clips, generator=torch.Generator().manual_seed(seed)) < 0.5
    policy, penalty = normal(seed, clips).requires_grad_(), normal(seed + 1, clips).requires_grad_()
    result = combined(Objective(policy.square(), metrics={"m": policy.detach()}), penalty.square(), active)
    gradients = torch.autograd.grad(result.per_clip.sum(), (policy, penalty))
    for gradient, term in zip(gradients, (policy, penalty), strict=True):
        assert bool((gradient[~active] == 0).all())
        close(gradient[active], 2 * term.detach()[active], atol=1e-12)
    assert all(bool((value[~active] == 0).all()) for value in result.metrics.values())
    assert result.metrics.keys() == {"policy_loss", "penalty", "m"}


def penalty_outside_the_gate(loss: Objective, penalty: Tensor, active: Tensor) -> Objective:
    gated = combine(loss, torch.zeros_like(penalty), active)
    return replace(gated, per_clip=gated.per_clip + penalty)


def halving(loss: Objective, penalty: Tensor, active: Tensor) -> Objective:
    """A gate of one half, as one release has it."""
    return combine(loss, penalty, 0.5 + 0.5 * active)


GATES = (st.integers(0, 2**20), st.integers(1, 8))


def test_a_gated_clip_contributes_exactly_nothing():
    holds(partial(check_gate, combine), *GATES)


@pytest.mark.parametrize("mutant", [penalty_outside_the_gate, halving])
def test_the_gate_check_sees_a_penalty_outside_it_and_a_gate_of_one_half(mutant: Combine):
    refuted(partial(check_gate, mutant), *GATES)


def gradients_with(combined: Combine, spoilt: bool) -> dict[str, Tensor]:
    """Gradients of one update in which clip 1 of 4 is gated; spoilt: its own probes are made wild."""
    trainer = make_trainer(regularizer=VelocityKL(1.0))
    for i, parameter in enumerate(trainer.policies.parameters.values()):
        parameter.data += 0.05 * normal(i, *parameter.shape).float()
    trainer.policies.stepped()
    plans = trainer.exploration.plan(trainer.scenes[:1], [0], trainer.generator.recipe, Streams(0))
    tape = roll_out(trainer.generator, plans, trainer.exploration.kernel, trainer.keep)
    (probes,) = trainer.surrogate.probes(tape, trainer.generator.recipe, Streams(0).at("probes"))
    if spoilt:
        wild = probes.noisy.clone()
        wild[1] *= 7
        probes = replace(probes, noisy=wild)
    advantage = trainer.advantage(Scores.of({"a": torch.tensor([0.1, torch.nan, 0.7, 0.4])}), tape.groups)

    def judge(statistics, rows):
        loss = trainer.surrogate.objective(statistics, advantage)
        return combined(loss, trainer.regularizer.penalty(loss, None), advantage.active)

    loss = Loss(trainer.view_names, trainer.surrogate.statistics, judge)
    trainer.policies.backward(loss, probes, 48, int(advantage.active.sum()))
    return {name: p.grad.clone() for name, p in trainer.policies.parameters.items() if p.grad is not None}


def check_gated_clips_are_invisible(combined: Combine) -> None:
    plain, spoilt = gradients_with(combined, False), gradients_with(combined, True)
    for name, gradient in plain.items():
        close(gradient, spoilt[name], atol=1e-5 * float(gradient.abs().max()) + 1e-9)


def test_what_a_gated_clip_looked_like_does_not_reach_the_weights():
    check_gated_clips_are_invisible(combine)


def test_the_visibility_check_sees_a_penalty_outside_the_gate():
    with pytest.raises(AssertionError):
        check_gated_clips_are_invisible(penalty_outside_the_gate)


class Poisoned(NFT):
    """A planted error: an infinite loss."""

    def objective(self, statistics, advantage):
        loss = super().objective(statistics, advantage)
        return replace(loss, per_clip=loss.per_clip * torch.inf)


def test_a_non_finite_gradient_stops_the_run_with_a_named_parameter_and_moves_nothing():
    trainer = make_trainer(surrogate=Poisoned(level_weights=LEVELS))
    before = weights(trainer)
    with pytest.raises(FloatingPointError, match=r"non-finite gradient in blocks\.\d\..*lora_[AB].* at update 0"):
        trainer.step()
    assert moved(before, weights(trainer)) == 0


def test_averaged_and_reference_policies_are_what_they_are_called():
    trainer = make_trainer(optimizer=AdamW(1e-3))
    start = weights(trainer)
    trainer.step()
    current = weights(trainer)
    for name, value in start.items():
        assert torch.equal(trainer.policies.sets[REFERENCE].weights[name], value)
        close(trainer.policies.sets[AVERAGE].weights[name], 0.1 * value + 0.9 * current[name], atol=1e-7)


class ReadsTransitions(NFT):
    """A surrogate that needs the density of every step."""

    reads = NFT.reads | {OnPolicyTransitions}

    def probes(self, tape, recipe, generator):
        assert tape[OnPolicyTransitions].states.shape[1] == len(recipe.schedule.sigmas)
        return super().probes(tape, recipe, generator)


def test_every_record_that_is_read_is_kept():
    make_trainer(surrogate=ReadsTransitions(level_weights=LEVELS)).step()
