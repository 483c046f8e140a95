"""The Gibbs surrogate on a real generator: micro-batches change nothing, and only what was routed has energy."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from backbones.history import SinkWindow
from framework.adapters import FullFineTuning
from framework.optimization import Constant
from framework.policies import Policies
from framework.records import Anchors, Displacements, Endpoints
from framework.rng import Streams
from framework.rollout import roll_out
from framework.types import Advantage, BranchPlan, GroupPlan, Loss, Scene, Tape
from strategies.exploration.causal_history_routing import CausalHistoryRouting
from strategies.surrogates.gibbs_tve import GibbsTVE
from tests.support import PROMPTS, close, normal, tiny_generator

HALF = (True, True, False, False)


def advantage_for(tape: Tape, seed: int) -> Advantage:
    values = normal(seed, len(tape.groups)).where(~tape.anchors, 0)
    return Advantage(values, ~tape.anchors, tape.groups)


# micro-batches, through the policies of a tiny generator


def tiny_tape(seed: int, branches: int) -> Tape:
    """Random records of the tiny generator's latents: two prompts, one prefix block, two routed blocks."""
    generator = tiny_generator()
    channels, height, width = generator.recipe.latent
    size = generator.recipe.block_frames
    plan = (BranchPlan(0, anchor=True), *(BranchPlan(0) for _ in range(branches - 1)))
    plans = tuple(GroupPlan(g, Scene.single(PROMPTS[g]), 1, 2, 0, plan) for g in range(2))
    shape = (2 * branches, 4, channels, 2 * size, height, width)
    moved = Displacements(normal(seed, *shape), normal(seed + 1, *shape), generator.recipe.schedule.sigmas, 2, HALF)
    ends = Endpoints(normal(seed + 2, *shape[:1], *shape[2:]), normal(seed + 3, 2, channels, size, height, width), size)
    return Tape(plans, {Displacements: moved, Endpoints: ends, Anchors: Anchors(Tape(plans, {}).anchors)})


def gradients(clips: int, coupled: bool = True) -> dict[str, Tensor]:
    generator = tiny_generator(torch.float64)
    policies = Policies(generator, FullFineTuning(), Constant(0.0), 0.9, 0)
    with torch.no_grad():
        for i, parameter in enumerate(policies.parameters.values()):
            parameter += 0.01 * normal(i, *parameter.shape)
    policies.stepped()
    tape, surrogate = tiny_tape(0, 4), GibbsTVE()
    (probes,) = surrogate.probes(tape, generator.recipe, Streams(0))
    advantage = advantage_for(tape, 9)
    loss = Loss(
        surrogate.views | {"reference"},
        surrogate.statistics,
        lambda statistics, rows: surrogate.objective(statistics, advantage[rows]),
        surrogate.coupled and coupled,
    )
    policies.backward(loss, probes, clips, int(advantage.active.sum()))
    return {name: p.grad.clone() for name, p in policies.parameters.items() if p.grad is not None}


def check_gradients_agree(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys() and any(bool(g.abs().max() > 1e-9) for g in one.values())
    for name in one:
        close(one[name], two[name], atol=1e-10)


@pytest.mark.parametrize("clips", [1, 2, 4])
def test_micro_batches_of_any_size_give_one_gradient(clips: int):
    check_gradients_agree(gradients(8), gradients(clips))


def test_the_micro_batch_check_sees_groups_that_are_cut():
    with pytest.raises(AssertionError):
        check_gradients_agree(gradients(8), gradients(2, coupled=False))


# behind a real rollout

ROUTING = CausalHistoryRouting(3, routed_frames=3, recent=3, sink=3, routed_blocks=2, tail_blocks=1, stream_blocks=7)


def rolled_out(policies: Policies, steps: tuple[bool, ...] | None = None) -> Tape:
    recipe = policies.generator.recipe
    routing = replace(ROUTING, steps=steps)
    plans = routing.plan([Scene.single(prompt) for prompt in PROMPTS[:2]], [4, 9], recipe, Streams(0))
    return roll_out(policies.generator, plans, routing.kernel, frozenset({Displacements, Anchors, Endpoints}))


def make_policies(dtype: torch.dtype = torch.float32) -> Policies:
    """A window of nine frames, so that routes reach what the canonical history has forgotten."""
    generator = tiny_generator(dtype, policy=SinkWindow(sink=3, window=9))
    return Policies(generator, FullFineTuning(), Constant(0.0), 0.9, 0)


def energies_of(policies: Policies, tape: Tape, steps: tuple[bool, ...] | None = None) -> dict[str, Tensor]:
    """The statistics at θ = old, asked at other steps than the tape's where given."""
    moved = tape[Displacements]
    asked = tape if steps is None else replace(
        tape, records={**tape.records, Displacements: replace(moved, steps=steps)}
    )  # fmt: skip
    (probes,) = GibbsTVE().probes(asked, policies.generator.recipe, Streams(0))
    with torch.no_grad():
        return dict(GibbsTVE().statistics(policies.views(GibbsTVE.views, probes), probes))


def check_anchor_alone_is_reproduced(tape: Tape, energies: Tensor) -> None:
    assert bool((energies[tape.anchors] < 1e-10).all()) and bool((energies[~tape.anchors] > 1e-8).all())


def test_a_replayed_anchor_has_no_energy_and_routed_branches_have_some():
    policies = make_policies()
    tape = rolled_out(policies)
    statistics = energies_of(policies, tape)
    check_anchor_alone_is_reproduced(tape, statistics["energy"])
    assert torch.equal(statistics["energy"], statistics["old_energy"])


def test_steps_that_were_not_routed_have_no_energy_and_would_only_dilute():
    policies = make_policies()
    tape = rolled_out(policies)
    assert bool((energies_of(policies, tape, (False, False, True, True))["energy"] < 1e-10).all())


def test_the_anchor_check_sees_another_policy():
    policies = make_policies()
    tape = rolled_out(policies)
    with torch.no_grad():
        next(iter(policies.parameters.values())).add_(0.01)
    with pytest.raises(AssertionError):
        check_anchor_alone_is_reproduced(tape, energies_of(policies, tape)["energy"])


def test_every_parameter_learns_from_a_routed_rollout():
    """Cross-attention keys and values included: the text is encoded anew under the current policy."""
    policies = make_policies(torch.float64)
    tape, surrogate = rolled_out(policies), GibbsTVE()
    (probes,) = surrogate.probes(tape, policies.generator.recipe, Streams(0))
    advantage = advantage_for(tape, 0)
    views = policies.views(surrogate.views | {"reference"}, probes)
    surrogate.loss(views, probes, advantage).per_clip[advantage.active].mean().backward()
    silent = [name for name, p in policies.parameters.items() if p.grad is None or not bool(p.grad.abs().max() > 0)]
    assert silent == []
