"""Which steps of a rollout are trained, with which weights, and where the policies are asked for them."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch

from framework.interfaces import SurrogatePolicy
from framework.kernels import Consistency, DanceGRPO, FlowGRPO, Ode, TransitionKernel
from framework.records import Endpoints, Transitions
from framework.rng import Streams
from framework.types import Tape
from strategies.surrogates import transitions
from strategies.surrogates.gaussian_kernel import GaussianRatio, GaussianRegression, GaussianReinforce, kernel_mean
from strategies.surrogates.transitions import (
    AllSteps,
    EqualGradient,
    OneRandomStep,
    ReleasedReweight,
    StepChoice,
    TrainedSteps,
)
from tests.strategies.test_gaussian_kernel import KERNELS, SCHEDULE, SEEDS, cases, make_tape, near, probed, steps_of
from tests.support import close, holds, over, refuted

# which steps


def test_the_steps_of_ravens_grid_have_the_numbers_of_its_table():
    """Per step: std, gradient in x̂0 per unit of noise, ρ of the release and what it makes of that, KL coefficient."""
    probes = probed(
        GaussianRegression(TrainedSteps(step_weights=ReleasedReweight())), make_tape(Consistency(), 1, 1, 2, 0)
    )
    extra = {name: value[0] for name, value in probes.extra.items()}
    slope = -extra["of_velocity"] / probes.sigma[0, :, 0]
    ratio = slope / extra["std"]
    assert extra["std"].tolist() == pytest.approx([0.938, 0.833, 0.625])
    assert ratio.tolist() == pytest.approx([0.0661, 0.2005, 0.6], abs=5e-5)
    assert (ratio * probes.sigma[0, :, 0]).tolist() == pytest.approx([0.0661, 0.188, 0.5], abs=5e-4)
    assert extra["step_weight"].tolist() == pytest.approx([15.13, 7.93, 3.00], abs=5e-3)
    assert (extra["step_weight"] * ratio).tolist() == pytest.approx([1.0, 1.59, 1.8], abs=5e-3)
    assert (ratio.square() / 2).tolist() == pytest.approx([0.0022, 0.0201, 0.18], abs=5e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_equal_gradient_weights_give_every_step_the_same_pull(kernel: TransitionKernel):
    probes = probed(GaussianReinforce(TrainedSteps(step_weights=EqualGradient())), make_tape(kernel, 1, 1, 2, 0))
    slope = probes.extra["of_velocity"].abs() / probes.sigma[..., 0]
    close(probes.extra["step_weight"] * slope / probes.extra["std"], torch.ones_like(slope), atol=1e-12)


def check_chosen_steps(kernel: TransitionKernel, expected: Sequence[float], choice: StepChoice, seed: int) -> None:
    probes = probed(GaussianReinforce(TrainedSteps(choice)), make_tape(kernel, 4, 12, 1, seed), seed)
    assert bool((probes.extra["std"] > 0).all())
    assert {round(s, 3) for s in probes.sigma.unique().tolist()} == set(expected)


@pytest.mark.parametrize("choice", [AllSteps(), OneRandomStep()])
@over(SEEDS, examples=5)
def test_a_point_mass_is_never_chosen_and_a_stochastic_last_step_is(choice: StepChoice, seed: int):
    grid = SCHEDULE.sigmas
    check_chosen_steps(Consistency(), grid[:3], choice, seed)
    check_chosen_steps(Consistency(0.4), grid[:3], choice, seed)
    check_chosen_steps(FlowGRPO(0.7), grid, choice, seed)
    check_chosen_steps(DanceGRPO(0.3), grid, choice, seed)


@pytest.mark.parametrize("choice", [AllSteps(), OneRandomStep()])
def test_the_step_check_sees_a_point_mass(choice: StepChoice, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(transitions, "stochastic_steps", lambda record: list(range(4)))
    with pytest.raises((AssertionError, ZeroDivisionError)):
        check_chosen_steps(Consistency(), SCHEDULE.sigmas[:3], choice, 0)


def test_a_deterministic_sampler_leaves_nothing_to_train():
    with pytest.raises(ValueError, match="Ode has no stochastic step"):
        probed(GaussianReinforce(), make_tape(Ode(), 1, 2, 2, 0))


def check_named_by_clip(choice: StepChoice, seed: int) -> None:
    """A clip's step does not depend on who else is in the batch, nor on the order."""
    names = [(group, branch) for group in (3, 7, 11) for branch in range(6)]
    drawn = choice.choose(4, names, Streams(seed))
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    assert torch.equal(choice.choose(4, [names[i] for i in order], Streams(seed)), drawn[order])
    assert torch.equal(choice.choose(4, names[6:12], Streams(seed)), drawn[6:12])
    assert drawn.shape == (18, 1)


class OneStream(OneRandomStep):
    """A planted error: all clips draw from the same stream, one after the other."""

    def choose(self, steps, clips, streams):
        return torch.randint(steps, (len(clips), 1), generator=streams("policy_step"))


class ByBranch(OneRandomStep):
    """A planted error: the place in the batch in place of the group."""

    def choose(self, steps, clips, streams):
        return super().choose(steps, [(i // 6, branch) for i, (_, branch) in enumerate(clips)], streams)


def test_a_random_step_is_the_clips_own_wherever_it_is_trained():
    holds(partial(check_named_by_clip, OneRandomStep()), SEEDS)


@pytest.mark.parametrize("mutant", [OneStream(), ByBranch()])
def test_the_naming_check_sees_draws_that_depend_on_the_batch(mutant: StepChoice):
    refuted(partial(check_named_by_clip, mutant), SEEDS)


def test_random_steps_are_uniform_and_new_in_every_update():
    names = [(g, b) for g in range(64) for b in range(16)]
    drawn = OneRandomStep().choose(4, names, Streams(0))
    counts = torch.bincount(drawn.flatten(), minlength=4) / len(names)
    assert (counts - 0.25).abs().max() < 0.06  # more than four standard deviations
    again = OneRandomStep().choose(4, names, Streams(0).at("probes", 1))
    assert 0.15 < (drawn == again).float().mean() < 0.35
    assert AllSteps().fixed and not OneRandomStep().fixed
    assert GaussianRatio().fixed_probes and not GaussianRatio(trained=TrainedSteps(OneRandomStep())).fixed_probes


# where it asks


@over(cases(), examples=25)
def test_probes_are_the_visited_states_and_where_they_went(case):
    tape, trained, seed = case
    surrogate = GaussianReinforce(trained)
    probes, record, ends = probed(surrogate, tape, seed), tape[Transitions], tape[Endpoints]
    for n, pairs in enumerate(steps_of(tape, probes)):
        for s, pair in enumerate(pairs):
            k = record.grid.index(pair)
            assert torch.equal(probes.noisy[n, s], record.states[n, k])
            assert torch.equal(probes.extra["next"][n, s], record.next_states[n, k])
            velocity = near(probes, seed)
            close(
                kernel_mean(velocity, probes)[n, s], record.kernel.mean(probes.noisy[n, s], velocity[n, s], *pair), 1e-9
            )
    assert torch.equal(probes.clean, ends.latents) and probes.history_grad == trained.history_grad
    close(probes.extra["frame_weight"].mean(1), torch.ones(len(probes)), atol=1e-12)


def check_anchors_are_left_out(surrogate: SurrogatePolicy, seed: int) -> None:
    tape = make_tape(Consistency(), 3, 4, 2, seed, anchors=1)
    probes = probed(surrogate, tape, seed)
    assert probes.rows.tolist() == [i for i in range(15) if i % 5 != 4]
    kept = tape[Endpoints].latents[probes.rows]
    assert torch.equal(probes.clean, kept)
    assert all(len(value) == 12 for value in (probes.noisy, probes.sigma, *probes.extra.values()))
    joined = [part.rows for part in probes.split(2)]
    assert torch.equal(torch.cat(joined), probes.rows)


class Everyone(GaussianReinforce):
    """A planted error: anchors are trained like branches."""

    def probes(self, tape, recipe, streams):
        plain = tuple(replace(p, branches=tuple(replace(b, anchor=False) for b in p.branches)) for p in tape.plans)
        yield from super().probes(Tape(plain, tape.records), recipe, streams)


@pytest.mark.parametrize("surrogate", [GaussianReinforce(), GaussianRegression(), GaussianRatio()])
def test_anchors_are_not_probed(surrogate: SurrogatePolicy):
    holds(partial(check_anchors_are_left_out, surrogate), SEEDS, examples=5)


def test_the_anchor_check_sees_anchors_that_are_trained():
    refuted(partial(check_anchors_are_left_out, Everyone()), SEEDS)
