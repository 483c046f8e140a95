"""Rolling out some branches of a group after the others: the same clips and records in less memory."""

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from benchmarks import p6
from benchmarks.measure import LiveBytes
from benchmarks.scenarios import random_generator
from framework import rollout
from framework.distributed import World
from framework.kernels import Consistency
from framework.records import Anchors, Endpoints, Predictions, Transitions
from framework.rollout import BlockTrace, roll_out
from framework.run_shape import estimate_step
from framework.types import GroupPlan, Tape
from strategies.surrogates import nft
from tests.ranks import make
from tests.routed import KEPT, WINDOW, plans_at
from tests.support import PROMPTS, close, group_plans, tiny_generator

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
