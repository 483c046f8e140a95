"""Rolling out some branches of a group after the others: the same clips and records in less memory."""

import weakref
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import p6
from benchmarks.measure import LiveBytes
from benchmarks.scenarios import random_generator
from framework import rollout
from framework.distributed import World
from framework.evaluation import EvaluationResult, evaluate_policy
from framework.kernels import Consistency
from framework.records import Anchors, Endpoints, Predictions, Transitions
from framework.rollout import BlockTrace, roll_out
from framework.run_shape import estimate_step
from framework.types import GroupPlan, Scene, Segment, Tape
from strategies.surrogates import nft
from tests.ranks import make
from tests.routed import KEPT, WINDOW, plans_at
from tests.support import PROMPTS, Brightness, close, group_plans, tiny_generator

NOISE = frozenset({Endpoints, Predictions, Anchors, Transitions})


def check_same_tape(one: Tape, other: Tape) -> None:
    assert one.plans == other.plans and one.records.keys() == other.records.keys()
    for kind, record in one.records.items():
        for field in fields(record):  # pyright: ignore[reportArgumentType]
            value, again = getattr(record, field.name), getattr(other.records[kind], field.name)
            if isinstance(value, Tensor):
                assert value.shape == again.shape
                close(value.double(), again.double(), atol=1e-9)
            else:
                assert value == again


def in_parts(plans: list[GroupPlan], keep: frozenset, at_once: int | None) -> Tape:
    return roll_out(tiny_generator(torch.float64, policy=WINDOW), plans, Consistency(), keep, at_once)


@pytest.mark.parametrize("at_once", [1, 2, 3, 9])
@pytest.mark.parametrize("start", [0, 2])
def test_clips_and_records_are_those_of_one_batch(start: int, at_once: int):
    plans = group_plans(PROMPTS[:2], branches=5, blocks=2, first_block=start)
    check_same_tape(in_parts(plans, NOISE, at_once), in_parts(plans, NOISE, None))


@pytest.mark.parametrize("at_once", [1, 3])
def test_routed_branches_and_their_anchor_too(at_once: int):
    plans = plans_at(5)
    check_same_tape(in_parts(plans, KEPT, at_once), in_parts(plans, KEPT, None))


@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("start", [0, 1, 2])
def test_prompts_that_switch_before_with_and_in_the_window_do_too(start: int, at_once: int):
    def switching(plan: GroupPlan, *frames: int) -> GroupPlan:
        return replace(plan, scene=Scene("s", (Segment(PROMPTS[0]), *(Segment(PROMPTS[5], f) for f in frames))))

    plain = group_plans(PROMPTS[:3], branches=3, blocks=3, first_block=start)
    plans = [switching(plan, *frames) for plan, frames in zip(plain, ((6,), (3, 9), ()), strict=True)]
    one, other = in_parts(plans, NOISE, at_once), in_parts(plans, NOISE, None)
    check_same_tape(one, other)
    ends, unswitched = other[Endpoints].latents, in_parts(plain, NOISE, None)[Endpoints].latents
    assert not torch.allclose(ends, unswitched), "the switches show"


def test_a_rollout_does_not_keep_what_its_first_block_saw(monkeypatch: pytest.MonkeyPatch):
    generator, forked, alive = tiny_generator(), [], []
    fork, denoise = generator.fork, rollout.denoise_block

    def watched_fork(*arguments: Any) -> Any:
        stream = fork(*arguments)
        forked.append(weakref.ref(stream))
        return stream

    def watched_block(*arguments: Any) -> BlockTrace:
        alive.append(bool(forked) and forked[-1]() is not None)
        return denoise(*arguments)

    monkeypatch.setattr(generator, "fork", watched_fork)
    monkeypatch.setattr(rollout, "denoise_block", watched_block)
    roll_out(generator, group_plans(PROMPTS[:1], branches=2, blocks=3), Consistency())
    assert alive == [True, False, False]


@pytest.mark.parametrize("first_block", [0, 2])
@pytest.mark.parametrize("at_once", [1, 2, 3, 4, 6, 8])
def test_evaluation_holds_no_more_clips_at_once_than_it_may(
    first_block: int, at_once: int, monkeypatch: pytest.MonkeyPatch
):
    scenes = [Scene.single(prompt) for prompt in PROMPTS[:3]]

    def evaluated(clips: int) -> EvaluationResult:
        generator = tiny_generator(torch.float64)
        return evaluate_policy(generator, Brightness(), scenes, 4, 0, 1, first_block, clips_per_batch=clips)

    whole, rows = evaluated(48), []
    denoise = rollout.denoise_block

    def watched(generator: Any, stream: Any, noise: Tensor, *rest: Any) -> BlockTrace:
        rows.append(len(noise))
        return denoise(generator, stream, noise, *rest)

    monkeypatch.setattr(rollout, "denoise_block", watched)
    parts = evaluated(at_once)
    assert max(rows) <= at_once
    for name, value in whole.scores.items():
        close(parts.scores[name], value, atol=1e-6)
    assert parts.videos.windows == whole.videos.windows
    assert int((parts.videos.frames.int() - whole.videos.frames.int()).abs().max()) <= 1


def part_after_part(parts: list[list[BlockTrace]], groups: int) -> list[BlockTrace]:
    """A planted error: the clips of a part side by side, so that a group's clips are not."""
    return [
        BlockTrace(
            tuple(map(torch.cat, zip(*(t.states for t in block), strict=True))),
            tuple(map(torch.cat, zip(*(t.velocities for t in block), strict=True))),
        )
        for block in zip(*parts, strict=True)
    ]


def test_the_comparison_sees_clips_in_another_order(monkeypatch: pytest.MonkeyPatch):
    plans = group_plans(PROMPTS[:2], branches=4, blocks=2)
    whole = in_parts(plans, NOISE, None)
    monkeypatch.setattr(rollout, "joined_traces", part_after_part)
    with pytest.raises(AssertionError):
        check_same_tape(in_parts(plans, NOISE, 2), whole)


@pytest.mark.parametrize("recipe", ["nft", "kvpo"])
def test_a_step_is_the_same_up_to_rounding(recipe: str, monkeypatch: pytest.MonkeyPatch):
    for module in (rollout, nft):  # what `make` puts there is for its own kind of process
        monkeypatch.setattr(module, "draw_noise", module.draw_noise)
    whole, parts = make(recipe, World()), make(recipe, World(), branches_at_once=1)
    one, other = whole.step(), parts.step()
    for name in ("train/loss", "train/grad_norm", "reward/total"):
        assert float(other[name]) == pytest.approx(float(one[name]), rel=1e-6), name
    for name, value in whole.policies.tensors().items():
        close(parts.policies.tensors()[name], value, atol=1e-9)


def test_the_estimate_follows_what_a_rollout_in_parts_holds():
    """In parts of two of eight branches a rollout holds far less, as counted, and the estimate says so."""
    generator = random_generator()
    plans = group_plans(["a red circle moves left slowly"], branches=8, blocks=5, first_block=4)
    peaks = {}
    for at_once in (8, 2):
        with LiveBytes() as counter:
            roll_out(generator, plans, Consistency(), frozenset({Endpoints}), at_once)
        peaks[at_once] = counter.peak
    assert peaks[2] < 0.5 * peaks[8]
    case = p6.cases()[0]
    case.adaptation.attach(generator.network, 0)
    parts = p6.parts_of(case, generator)
    guesses = {n: estimate_step(replace(parts, branches_at_once=n), case.adaptation) for n in (None, 4, 1)}
    sizes = {n: guess.phases["rollout"] for n, guess in guesses.items() if guess is not None}
    assert sizes[4] == sizes[None] and sizes[1] < 0.5 * sizes[None]
