"""How the packaged generator is made: each stage moves what it owns, learns, and resumes bit for bit."""

import io
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from backbones.embedded.generator import ShapesGenerator
from framework.data.scenes import ShapesCaptions
from framework.data.shapes import PreferenceWorld
from framework.distillation_interfaces import PretrainingStage
from framework.flow import X0_SIGMA_FLOOR, add_noise, expand_sigma
from framework.rng import Streams
from framework.types import Probes
from strategies.distillation.dmd import DistributionMatching, dmd_gradient
from strategies.distillation.teacher_forcing import TeacherForcing, split_parameters
from tests.support import close, holds, normal, over, perturb, refuted, tiny_generator

SEEDS = st.integers(0, 2**20)
Gradient = Callable[[Tensor, Tensor, Tensor], Tensor]


# the DMD gradient


def check_dmd_gradient(gradient: Gradient, seed: int, clips: int) -> None:
    """(critic − teacher) / mean|x̂ − teacher|, clip by clip."""
    x0, critic, teacher = (10 * normal(seed + i, clips, 1, 3, 2, 2, 2) for i in range(3))
    found = gradient(x0, critic, teacher)
    for n in range(clips):
        distance = sum(abs(a - b) for a, b in zip(x0[n].flatten().tolist(), teacher[n].flatten().tolist(), strict=True))
        close(found[n], (critic[n] - teacher[n]) / (distance / x0[n].numel()), atol=1e-10)
    still = gradient(x0, teacher, teacher)
    assert torch.equal(still, torch.zeros_like(x0))
    assert bool(gradient(teacher, critic, teacher).isfinite().all())


def away_from_the_teacher(x0: Tensor, critic: Tensor, teacher: Tensor) -> Tensor:
    return -dmd_gradient(x0, critic, teacher)


def scaled_by_the_batch(x0: Tensor, critic: Tensor, teacher: Tensor) -> Tensor:
    return (critic - teacher) / (x0 - teacher).abs().mean().clamp(min=1e-5)


def scaled_by_the_critic(x0: Tensor, critic: Tensor, teacher: Tensor) -> Tensor:
    return dmd_gradient(x0, critic, teacher) * dmd_gradient(x0, x0, teacher).abs() / dmd_gradient(x0, x0, critic).abs()


CLIPS = st.integers(2, 4)


def test_the_distillation_gradient_is_the_published_formula():
    holds(partial(check_dmd_gradient, dmd_gradient), SEEDS, CLIPS, examples=25)


@pytest.mark.parametrize("mutant", [away_from_the_teacher, scaled_by_the_batch, scaled_by_the_critic])
def test_the_gradient_check_sees_another_sign_and_other_scales(mutant: Gradient):
    refuted(partial(check_dmd_gradient, mutant), SEEDS, CLIPS)


# one step of distillation


def snapshot(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in network.named_parameters()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def begun(stage: PretrainingStage) -> ShapesGenerator:
    generator = tiny_generator(clip_blocks=2)
    stage.begin(generator)
    return generator


def do_steps(stage: PretrainingStage, generator: ShapesGenerator, steps: range) -> dict[str, Tensor]:
    metrics = {}
    for step in steps:
        metrics = stage.step(generator, PreferenceWorld(), Streams(0).at(stage.name, step), step)
    return metrics


def small_dmd(**changes: Any) -> DistributionMatching:
    return DistributionMatching(**{"steps": 4, "batch_size": 2, "critic_warmup": 1} | changes)


def check_roles(stage: DistributionMatching) -> None:
    """The teacher never moves, the critic learns from the first step, the student only after the critic's warm-up."""
    generator = begun(stage)
    networks = {"student": generator.network, "critic": stage.critic, "teacher": stage.teacher_network}
    places = {name: {p.data_ptr() for p in network.parameters()} for name, network in networks.items()}
    assert not places["student"] & places["critic"] and not (places["student"] | places["critic"]) & places["teacher"]
    start = snapshot(generator.network)
    assert all(same(snapshot(network), start) for network in networks.values())
    metrics = do_steps(stage, generator, range(1))
    assert metrics.keys() == {"critic_loss"}
    assert same(snapshot(generator.network), start) and not same(snapshot(stage.critic), start)
    metrics = do_steps(stage, generator, range(1, 3))
    assert metrics.keys() == {"critic_loss", "dmd_gradient_rms", "grad_norm"}
    assert all(bool(value.isfinite()) and not value.requires_grad for value in metrics.values())
    assert not same(snapshot(generator.network), start)
    assert same(snapshot(stage.teacher_network), start)
    assert not any(p.requires_grad or p.grad is not None for p in stage.teacher_network.parameters())


class LearningTeacher(DistributionMatching):
    """A planted error: the teacher is the student."""

    def begin(self, generator):
        super().begin(generator)
        self.teacher_network = generator.network


class ImpatientStudent(DistributionMatching):
    """A planted error: no warm-up of the critic."""

    def step(self, generator, data, streams, step):
        return super().step(generator, data, streams, step + self.critic_warmup)


def test_teacher_critic_and_student_keep_to_their_roles():
    check_roles(small_dmd())


@pytest.mark.parametrize("mutant", [LearningTeacher, ImpatientStudent])
def test_the_roles_check_sees_a_teacher_that_learns_and_a_student_that_does_not_wait(mutant):
    with pytest.raises(AssertionError):
        check_roles(mutant(steps=4, batch_size=2, critic_warmup=1))


def test_a_critic_that_agrees_with_the_teacher_moves_the_student_exactly_nowhere():
    stage = small_dmd(critic_learning_rate=0.0, critic_warmup=0)
    generator = begun(stage)
    start = snapshot(generator.network)
    metrics = do_steps(stage, generator, range(2))
    assert metrics["dmd_gradient_rms"] == 0 and same(snapshot(generator.network), start)
    perturb(stage.critic, 1, std=0.02)
    assert do_steps(stage, generator, range(2, 3))["dmd_gradient_rms"] > 0
    assert not same(snapshot(generator.network), start)


def test_the_students_step_does_not_reach_the_critic():
    critics = []
    for rate in (0.0, 1e-2):
        stage = small_dmd(learning_rate=rate, critic_warmup=0)
        do_steps(stage, begun(stage), range(1))
        critics.append(snapshot(stage.critic))
    assert same(*critics)


def test_the_critic_learns_the_students_clips():
    stage = small_dmd(batch_size=4, critic_warmup=100, critic_learning_rate=4e-3)
    generator = begun(stage)
    prompts = tuple(str(c) for c in PreferenceWorld().sample(4, 1, torch.Generator().manual_seed(0))[1])
    _, clips = stage.roll_out(generator, prompts, torch.Generator().manual_seed(1))
    losses = [float(stage.train_critic(generator, prompts, clips, torch.Generator().manual_seed(2))) for _ in range(12)]
    assert losses[-1] < 0.8 * losses[0]


def test_a_rollout_of_the_student_holds_its_visited_states_and_no_graph():
    stage = small_dmd()
    generator = begun(stage)
    prompts = tuple(str(scene.prompt) for scene in ShapesCaptions(limit=2).scenes())
    states, clips = stage.roll_out(generator, prompts, torch.Generator().manual_seed(0))
    assert states.shape == (2, 4, 3, 6, 16, 16) and clips.shape == (2, 3, 6, 16, 16)
    assert not states.requires_grad and not clips.requires_grad
    again = stage.roll_out(generator, prompts, torch.Generator().manual_seed(0))
    assert torch.equal(again[0], states)


def test_finishing_leaves_the_average_in_the_network():
    for stage in (small_dmd(critic_warmup=0), TeacherForcing(steps=4, batch_size=2)):
        generator = begun(stage)
        do_steps(stage, generator, range(2))
        last, average = snapshot(generator.network), {k: v.clone() for k, v in stage.average.weights.items()}
        stage.finish(generator)
        assert same(snapshot(generator.network), {k: average[k] for k in last}) and not same(last, average)


# teacher forcing


def validation_loss(stage: TeacherForcing, generator: ShapesGenerator) -> float:
    """The loss at fixed clips and noise."""
    clean, captions = PreferenceWorld().sample(8, 6, torch.Generator().manual_seed(100))
    probes = stage.probes(clean, captions, 3, 5.0, torch.Generator().manual_seed(101))
    with torch.no_grad():
        return float((generator.replay(probes) - probes.extra["target"]).square().mean())


def check_it_learns(stage: TeacherForcing) -> None:
    generator = begun(stage)
    before = validation_loss(stage, generator)
    do_steps(stage, generator, range(12))
    assert validation_loss(stage, generator) < 0.7 * before


def test_a_few_steps_of_teacher_forcing_lower_the_loss():
    check_it_learns(TeacherForcing(steps=200, batch_size=4, warmup=1))


def test_the_learning_check_sees_optimisers_that_do_nothing():
    with pytest.raises(AssertionError):
        check_it_learns(TeacherForcing(steps=200, batch_size=4, warmup=1, learning_rate=0.0, adamw_learning_rate=0.0))


def check_probes(probes: Probes, clean: Tensor) -> None:
    """One level per block, above the floor, independent between blocks and streams; the clip itself is the context."""
    blocks = probes.sigma.unflatten(-1, (-1, 3))
    assert bool((blocks == blocks[..., :1]).all()) and bool((probes.sigma >= X0_SIGMA_FLOOR).all())
    drawn = [level for level in blocks[..., 0].flatten().tolist() if level > 1.001 * X0_SIGMA_FLOOR]
    assert len(set(drawn)) == len(drawn)
    noise = probes.extra["target"] + clean.unsqueeze(1)
    close(probes.noisy, add_noise(clean.unsqueeze(1), noise, expand_sigma(probes.sigma)), atol=1e-5)
    assert probes.clean is clean and probes.history_grad and probes.prefix is None and probes.start == 0


@over(st.integers(1, 4), st.integers(1, 3), SEEDS, examples=15)
def test_every_block_of_a_clip_is_asked_at_its_own_level(clips: int, streams: int, seed: int):
    clean, captions = PreferenceWorld().sample(clips, 9, torch.Generator().manual_seed(seed))
    stage = TeacherForcing(noisy_streams=streams)
    probes = stage.probes(clean, captions, 3, 5.0, torch.Generator().manual_seed(seed))
    check_probes(probes, clean)
    assert probes.noisy.shape[1] == streams and probes.prompts == tuple(str(c) for c in captions)


@pytest.mark.parametrize(
    "plant",
    [
        lambda sigma: sigma.roll(1, dims=-1),  # blocks cut elsewhere
        lambda sigma: sigma[..., :1].expand_as(sigma),  # one level for all blocks
        lambda sigma: sigma[:, :1].expand_as(sigma),  # one level for all streams
        lambda sigma: sigma * 0.01,  # below the floor
    ],
)
def test_the_level_check_sees_levels_drawn_wrong(plant):
    clean, captions = PreferenceWorld().sample(2, 9, torch.Generator().manual_seed(0))
    probes = TeacherForcing(noisy_streams=2).probes(clean, captions, 3, 5.0, torch.Generator().manual_seed(0))
    with pytest.raises(AssertionError):
        check_probes(replace(probes, sigma=plant(probes.sigma)), clean)


def test_the_rate_warms_up_holds_and_cools_down():
    stage = TeacherForcing(steps=100, warmup=10, cooldown=0.3)
    rates = [stage.rate(step) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == rates[69] == 1.0 and all(rate > 0 for rate in rates)
    assert rates[85] == pytest.approx(0.5) and rates[99] == pytest.approx(1 / 30)
    assert rates[:10] == sorted(rates[:10]) and rates[70:] == sorted(rates[70:], reverse=True)


def test_no_warm_up_and_no_cool_down_are_settings_too():
    assert [TeacherForcing(steps=3, warmup=0, cooldown=0.0).rate(step) for step in range(3)] == [1.0, 1.0, 1.0]


def test_every_parameter_has_exactly_one_optimiser():
    network = tiny_generator().network
    matrices, others = split_parameters(network)
    assert {id(p) for p in matrices}.isdisjoint({id(p) for p in others})
    assert len(matrices) + len(others) == len(list(network.parameters()))
    assert all(p.ndim == 2 for p in matrices) and len(matrices) == 2 * 10


# resuming a stage


STAGES: dict[str, Callable[[], PretrainingStage]] = {
    "teacher forcing": lambda: TeacherForcing(steps=4, batch_size=2, warmup=2),
    "distribution matching": small_dmd,
}


def check_stage_resumes(carry: Callable[[PretrainingStage], dict], make: Callable[[], PretrainingStage]) -> None:
    """Two steps, a state, two more in a new process == four steps, bit for bit."""
    whole = make()
    generator = begun(whole)
    do_steps(whole, generator, range(2))
    network = {name: value.clone() for name, value in generator.network.state_dict().items()}
    state = carry(whole)
    do_steps(whole, generator, range(2, 4))

    rest, other = make(), tiny_generator(clip_blocks=2, seed=99)
    other.network.load_state_dict(network)
    rest.begin(other)
    rest.load_state_dict(state)
    do_steps(rest, other, range(2, 4))
    for stage, made in ((whole, generator), (rest, other)):
        stage.finish(made)
    assert same(snapshot(generator.network), snapshot(other.network))


def carried(stage: PretrainingStage) -> dict:
    """A state as it comes back from disk."""
    buffer = io.BytesIO()
    torch.save(stage.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def without_moments(stage: PretrainingStage) -> dict:
    """A planted error: the optimisers start anew."""
    state = carried(stage)
    optimizers = state["optimizers"] if "optimizers" in state else [state["optimizer"], state["critic_optimizer"]]
    for optimizer in optimizers:
        optimizer["state"] = {}
    return state


def without_the_average(stage: PretrainingStage) -> dict:
    """A planted error: the average starts anew from what it was at first."""
    state = carried(stage)
    state["average"] = {name: value.clone() for name, value in tiny_generator().network.state_dict().items()}
    return state


@pytest.mark.parametrize("make", STAGES.values(), ids=STAGES)
def test_a_resumed_stage_is_the_uninterrupted_one_bit_for_bit(make):
    check_stage_resumes(carried, make)


@pytest.mark.parametrize("make", STAGES.values(), ids=STAGES)
@pytest.mark.parametrize("mutant", [without_moments, without_the_average])
def test_the_resume_check_sees_what_was_not_saved(make, mutant):
    with pytest.raises(AssertionError):
        check_stage_resumes(mutant, make)
