"""A sampler step is a distribution; its mean and deviation are those of the schedulers that users know."""

import math
from functools import partial

import pytest
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from hypothesis import strategies as st
from torch import Tensor

from framework.flow import add_noise, velocity_target
from framework.kernels import Consistency, Ode, TransitionKernel, gaussian_log_density
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
