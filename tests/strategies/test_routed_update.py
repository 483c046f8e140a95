"""An update on a routed rollout: only what was routed has energy, every parameter learns, and no batching shows."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from backbones.embedded.generator import ShapesGenerator
from backbones.history import HistoryPolicy
from backbones.streaming import WanStream, WanStreamingGenerator
from framework.adapters import FullFineTuning, LoRA
from framework.optimization import Constant
from framework.policies import Policies
from framework.records import Displacements
from framework.rng import Streams
from framework.types import Advantage, Loss, Probes, Tape
from strategies.surrogates.gibbs_tve import GibbsTVE
from tests.routed import PIVOTS, ROUTING, WINDOW, plans_at, rolled
from tests.support import close, normal, perturb, tiny_generator

# Energies


def energies(tape: Tape, steps: tuple[bool, ...], policy: HistoryPolicy = WINDOW) -> Tensor:
    """E [N, blocks, asked steps] at θ = old, block by block."""
    asked = replace(tape, records={**tape.records, Displacements: replace(tape[Displacements], steps=steps)})
    generator, surrogate = tiny_generator(torch.float64, policy=policy), GibbsTVE()
    (probes,) = surrogate.probes(asked, generator.recipe, Streams(0))
    with torch.no_grad():
        replayed = generator.replay(probes)
    gaps = (replayed - probes.extra["velocity"]).square()
    return gaps.unflatten(3, (-1, 3)).mean((2, 4, 5, 6)).transpose(1, 2)


UNROUTED = (False, False, True, True)


def check_unrouted_steps_are_silent(tape: Tape) -> None:
    """And routed ones of routed branches are not; the anchor is silent throughout."""
    assert float(energies(tape, UNROUTED).max()) < 1e-10
    routed = energies(tape, (True, True, False, False))
    assert float(routed[tape.anchors].max()) < 1e-10
    assert float(routed[~tape.anchors].min()) > 1e-8


@pytest.mark.parametrize("pivot", PIVOTS.values(), ids=PIVOTS)
def test_behind_a_canonical_clean_write_only_routed_steps_have_energy(pivot: int):
    check_unrouted_steps_are_silent(rolled(plans_at(pivot)))


def test_the_energy_check_sees_a_routed_clean_write_from_the_second_block_on():
    tape = rolled(plans_at(5, replace(ROUTING, clean_write=True)))
    with pytest.raises(AssertionError):
        check_unrouted_steps_are_silent(tape)
    branches, unrouted = ~tape.anchors, energies(tape, UNROUTED)
    assert float(unrouted[branches, 0].max()) < 1e-10 < 1e-8 < float(unrouted[branches, 1].min())
    assert float(unrouted[tape.anchors].max()) < 1e-10


# Updates


def policies_of(generator: ShapesGenerator, adaptation: FullFineTuning | LoRA) -> Policies:
    """Policies whose current one has moved off the behaviour, every LoRA B included."""
    policies = Policies(generator, adaptation, Constant(0.0), 0.9, 0)
    moved = torch.nn.ParameterList(policies.parameters.values())
    perturb(moved, seed=3, std=0.02)
    policies.stepped()
    return policies


def gradients(policies: Policies, tape: Tape, clips: int) -> dict[str, Tensor]:
    surrogate, anchors = GibbsTVE(), tape.anchors
    (probes,) = surrogate.probes(tape, policies.generator.recipe, Streams(0))
    advantage = Advantage(normal(9, len(anchors)).where(~anchors, 0), ~anchors, tape.groups)
    loss = Loss(
        surrogate.views,
        surrogate.statistics,
        lambda s, rows: surrogate.objective(s, advantage[rows]),
        surrogate.coupled,
    )
    policies.backward(loss, probes, clips, int(advantage.active.sum()))
    return {name: p.grad for name, p in policies.parameters.items() if p.grad is not None}


def check_everything_learns(policies: Policies, tape: Tape) -> None:
    """Every parameter gets a gradient, cross-attention keys and values included."""
    found = gradients(policies, tape, 8)
    assert found.keys() == policies.parameters.keys()
    assert all(float(gradient.abs().max()) > 0 for gradient in found.values())


class StaleText(ShapesGenerator):
    """A planted error, the released one: text K/V are a constant of the replay."""

    def open(self, prompts: Sequence[str], resident: int = 0, switches: bool = False) -> WanStream:
        with torch.no_grad():
            return super().open(prompts, resident, switches)


def lora_policies(kind: type[ShapesGenerator]) -> Policies:
    return policies_of(kind(tiny_generator(policy=WINDOW).network, WINDOW), LoRA(rank=2))


def test_every_parameter_of_a_lora_learns_from_a_routed_rollout():
    tape = rolled(plans_at(2), dtype=torch.float32)
    check_everything_learns(lora_policies(ShapesGenerator), tape)
    names = lora_policies(ShapesGenerator).parameters
    assert sum("attn2.to_k" in name or "attn2.to_v" in name for name in names) == 2 * 2 * 2  # layers, k and v, A and B


def test_the_gradient_check_sees_a_text_that_is_a_constant():
    with pytest.raises(AssertionError):
        check_everything_learns(lora_policies(StaleText), rolled(plans_at(2), dtype=torch.float32))


def check_equal(one: dict[str, Tensor], two: dict[str, Tensor], atol: float) -> None:
    assert one.keys() == two.keys() and any(float(g.abs().max()) > 1e3 * atol for g in one.values())
    for name in one:
        close(one[name], two[name], atol=atol)


def wide_policies() -> Policies:
    return policies_of(tiny_generator(torch.float64, policy=WINDOW), FullFineTuning())


@pytest.fixture(scope="module")
def tape() -> Tape:
    return rolled(plans_at(5))


@pytest.fixture(scope="module")
def one_shot(tape: Tape) -> dict[str, Tensor]:
    return gradients(wide_policies(), tape, 8)


def test_checkpointing_changes_no_gradient(tape: Tape, one_shot: dict[str, Tensor]):
    policies = wide_policies()
    policies.generator.network.enable_gradient_checkpointing()  # pyright: ignore
    check_equal(one_shot, gradients(policies, tape, 8), atol=1e-10)


@pytest.mark.parametrize("clips", [1, 2, 4])
def test_micro_batches_of_a_routed_rollout_give_the_gradient_of_one_shot(
    clips: int, tape: Tape, one_shot: dict[str, Tensor]
):
    check_equal(one_shot, gradients(wide_policies(), tape, clips), atol=1e-10)


class Forgetful(ShapesGenerator):
    """A planted error: the second time a clip is asked, the context is another (as with noise without a seed)."""

    asked = 0

    def replay(self, probes: Probes) -> Tensor:
        self.asked += 1
        clean = probes.clean + 0.01 * self.asked * normal(self.asked, *probes.clean.shape)
        return WanStreamingGenerator.replay(self, replace(probes, clean=clean))


def test_the_micro_batch_check_sees_a_replay_that_is_not_deterministic(tape: Tape, one_shot: dict[str, Tensor]):
    policies = wide_policies()
    policies.generator = Forgetful(policies.generator.network, WINDOW)  # pyright: ignore
    with pytest.raises(AssertionError):
        check_equal(one_shot, gradients(policies, tape, 4), atol=1e-10)
