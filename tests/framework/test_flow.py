"""One flow convention: data at σ = 0, noise at σ = 1, and conversions that undo one another."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from framework.flow import (
    X0_SIGMA_FLOOR,
    add_noise,
    expand_sigma,
    noise_from_velocity,
    velocity_from_x0,
    velocity_target,
    x0_from_velocity,
)
from tests.support import close, holds, normal, over, refuted

SEEDS = st.integers(0, 2**20)
LEVELS = st.floats(0.05, 1.0)
Pair = tuple[Tensor, Tensor]


def sample(seed: int) -> Pair:
    """(x0, ε), each [2, 3, 4, 2, 2]."""
    return normal(seed, 2, 3, 4, 2, 2), normal(seed + 1, 2, 3, 4, 2, 2)


@over(SEEDS)
def test_the_path_starts_at_the_data_and_ends_in_the_noise(seed: int):
    x0, noise = sample(seed)
    assert torch.equal(add_noise(x0, noise, torch.zeros(())), x0)
    assert torch.equal(add_noise(x0, noise, torch.ones(())), noise)


@over(SEEDS, st.floats(0.0, 1.0))
def test_the_velocity_is_the_derivative_of_the_path(seed: int, level: float):
    x0, noise = sample(seed)
    at = lambda sigma: add_noise(x0, noise, torch.tensor(sigma, dtype=torch.float64))  # noqa: E731
    close((at(level + 1e-4) - at(level - 1e-4)) / 2e-4, velocity_target(x0, noise), atol=1e-9)


def check_both_ends_are_recovered(ends: Callable[[Tensor, Tensor, Tensor], Pair], seed: int, level: float) -> None:
    x0, noise = sample(seed)
    sigma = torch.tensor(level, dtype=torch.float64)
    found = ends(add_noise(x0, noise, sigma), velocity_target(x0, noise), sigma)
    close(found[0], x0, atol=1e-12)
    close(found[1], noise, atol=1e-12)


def real_ends(x: Tensor, velocity: Tensor, sigma: Tensor) -> Pair:
    return x0_from_velocity(x, velocity, sigma), noise_from_velocity(x, velocity, sigma)


def data_at_one(x: Tensor, velocity: Tensor, sigma: Tensor) -> Pair:
    """The other convention: σ = 1 is data."""
    return x - (1 - sigma) * velocity, x + sigma * velocity


def test_a_state_and_its_velocity_give_both_ends_of_the_path():
    holds(partial(check_both_ends_are_recovered, real_ends), SEEDS, LEVELS)


def test_the_recovery_check_sees_the_other_convention():
    refuted(partial(check_both_ends_are_recovered, data_at_one), SEEDS, LEVELS)


def check_inverse(to_velocity: Callable[[Tensor, Tensor, Tensor], Tensor], seed: int, level: float) -> None:
    x, x0 = sample(seed)
    sigma = torch.tensor(level, dtype=torch.float64)
    close(x0_from_velocity(x, to_velocity(x, x0, sigma), sigma), x0, atol=1e-10)


def without_the_level(x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    return x - x0


def test_an_x0_prediction_survives_the_way_through_velocity():
    holds(partial(check_inverse, velocity_from_x0), SEEDS, LEVELS)


def test_the_inverse_check_sees_a_velocity_that_is_not_divided():
    refuted(partial(check_inverse, without_the_level), SEEDS, LEVELS)


@over(SEEDS, st.floats(0.0, X0_SIGMA_FLOOR))
def test_below_the_floor_the_velocity_of_an_x0_head_stays_bounded(seed: int, level: float):
    x, x0 = sample(seed)
    close(velocity_from_x0(x, x0, torch.tensor(level, dtype=torch.float64)), (x - x0) / X0_SIGMA_FLOOR, atol=1e-9)


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_a_level_per_frame_reaches_its_own_frame(lead: tuple[int, ...]):
    sigma = torch.rand(*lead, 4, dtype=torch.float64)
    x0, noise = normal(0, *lead, 3, 4, 2, 2), normal(1, *lead, 3, 4, 2, 2)
    noisy = add_noise(x0, noise, expand_sigma(sigma))
    for f in range(4):
        level = sigma[..., f, None, None, None]
        close(noisy[..., f, :, :], (1 - level) * x0[..., f, :, :] + level * noise[..., f, :, :], atol=1e-12)
