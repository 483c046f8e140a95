"""A stream whose first block is sampled on a schedule of its own: it alone, whatever comes before or after."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from backbones.history import FullHistory
from framework.distillation import roll_out_student
from framework.interfaces import GeneratorRecipe
from framework.kernels import Consistency
from framework.records import Endpoints, OnPolicyTransitions, Predictions, Record
from framework.rollout import (
    blank_tape,
    check_routes,
    check_windows,
    denoise_block,
    generate_blocks,
    noise_count,
    noise_shape,
    roll_out,
)
from framework.schedules import FewStepSchedule
from framework.selfchecks import replay_deviation
from framework.types import BranchPlan, GroupPlan, Scene
from tests.backbones.micro import LATENT, PROMPTS, MicroGenerator, micro_generator, noise
from tests.support import PROMPTS as CAPTIONS
from tests.support import tiny_generator

FOUR, TWO, ONE = (FewStepSchedule(steps) for steps in ((1000, 750, 500, 250), (1000, 500), (1000,)))
SHORTER = [TWO, ONE]
KERNEL = Consistency()


def framewise(schedule: FewStepSchedule = TWO, first: FewStepSchedule | None = FOUR) -> MicroGenerator:
    """The micro network, one frame at a time, few steps a frame and more for the first."""
    generator = micro_generator(FullHistory(), 1)
    generator.recipe = replace(generator.recipe, schedule=schedule, first_schedule=first)
    return generator


def draws(generator: MicroGenerator, blocks: int) -> Tensor:
    return noise(3, 2, *noise_shape(generator, KERNEL, blocks))


@torch.no_grad()
def by_hand(generator: MicroGenerator, x: Tensor) -> Tensor:
    """Every block by the sampler's rule, with its own list of levels."""
    stream, blocks = generator.open(PROMPTS[:2]), []
    for block in range(x.shape[3]):
        drawn = x[:, :, :, [block]]
        levels = [1.0, 0.9375, 5 / 6, 0.625] if block == 0 else [1.0, 5 / 6]
        state = drawn[:, 0]
        for k, sigma in enumerate(levels):
            x0 = state - sigma * generator.predict(state, sigma, stream)
            state = x0 if k == len(levels) - 1 else (1 - levels[k + 1]) * x0 + levels[k + 1] * drawn[:, k + 1]
        stream = generator.commit(state, stream)
        blocks.append(state)
    return torch.cat(blocks, dim=2)


def test_the_first_block_takes_its_own_steps_and_the_others_the_usual_ones():
    generator = framewise()
    x = draws(generator, 4)
    with torch.no_grad():
        traces = list(generate_blocks(generator, generator.open(PROMPTS[:2]), x, KERNEL))
    assert [len(trace.velocities) for trace in traces] == [4, 2, 2, 2]
    found, expected = torch.cat([trace.x0 for trace in traces], dim=2), by_hand(generator, x)
    assert (found - expected).abs().max() < 1e-10
    with torch.no_grad():
        plain = framewise(first=None)
        other = next(iter(generate_blocks(plain, plain.open(PROMPTS[:2]), x, KERNEL))).x0
    assert (other - expected[:, :, :1]).abs().max() > 1e-3


@pytest.mark.parametrize("schedule", SHORTER)
def test_a_stream_that_continues_given_frames_has_no_first_block(schedule: FewStepSchedule):
    generator = framewise(schedule)
    with torch.no_grad():
        stream = generator.commit(noise(9, 2, LATENT[0], 1, *LATENT[1:]), generator.open(PROMPTS[:2]))
        trace = denoise_block(generator, stream, draws(generator, 1), KERNEL)
    assert len(trace.velocities) == len(schedule.sigmas)


def test_as_many_noises_are_drawn_for_every_block_as_the_longer_schedule_takes():
    for schedule in SHORTER:
        for first in (FOUR, None):
            recipe = framewise(schedule, first).recipe
            assert noise_count(KERNEL, recipe) == (4 if first else len(schedule.sigmas))
    assert noise_count(KERNEL, framewise(FOUR, ONE).recipe) == 4


def plan(first_block: int, blocks: int = 2, seeds: tuple[int, ...] = (5, 6)) -> GroupPlan:
    scene = Scene.single(CAPTIONS[0])
    return GroupPlan(0, scene, first_block, blocks, 77, tuple(BranchPlan(seed) for seed in seeds))


def shapes(first: FewStepSchedule | None = FOUR):
    generator = tiny_generator()
    generator.recipe = replace(generator.recipe, schedule=TWO, first_schedule=first)
    return generator


def test_the_noise_of_a_clip_depends_on_its_seed_and_block_alone():
    generator = shapes()
    together = roll_out(generator, [plan(0)], KERNEL)[Endpoints].latents
    alone = [roll_out(generator, [plan(0, seeds=(seed,))], KERNEL)[Endpoints].latents for seed in (5, 6)]
    assert (together - torch.cat(alone)).abs().max() < 1e-5
    short = roll_out(generator, [plan(2, 1)], KERNEL)[Endpoints].prefix
    long = roll_out(generator, [plan(4, 1)], KERNEL)[Endpoints].prefix
    assert short is not None and long is not None
    assert (long[:, :, : short.shape[2]] - short).abs().max() < 1e-5


def test_a_window_behind_the_first_block_is_rolled_out_and_replayed_as_ever():
    generator = shapes()
    tape = roll_out(generator, [plan(1)], KERNEL, frozenset({Predictions}))
    assert tape[Predictions].states.shape[1] == 2 and replay_deviation(generator, tape) < 1e-5


@pytest.mark.parametrize("kind", [Predictions, OnPolicyTransitions])
def test_a_trained_window_with_the_first_block_is_refused_in_one_line(kind: type[Record]):
    generator = shapes()
    refused = pytest.raises(ValueError, match=r"window starts at frame 0, .* first_schedule=None$")
    with refused:
        roll_out(generator, [plan(0)], KERNEL, frozenset({kind}))
    with refused:
        blank_tape([plan(0)], generator.recipe, KERNEL, frozenset({Endpoints}))
    with refused:
        check_routes(generator, plan(0), [Scene.single(CAPTIONS[0])])
    check_windows([plan(0)], shapes(None).recipe)
    check_windows([plan(1)], generator.recipe)


def test_a_student_is_not_distilled_on_two_schedules():
    with pytest.raises(ValueError, match="distill with first_schedule=None"):
        roll_out_student(shapes(), CAPTIONS[:1], torch.Generator().manual_seed(0))


def test_a_recipe_without_a_first_schedule_has_one_schedule():
    recipe = GeneratorRecipe("one", 1, 1, LATENT, TWO)
    assert [recipe.schedule_at(frame) for frame in (0, 1, 7)] == [TWO] * 3
    assert [replace(recipe, first_schedule=FOUR).schedule_at(frame) for frame in (0, 1, 7)] == [FOUR, TWO, TWO]
