"""A sampler step is a distribution; its mean and deviation are those of the schedulers that users know."""

import math
from functools import partial

import pytest
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from hypothesis import strategies as st
from torch import Tensor

from framework.flow import add_noise, velocity_target
from framework.kernels import (
    Consistency,
    DanceGRPO,
    EulerMaruyama,
    FlowGRPO,
    Ode,
    RavenEulerMaruyama,
    TransitionKernel,
    gaussian_log_density,
)
from framework.schedules import FewStepSchedule
from tests.support import close, holds, normal, over, refuted

GRID = FewStepSchedule().transitions
SEEDS = st.integers(0, 2**20)
ETAS = st.floats(0.05, 1.0)


def scheduler(stochastic: bool) -> FlowMatchEulerDiscreteScheduler:
    """The independent sampler: diffusers' own, on the same four steps."""
    made = FlowMatchEulerDiscreteScheduler(shift=5.0, stochastic_sampling=stochastic)
    made.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    return made


class ForgottenScale(Consistency):
    """A planted error: x̂0 is noised without being scaled down."""

    def mean(self, x: Tensor, velocity: Tensor, sigma: float, sigma_next: float) -> Tensor:
        return x - sigma * velocity


class OldLevel(Consistency):
    """A planted error: the deviation of the level that was left."""

    def std(self, sigma: float, sigma_next: float) -> float:
        return sigma if sigma_next else 0.0


class FullStep(Ode):
    """A planted error: a step to σ = 0 instead of σ'."""

    def mean(self, x: Tensor, velocity: Tensor, sigma: float, sigma_next: float) -> Tensor:
        return x - sigma * velocity


def check_against_diffusers(kernel: TransitionKernel, seed: int) -> None:
    """All four steps with the noise that the scheduler drew, to float32."""
    reference = scheduler(kernel.stochastic)
    x = normal(seed, 2, 3, 3, 4, 4, dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        for i, (t, (sigma, sigma_next)) in enumerate(zip(reference.timesteps, GRID, strict=True)):
            velocity = normal(seed + i + 1, *x.shape, dtype=torch.float32)
            torch.manual_seed(seed + i)
            expected = reference.step(velocity, t, x, return_dict=False)[0]
            torch.manual_seed(seed + i)
            drawn = torch.randn_like(x)
            x = kernel.step(x, velocity, sigma, sigma_next, drawn)
            close(x, expected, atol=2e-6)


def test_the_consistency_kernel_is_the_stochastic_scheduler_of_diffusers():
    holds(partial(check_against_diffusers, Consistency()), SEEDS, examples=15)


def test_the_ode_kernel_is_the_deterministic_scheduler_of_diffusers():
    holds(partial(check_against_diffusers, Ode()), SEEDS, examples=15)


@pytest.mark.parametrize("mutant", [ForgottenScale(), OldLevel(), FullStep(), Consistency(0.5)])
def test_the_scheduler_check_sees_another_step(mutant: TransitionKernel):
    refuted(partial(check_against_diffusers, mutant), SEEDS)


def test_the_deviations_of_the_shipped_grid_are_those_of_the_table():
    assert [Consistency().std(*pair) for pair in GRID] == pytest.approx([0.9375, 5 / 6, 0.625, 0.0], abs=1e-15)
    assert [Consistency(0.5).std(*pair) for pair in GRID] == pytest.approx([0.66291, 0.58926, 0.44194, 0.0], abs=1e-5)
    assert [Ode().std(*pair) for pair in GRID] == [0.0] * 4


@over(SEEDS, ETAS)
def test_the_last_step_is_a_point_mass_at_the_prediction(seed: int, eta: float):
    x, velocity = normal(seed, 1, 2, 1, 2, 2), normal(seed + 1, 1, 2, 1, 2, 2)
    kernel, (sigma, sigma_next) = Consistency(eta), GRID[-1]
    assert kernel.std(sigma, sigma_next) == 0
    close(kernel.step(x, velocity, sigma, sigma_next, None), x - sigma * velocity, atol=1e-12)


@over(SEEDS)
def test_full_eta_is_plain_renoising(seed: int):
    x, velocity, noise = (normal(seed + i, 1, 2, 1, 2, 2) for i in range(3))
    for sigma, sigma_next in GRID:
        x0 = x - sigma * velocity
        step = Consistency(1.0).step(x, velocity, sigma, sigma_next, noise)
        close(step, add_noise(x0, noise, torch.tensor(sigma_next, dtype=torch.float64)), atol=1e-12)


def check_marginal(kernel: TransitionKernel, seed: int, pair: tuple[float, float]) -> None:
    """With the true velocity the next state is (1 − σ') x0 + σ' (unit noise): the coefficients are preserved."""
    sigma, sigma_next = pair
    x0, noise = normal(seed, 1, 2, 1, 2, 2), normal(seed + 1, 1, 2, 1, 2, 2)
    x = (1 - sigma) * x0 + sigma * noise
    mean = kernel.mean(x, velocity_target(x0, noise), sigma, sigma_next)
    kept = (mean - (1 - sigma_next) * x0) / noise  # the share of the old noise, one number
    close(kept, kept.mean().expand_as(kept), atol=1e-9)
    variance = kept.mean() ** 2 + kernel.std(sigma, sigma_next) ** 2
    assert math.isclose(variance, sigma_next**2, rel_tol=1e-9, abs_tol=1e-12)


class Unpreserved(Consistency):
    """A planted error: noise is added on top of all the old noise."""

    def mean(self, x: Tensor, velocity: Tensor, sigma: float, sigma_next: float) -> Tensor:
        return x + (sigma_next - sigma) * velocity


PAIRS = st.sampled_from(GRID)


@over(ETAS, SEEDS, PAIRS)
def test_every_eta_keeps_the_marginal_of_the_path(eta: float, seed: int, pair: tuple[float, float]):
    check_marginal(Consistency(eta), seed, pair)


def test_the_marginal_check_sees_too_much_noise():
    refuted(partial(check_marginal, Unpreserved(0.5)), SEEDS, PAIRS)


@over(SEEDS, PAIRS)
def test_eta_near_one_joins_plain_renoising_and_a_small_eta_the_ode(seed: int, pair: tuple[float, float]):
    x, velocity = normal(seed, 1, 2, 1, 2, 2), normal(seed + 1, 1, 2, 1, 2, 2)
    close(Consistency(1 - 1e-9).mean(x, velocity, *pair), Consistency().mean(x, velocity, *pair), atol=1e-6)
    close(Consistency(1e-9).mean(x, velocity, *pair), Ode().mean(x, velocity, *pair), atol=1e-6)


def check_density(density, seed: int, std: float) -> None:
    """torch.distributions, averaged over the elements of a sample."""
    x, mean = normal(seed, 3, 2, 2), normal(seed + 1, 3, 2, 2)
    expected = torch.distributions.Normal(mean, std).log_prob(x).flatten(1).mean(1)
    close(density(x, mean, std), expected, atol=1e-9, rtol=1e-9)


def without_normalisation(x: Tensor, mean: Tensor, std: float) -> Tensor:
    return -(x - mean).square().flatten(1).mean(1) / (2 * std**2)


def summed(x: Tensor, mean: Tensor, std: float) -> Tensor:
    return gaussian_log_density(x, mean, std) * x[0].numel()


STDS = st.floats(0.05, 3.0)


def test_the_log_density_is_that_of_torch_distributions():
    holds(partial(check_density, gaussian_log_density), SEEDS, STDS)


@pytest.mark.parametrize("mutant", [without_normalisation, summed])
def test_the_density_check_sees_a_missing_constant_and_a_sum(mutant):
    refuted(partial(check_density, mutant), SEEDS, STDS)


def test_a_half_precision_log_density_is_taken_in_float32():
    x, mean = normal(0, 2, 8).half(), normal(1, 2, 8).half()
    density = gaussian_log_density(x, mean, 0.01)
    assert density.dtype == torch.float32 and bool(density.isfinite().all())


def test_a_point_mass_has_no_density():
    with pytest.raises(ValueError, match="last step"):
        gaussian_log_density(torch.zeros(1, 2), torch.zeros(1, 2), Consistency().std(*GRID[-1]))


def test_a_stochastic_step_without_noise_is_refused():
    with pytest.raises(ValueError, match=r"Consistency needs noise.*0\.9375"):
        Consistency().step(torch.zeros(1), torch.zeros(1), 1.0, 0.9375, None)


@pytest.mark.parametrize("eta", [0.0, -0.5, 1.5])
def test_an_eta_outside_its_range_is_refused(eta: float):
    with pytest.raises(ValueError, match=r"Consistency\.eta.*Ode"):
        Consistency(eta)


# the linear map


KERNELS = [Ode(), Consistency(), Consistency(0.3), FlowGRPO(0.7), RavenEulerMaruyama(0.4), DanceGRPO(0.3)]
GRIDS = (GRID, FewStepSchedule(integer_timesteps=True).transitions, FewStepSchedule((1000, 500), 1.0).transitions)
ANY_PAIR = st.sampled_from([pair for grid in GRIDS for pair in grid])


def check_coefficients(kernel: TransitionKernel, seed: int, pair: tuple[float, float]) -> None:
    """mean = a x + b v, and −b/σ is what autograd says of d mean / d x̂0 at a fixed x."""
    of_x, of_velocity = kernel.coefficients(*pair)
    x, x0 = normal(seed, 2, 3), normal(seed + 1, 2, 3).requires_grad_()
    velocity = (x - x0) / pair[0]
    mean = kernel.mean(x, velocity, *pair)
    close(mean, of_x * x + of_velocity * velocity, atol=1e-12)
    (slope,) = torch.autograd.grad(mean.sum(), x0)
    close(slope, torch.full_like(slope, -of_velocity / pair[0]), atol=1e-12)


class SlopeInX0(Consistency):
    """A planted error: the slope in x̂0 in place of that in v."""

    def coefficients(self, sigma: float, sigma_next: float) -> tuple[float, float]:
        return 1.0, 1 - sigma_next


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_coefficients_are_those_of_the_mean(kernel: TransitionKernel):
    holds(partial(check_coefficients, kernel), SEEDS, ANY_PAIR)


def test_the_coefficient_check_sees_another_slope():
    refuted(partial(check_coefficients, SlopeInX0()), SEEDS, ANY_PAIR)


# Euler–Maruyama


class FlowGRPOAsPublished:
    """Flow-GRPO's step with g = a √(σ/(1 − σ)), σ in the denominator replaced where it is 1."""

    def __init__(self, level: float) -> None:
        self.level = level

    def __call__(self, x: Tensor, v: Tensor, sigma: float, sigma_next: float, highest: float) -> tuple[Tensor, float]:
        dt = sigma_next - sigma
        g = self.level * math.sqrt(sigma / (1 - (highest if sigma == 1 else sigma)))
        mean = x * (1 + g**2 / (2 * sigma) * dt) + v * (1 + g**2 * (1 - sigma) / (2 * sigma)) * dt
        return mean, g * math.sqrt(-dt)


class DanceGRPOAsPublished(FlowGRPOAsPublished):
    """mean = x − D v + (η²/2) D score, score = −(x − (1 − σ) x̂0)/σ²."""

    def __call__(self, x: Tensor, v: Tensor, sigma: float, sigma_next: float, highest: float) -> tuple[Tensor, float]:
        drop = sigma - sigma_next
        score = -(x - (1 - sigma) * (x - sigma * v)) / sigma**2
        return x - drop * v + self.level**2 / 2 * drop * score, self.level * math.sqrt(drop)


def check_published_step(kernel_of, published, seed: int, level: float, first: float) -> None:
    """Mean and std at every step of a grid, the first one included, and finite."""
    grid = [(1.0, first), (first, 0.4), (0.4, 0.05), (0.05, 0.0)]
    x, velocity = normal(seed, 2, 3), normal(seed + 1, 2, 3)
    for pair in grid:
        kernel = kernel_of(level)
        mean, std = published(level)(x, velocity, *pair, highest=first)
        close(kernel.mean(x, velocity, *pair), mean, atol=1e-11)
        assert kernel.std(*pair) == pytest.approx(std, rel=1e-12) and math.isfinite(std)


LEVELS = st.floats(0.05, 1.4)
FIRST = st.floats(0.5, 0.98)


class AtSigmaOne(FlowGRPO):
    """A planted error: σ = 1 floored, as one release leaves it."""

    def squared_diffusion(self, sigma: float, sigma_next: float) -> float:
        return self.noise_level**2 * sigma / max(1 - sigma, 1e-6)


class InTheNumerator(FlowGRPO):
    """A planted error: the second level replaces σ in numerator and denominator alike."""

    def squared_diffusion(self, sigma: float, sigma_next: float) -> float:
        level = sigma_next if sigma == 1 else sigma
        return self.noise_level**2 * level / (1 - level)


@pytest.mark.parametrize(("kernel", "published"), [(FlowGRPO, FlowGRPOAsPublished), (DanceGRPO, DanceGRPOAsPublished)])
def test_an_euler_maruyama_step_is_the_published_one(kernel, published):
    holds(partial(check_published_step, kernel, published), SEEDS, LEVELS, FIRST)


@pytest.mark.parametrize("mutant", [AtSigmaOne, InTheNumerator, RavenEulerMaruyama, DanceGRPO])
def test_the_published_check_sees_other_first_steps(mutant):
    refuted(partial(check_published_step, mutant, FlowGRPOAsPublished), SEEDS, LEVELS, FIRST)


@over(LEVELS, FIRST)
def test_the_first_steps_std_is_the_noise_level_and_ravens_a_little_more(level: float, first: float):
    assert FlowGRPO(level).std(1.0, first) == pytest.approx(level, rel=1e-12)
    assert RavenEulerMaruyama(level).std(1.0, first) == pytest.approx(level * math.sqrt(2 - first), rel=1e-12)
    assert -FlowGRPO(level).coefficients(1.0, first)[1] == pytest.approx(1 - first, rel=1e-12)
    for sigma, following in ((0.9, 0.5), (0.5, 0.0)):
        assert RavenEulerMaruyama(level).std(sigma, following) == pytest.approx(FlowGRPO(level).std(sigma, following))
        slope = -FlowGRPO(level).coefficients(sigma, following)[1] / sigma
        assert slope == pytest.approx((sigma - following) / sigma * (1 + level**2 / 2), rel=1e-12)


def test_ravens_baseline_keeps_a_bounded_std_on_the_shipped_grids():
    largest = [max(FlowGRPO(1.0).std(*pair) for pair in grid) for grid in GRIDS[:2]]
    assert largest == pytest.approx([1.25, 1.2604], abs=5e-5)
    assert RavenEulerMaruyama(0.7).std(1.0, 0.938) == pytest.approx(0.7214, abs=5e-5)


@pytest.mark.parametrize("kernel", KERNELS[3:])
def test_an_euler_maruyama_sampler_is_stochastic_to_the_end(kernel: EulerMaruyama):
    assert kernel.stochastic and all(kernel.std(*pair) > 0 for grid in GRIDS for pair in grid)


@over(SEEDS, ANY_PAIR)
def test_little_noise_is_the_ode(seed: int, pair: tuple[float, float]):
    x, velocity = normal(seed, 2, 3), normal(seed + 1, 2, 3)
    for kernel in (FlowGRPO(1e-6), RavenEulerMaruyama(1e-6), DanceGRPO(1e-6)):
        close(kernel.mean(x, velocity, *pair), Ode().mean(x, velocity, *pair), atol=1e-9)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (FlowGRPO, r"FlowGRPO\.noise_level"),
        (RavenEulerMaruyama, r"RavenEulerMaruyama\.noise_level"),
        (DanceGRPO, r"DanceGRPO\.eta"),
    ],
)
def test_a_noise_level_of_zero_is_refused(make, name: str):
    with pytest.raises(ValueError, match=f"{name}.*Ode"):
        make(0.0)
