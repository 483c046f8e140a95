"""The few-step grid is the one the student was distilled on: warped, descending, ending in 0."""

from functools import partial

import pytest
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from hypothesis import strategies as st

from framework.schedules import FewStepSchedule, draw_shifted_sigma, shift_sigma
from tests.support import holds, over, refuted


@st.composite
def step_lists(draw) -> tuple[int, ...]:
    steps = draw(st.lists(st.integers(1, 1000), min_size=1, max_size=8, unique=True))
    return tuple(sorted(steps, reverse=True))


def test_the_default_grid_is_the_published_one():
    assert FewStepSchedule().sigmas == pytest.approx((1.0, 0.9375, 5 / 6, 0.625), abs=1e-15)


def test_the_whole_number_grid_is_the_one_of_raven():
    grid = FewStepSchedule(integer_timesteps=True)
    assert [1000 * sigma for sigma in grid.sigmas] == [1000, 938, 833, 625]


def test_an_unwarped_grid_is_the_raw_list():
    assert FewStepSchedule(warp=False).sigmas == (1.0, 0.75, 0.5, 0.25)


def check_grid_of_diffusers(sigmas_of, steps: tuple[int, ...], shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[step / 1000 for step in steps])
    assert (*sigmas_of(steps, shift), 0.0) == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)


SHIFTS = st.floats(1.0, 12.0)


def test_the_warped_grid_is_that_of_diffusers():
    holds(partial(check_grid_of_diffusers, lambda *a: FewStepSchedule(*a).sigmas), step_lists(), SHIFTS)


def test_the_grid_check_sees_an_unwarped_list_and_a_shift_applied_twice():
    unwarped = lambda steps, shift: FewStepSchedule(steps, warp=False).sigmas  # noqa: E731
    twice = lambda steps, shift: [shift_sigma(s, shift) for s in FewStepSchedule(steps, shift).sigmas]  # noqa: E731
    for mutant in (unwarped, twice):
        refuted(partial(check_grid_of_diffusers, mutant), step_lists(), SHIFTS)


@over(step_lists(), SHIFTS, st.booleans())
def test_transitions_walk_the_grid_down_to_zero(steps: tuple[int, ...], shift: float, warp: bool):
    schedule = FewStepSchedule(steps, shift, warp)
    starts, ends = zip(*schedule.transitions, strict=True)
    assert starts == schedule.sigmas and ends == (*schedule.sigmas[1:], 0.0)
    assert all(a > b for a, b in schedule.transitions)


@over(st.floats(0.0, 1.0), SHIFTS)
def test_shifting_keeps_the_ends_and_is_undone_by_the_inverse_shift(sigma: float, shift: float):
    assert shift_sigma(0.0, shift) == 0.0 and shift_sigma(1.0, shift) == pytest.approx(1.0)
    assert shift_sigma(shift_sigma(sigma, shift), 1 / shift) == pytest.approx(sigma, abs=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": ()}, "steps must strictly descend"),
        ({"steps": (250, 500)}, "steps must strictly descend"),
        ({"steps": (500, 500)}, "steps must strictly descend"),
        ({"steps": (1000, 0)}, "steps must lie in 1 … 1000"),
        ({"steps": (1001, 500)}, "steps must lie in 1 … 1000"),
        ({"shift": 0.0}, "shift must be positive"),
        ({"shift": -5.0}, "shift must be positive"),
    ],
)
def test_a_grid_that_does_not_descend_is_refused(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        FewStepSchedule(**arguments)


def test_whole_timesteps_that_coincide_are_refused():
    with pytest.raises(ValueError, match="integer_timesteps"):
        FewStepSchedule(steps=(1000, 999), shift=12.0, integer_timesteps=True)


@over(st.integers(0, 2**20), SHIFTS, st.floats(0.0, 0.3))
def test_drawn_levels_are_shifted_uniforms_above_the_floor(seed: int, shift: float, floor: float):
    drawn = draw_shifted_sigma((3, 1000), shift, torch.Generator().manual_seed(seed), floor)
    assert drawn.shape == (3, 1000) and bool(((drawn >= floor - 1e-7) & (drawn < 1)).all())
    quantiles = shift_sigma(torch.tensor([0.25, 0.5, 0.75]), shift)
    measured = drawn.flatten().quantile(torch.tensor([0.25, 0.5, 0.75]))
    assert bool(((measured - quantiles.clamp(min=floor)).abs() < 0.09).all())
