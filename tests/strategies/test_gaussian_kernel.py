"""The Gaussian surrogates differentiate the density of the sampler's own steps, in every form, kernel and weighting."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal

from framework.block_weights import BlockWeights, FutureParticipation, LogitNormal, Uniform
from framework.interfaces import GeneratorRecipe, SurrogatePolicy
from framework.kernels import Consistency, DanceGRPO, FlowGRPO, RavenEulerMaruyama, TransitionKernel
from framework.records import Anchors, Endpoints, KernelShift, OnPolicyTransitions, Transitions
from framework.rng import Streams
from framework.schedules import FewStepSchedule
from framework.types import Advantage, BranchPlan, GroupPlan, Probes, Scene, Tape
from strategies.surrogates.gaussian_kernel import (
    GaussianRatio,
    GaussianRegression,
    GaussianReinforce,
    clipped_ratio_loss,
    frame_weight,
    kernel_mean,
    log_density,
    score_pull,
    x0_regression,
)
from strategies.surrogates.transitions import (
    AllSteps,
    EqualGradient,
    OneRandomStep,
    PlainSteps,
    ReleasedReweight,
    StepWeights,
    TrainedSteps,
)
from tests.support import close, holds, normal, over, refuted

SCHEDULE = FewStepSchedule(integer_timesteps=True)
RECIPE = GeneratorRecipe("test", 2, 3, (2, 2, 2), SCHEDULE)
KERNELS: list[TransitionKernel] = [
    Consistency(), Consistency(0.4), FlowGRPO(0.7), RavenEulerMaruyama(0.7), DanceGRPO(0.3)
]  # fmt: skip
STEP_WEIGHTS: list[StepWeights] = [PlainSteps(), ReleasedReweight(), EqualGradient()]
BLOCK_WEIGHTS: list[BlockWeights] = [Uniform(), FutureParticipation(-1.0), FutureParticipation(2.0), LogitNormal(0.3)]
SEEDS = st.integers(0, 2**20)


# a tape of transitions


def make_tape(
    kernel: TransitionKernel, prompts: int, branches: int, frames: int, seed: int, anchors: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Tape:  # fmt: skip
    """States and next states of no particular policy; ``anchors`` more branches a group explored nothing."""
    n, steps, prefix = prompts * (branches + anchors), len(SCHEDULE.sigmas), None
    states, following = (normal(seed + i, n, steps, 2, frames, 2, 2, dtype=dtype) for i in (0, 1))
    plan = tuple(BranchPlan(b, anchor=b >= branches) for b in range(branches + anchors))
    plans = tuple(GroupPlan(10 + g, Scene.single(f"prompt {g}"), 0, 1, 0, plan) for g in range(prompts))
    latents = normal(seed + 2, n, 2, frames, 2, 2, dtype=dtype)
    mask = torch.tensor([branch.anchor for _ in range(prompts) for branch in plan])
    records = {
        OnPolicyTransitions: OnPolicyTransitions(states, following, SCHEDULE.transitions, kernel),
        Endpoints: Endpoints(latents, prefix, 0),
        Anchors: Anchors(mask),
    }
    return Tape(plans, records)


class Drawn(tuple):
    """(tape, trained, seed); a tape is too long to be printed with a failure."""

    def __repr__(self) -> str:
        return f"{self[1]}, seed {self[2]}"


@st.composite
def cases(draw) -> Drawn:
    """A tape of any kernel and size, with any choice and weighting of its steps and blocks."""
    seed = draw(SEEDS)
    kernel = draw(st.sampled_from(KERNELS))
    tape = make_tape(kernel, draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 6)), seed)
    trained = TrainedSteps(
        draw(st.sampled_from([AllSteps(), OneRandomStep()])), draw(st.sampled_from(STEP_WEIGHTS)),
        draw(st.sampled_from(BLOCK_WEIGHTS)), draw(st.booleans()),
    )  # fmt: skip
    return Drawn((tape, trained, seed))


def probed(surrogate: SurrogatePolicy, tape: Tape, seed: int = 0) -> Probes:
    (probes,) = surrogate.probes(tape, RECIPE, Streams(seed))
    return probes


def near(probes: Probes, seed: int, distance: float = 1.0) -> Tensor:
    return distance * normal(seed, *probes.noisy.shape, dtype=probes.noisy.dtype)


def advantages_for(probes: Probes, seed: int) -> Advantage:
    values = normal(seed, len(probes), dtype=probes.noisy.dtype)
    return Advantage(values, torch.ones_like(values).bool(), torch.arange(len(probes)))


def loss_gradient(
    surrogate: SurrogatePolicy, probes: Probes, velocity: Tensor, advantage: Advantage, **others: Tensor
) -> Tensor:
    asked = velocity.clone().requires_grad_()
    per_clip = surrogate.loss({"current": asked, **others}, probes, advantage).per_clip
    return torch.autograd.grad(per_clip.sum(), asked)[0]


def steps_of(tape: Tape, probes: Probes) -> list[list[tuple[float, float]]]:
    """(σ, σ') of every probe, read from σ alone."""
    table = {sigma: (sigma, following) for sigma, following in tape[Transitions].grid}
    return [[table[round(float(sigma), 3)] for sigma in clip[:, 0]] for clip in probes.sigma]


def policy_gradient(
    tape: Tape, trained: TrainedSteps, probes: Probes, velocity: Tensor, advantage: Advantage
) -> Tensor:
    """−A ρ ⟨w ∇ log N⟩ by autograd through torch.distributions and the kernel's own mean, probe by probe."""
    kernel, asked, total = tape[Transitions].kernel, velocity.clone().requires_grad_(), 0
    frames = probes.noisy.shape[3]
    sizes = [min(2, frames - f) for f in range(0, frames, 2)]
    weight = torch.tensor(trained.block_weights.per_frame(sizes), dtype=velocity.dtype)[:, None, None]
    for n, pairs in enumerate(steps_of(tape, probes)):
        for s, pair in enumerate(pairs):
            density = Normal(kernel.mean(probes.noisy[n, s], asked[n, s], *pair), kernel.std(*pair))
            log_pi = (weight * density.log_prob(probes.extra["next"][n, s])).mean()
            rho = trained.step_weights.weight(kernel, *pair)
            total = total - advantage.values[n] * rho * log_pi / len(pairs)
    return torch.autograd.grad(total, asked)[0]


# the gradient


def check_policy_gradient(kind, tolerance: float, case: Drawn) -> None:
    tape, trained, seed = case
    surrogate = kind(trained=trained)
    probes = probed(surrogate, tape, seed)
    velocity, advantage = near(probes, seed + 3), advantages_for(probes, seed + 4)
    expected = policy_gradient(tape, trained, probes, velocity, advantage)
    found = loss_gradient(surrogate, probes, velocity, advantage)
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("kind", [GaussianReinforce, GaussianRegression])
def test_both_on_policy_forms_have_the_gradient_of_minus_the_advantage_times_log_pi(kind):
    holds(partial(check_policy_gradient, kind, 1e-12), cases(), examples=40)


class Scaled(TrainedSteps):
    """Planted errors: something that belongs to a step is taken from elsewhere."""

    def probes(self, tape, recipe, streams):
        found = super().probes(tape, recipe, streams)
        return replace(found, extra=found.extra | self.planted(found))


class ForgottenStepWeight(Scaled):
    def planted(self, probes):
        return {"step_weight": torch.ones_like(probes.extra["step_weight"])}


class ForgottenBlockWeight(Scaled):
    def planted(self, probes):
        return {"frame_weight": torch.ones_like(probes.extra["frame_weight"])}


class StdOfTheStart(Scaled):
    def planted(self, probes):
        return {"std": probes.sigma[..., 0]}


class SlopeOfTheOde(Scaled):
    def planted(self, probes):
        return {"of_velocity": -probes.sigma[..., 0]}


MUTANTS = [ForgottenStepWeight, ForgottenBlockWeight, StdOfTheStart, SlopeOfTheOde]


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("kind", [GaussianReinforce, GaussianRegression])
def test_the_gradient_check_sees_weights_and_moments_of_another_step(kind, mutant):
    def check(case: Drawn) -> None:
        tape, trained, seed = case
        surrogate = kind(trained=mutant(trained.steps, trained.step_weights, trained.block_weights))
        probes = probed(surrogate, tape, seed)
        velocity, advantage = near(probes, seed + 3), advantages_for(probes, seed + 4)
        expected = policy_gradient(tape, trained, probes, velocity, advantage)
        found = loss_gradient(surrogate, probes, velocity, advantage)
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()

    refuted(check, cases())


class WholeSquare(GaussianRegression):
    """A planted error: the advantage enters the gradient squared, as it does the value."""

    def objective(self, statistics, advantage):
        squared = statistics["regression"] * advantage.values[:, None].square()
        return replace(super().objective(statistics, advantage), per_clip=squared.mean(1))


class HalfScore(GaussianReinforce):
    """A planted error: the score itself in place of half of it."""

    def objective(self, statistics, advantage):
        found = super().objective(statistics, advantage)
        return replace(found, per_clip=2 * found.per_clip)


@pytest.mark.parametrize("mutant", [WholeSquare, HalfScore])
def test_the_gradient_check_sees_another_power_or_factor(mutant):
    refuted(partial(check_policy_gradient, mutant, 1e-6), cases())


@over(SEEDS, st.sampled_from(KERNELS), examples=20)
def test_in_float32_the_two_forms_agree_to_a_millionth(seed: int, kernel: TransitionKernel):
    tape = make_tape(kernel, 2, 2, 4, seed, dtype=torch.float32)
    probes = probed(GaussianReinforce(), tape)
    velocity, advantage = near(probes, seed + 3), advantages_for(probes, seed + 4)
    reinforce, regression = (
        loss_gradient(kind(), probes, velocity, advantage) for kind in (GaussianReinforce, GaussianRegression)
    )
    assert (reinforce - regression).abs().max() <= 2e-6 * reinforce.abs().max()


@over(cases(), examples=25)
def test_the_value_of_the_regression_is_the_mean_square_of_its_pull(case):
    tape, trained, seed = case
    surrogate = GaussianRegression(trained=trained)
    probes = probed(surrogate, tape, seed)
    velocity, advantage = near(probes, seed + 3), advantages_for(probes, seed + 4)
    found = surrogate.loss({"current": velocity}, probes, advantage).per_clip
    # the gradient in v is −σ · 2 c g, c what an element counts: c g² without dividing by a step weight of 0
    count = probes.noisy[0].numel()
    mean, std = kernel_mean(velocity, probes), probes.extra["std"]
    slope = -probes.extra["of_velocity"] / probes.sigma[..., 0]
    pull = score_pull(advantage.values, probes.extra["next"], mean, slope, std)
    weight = probes.extra["step_weight"][..., None, None, None, None] * frame_weight(probes)
    close(found, (weight * pull.square()).flatten(1).sum(1) / count, atol=1e-12, rtol=1e-12)
    sigma = probes.sigma[..., None, :, None, None]
    gradient = loss_gradient(surrogate, probes, velocity, advantage)
    close(gradient, -sigma * 2 * weight * pull / count, atol=1e-12, rtol=1e-12)
    x0, pull = normal(seed, 3, 2).requires_grad_(), normal(seed + 1, 3, 2)
    loss = x0_regression(x0, pull)
    close(loss.detach(), pull.square(), atol=1e-12)
    close(torch.autograd.grad(loss.sum(), x0)[0], 2 * pull, atol=1e-12)


# the density


def check_density(density, seed: int, std: float, uniform: bool) -> None:
    """torch.distributions averaged over elements, up to −log(std √2π), which weights of mean 1 leave as it is."""
    x, mean = normal(seed, 2, 3, 2, 4, 2, 2), normal(seed + 1, 2, 3, 2, 4, 2, 2)
    frames = [1.0] * 4 if uniform else FutureParticipation(-2.0).per_frame([1, 3])
    weight = torch.tensor(frames, dtype=torch.float64)[:, None, None]
    expected = (weight * Normal(mean, std).log_prob(x)).flatten(2).mean(2) + math.log(std * math.sqrt(2 * math.pi))
    close(density(x, mean, torch.full((2, 3), std, dtype=torch.float64), weight), expected, atol=1e-9, rtol=1e-9)


STDS = st.floats(0.05, 3.0)


def test_the_log_density_is_that_of_torch_distributions_up_to_its_constant():
    holds(partial(check_density, log_density), SEEDS, STDS, st.booleans())


def without_half(x: Tensor, mean: Tensor, std: Tensor, weight: Tensor) -> Tensor:
    return 2 * log_density(x, mean, std, weight)


def summed(x: Tensor, mean: Tensor, std: Tensor, weight: Tensor) -> Tensor:
    return x[0, 0].numel() * log_density(x, mean, std, weight)


def by_std(x: Tensor, mean: Tensor, std: Tensor, weight: Tensor) -> Tensor:
    return log_density(x, mean, std.sqrt(), weight)


def unweighted(x: Tensor, mean: Tensor, std: Tensor, weight: Tensor) -> Tensor:
    return log_density(x, mean, std)


@pytest.mark.parametrize("mutant", [without_half, summed, by_std, unweighted])
def test_the_density_check_sees_a_factor_a_sum_and_forgotten_weights(mutant):
    refuted(partial(check_density, mutant), SEEDS, STDS, st.booleans())


# the ratio


def check_on_policy_ratio(surrogate: GaussianRatio, case: Drawn) -> None:
    """At θ = old the ratio is exactly 1, nothing is clipped, and the gradient is that of REINFORCE."""
    tape, trained, seed = case
    surrogate = replace(surrogate, trained=trained)
    probes = probed(surrogate, tape, seed)
    velocity, advantage = near(probes, seed + 3), advantages_for(probes, seed + 4)
    loss = surrogate.loss({"current": velocity, "behaviour": velocity}, probes, advantage)
    assert torch.equal(loss.metrics["ratio_mean"], torch.ones(len(probes), dtype=torch.float64))
    assert not any(loss.metrics[name].any() for name in ("ratio_deviation", "clip_frac_high", "clip_frac_low"))
    close(loss.per_clip, -advantage.values * probes.extra["step_weight"].mean(1), atol=1e-12)
    found = loss_gradient(surrogate, probes, velocity, advantage, behaviour=velocity)
    expected = loss_gradient(GaussianReinforce(trained), probes, velocity, advantage)
    close(found, expected, atol=1e-12, rtol=1e-9)


class LogRatio(GaussianRatio):
    """A planted error: the ratio's logarithm in its place."""

    def objective(self, statistics, advantage):
        moved = statistics["log_density_current"] - statistics["log_density_behaviour"]
        found = super().objective(statistics, advantage)
        return replace(found, per_clip=-advantage.values * moved.mean(1))


def test_at_the_old_policy_the_ratio_is_exactly_one_and_the_gradient_reinforces():
    holds(partial(check_on_policy_ratio, GaussianRatio()), cases(), examples=25)


def test_the_on_policy_check_sees_a_log_ratio():
    refuted(partial(check_on_policy_ratio, LogRatio()), cases())


def check_clip_regions(loss, seed: int, low: float, high: float) -> None:
    """Flat where a better clip is already above 1 + high, or a worse one below 1 − low; −A everywhere else."""
    ratio = (1 + 2 * max(low, high) * normal(seed, 6, 3)).clamp(min=0.01).requires_grad_()
    advantage = normal(seed + 1, 6)
    (slope,) = torch.autograd.grad(loss(ratio, advantage, low, high).sum(), ratio)
    better, r = advantage[:, None] > 0, ratio.detach()
    flat = (better & (r > 1 + high)) | (~better & (r < 1 - low))
    assert torch.equal(slope, torch.where(flat, 0.0, -advantage[:, None].expand_as(r)))


def clip_alone(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """Without the maximum, a clip that moved the wrong way is never called back."""
    return -advantage[:, None] * ratio.clamp(1 - low, 1 + high)


def swapped(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    return clipped_ratio_loss(ratio, advantage, high, low)


RANGES = st.floats(1e-4, 0.5)


def test_the_clip_acts_only_where_the_update_has_gone_far_enough():
    holds(partial(check_clip_regions, clipped_ratio_loss), SEEDS, RANGES, RANGES)


@pytest.mark.parametrize("mutant", [clip_alone, swapped])
def test_the_clip_check_sees_a_missing_maximum_and_swapped_bounds(mutant):
    refuted(partial(check_clip_regions, mutant), SEEDS, RANGES, RANGES)


@over(SEEDS, examples=20)
def test_the_clip_fractions_count_the_flat_regions(seed: int):
    tape = make_tape(Consistency(), 2, 4, 2, seed)
    surrogate = GaussianRatio(clip_low=1e-3, clip_high=2e-3)
    probes = probed(surrogate, tape)
    old, advantage = near(probes, seed + 3), advantages_for(probes, seed + 4)
    current = old + near(probes, seed + 5, 1e-2)
    loss = surrogate.loss({"current": current, "behaviour": old}, probes, advantage)
    slope = loss_gradient(surrogate, probes, current, advantage, behaviour=old).flatten(2).abs().sum(2)
    flat = (slope == 0).double().mean(1)
    close(loss.metrics["clip_frac_high"] + loss.metrics["clip_frac_low"], flat, atol=1e-12)
    assert not (loss.metrics["clip_frac_high"][advantage.values < 0]).any()


# what it hands on


def test_the_reference_is_measured_only_where_somebody_reads_it():
    probes = probed(GaussianReinforce(), make_tape(Consistency(), 1, 2, 2, 0))
    advantage, velocity = advantages_for(probes, 0), near(probes, 1)
    assert GaussianReinforce().loss({"current": velocity}, probes, advantage).written == {}
    views = {"current": velocity, "reference": velocity}
    assert KernelShift in GaussianReinforce().loss(views, probes, advantage).written


@pytest.mark.parametrize("arguments", [{"clip_low": 0.0}, {"clip_low": 1.5}, {"clip_high": -1e-4}])
def test_meaningless_clip_ranges_are_refused(arguments: dict):
    with pytest.raises(ValueError, match=r"GaussianRatio\.clip_low"):
        GaussianRatio(**arguments)
