"""An optimiser step is clipped, warmed up, and refused before it can do harm."""

import pytest
import torch
from hypothesis import strategies as st

from framework.optimization import AdamW, Constant, Ramp
from tests.support import close, over


def test_a_non_finite_gradient_stops_before_anything_moves_and_names_its_parameter():
    parameters = {name: torch.nn.Parameter(torch.ones(3)) for name in ("first", "second", "third")}
    for value in (torch.nan, torch.inf):
        for parameter in parameters.values():
            parameter.grad = torch.ones(3)
        parameters["second"].grad = torch.tensor([0.0, value, 0.0])
        settings = AdamW()
        with pytest.raises(FloatingPointError, match=r"second at update 7.*AdamW\.learning_rate"):
            settings.step(settings.build(parameters.values()), parameters, 7)
        assert all(bool((p == 1).all()) for p in parameters.values())


def test_gradients_are_clipped_to_the_norm_and_cleared():
    parameter = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    parameter.grad = torch.full((4,), 3.0, dtype=torch.float64)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    metrics = AdamW(learning_rate=1.0, max_grad_norm=1.0).step(optimizer, {"w": parameter}, 0)
    assert metrics["grad_norm"] == 6.0 and parameter.grad is None
    close(parameter.detach(), torch.full((4,), -0.5), atol=1e-5)


@pytest.mark.parametrize(("update", "rate"), [(0, 0.25), (1, 0.5), (3, 1.0), (100, 1.0)])
def test_the_rate_warms_up_and_the_first_step_already_moves(update: int, rate: float):
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    metrics = AdamW(2e-3, lr_warmup_steps=4).step(torch.optim.SGD([parameter], 1.0), {"w": parameter}, update)
    assert float(metrics["lr"]) == pytest.approx(2e-3 * rate)
    assert parameter.detach().abs().max() > 0


@over(st.floats(0, 0.1), st.floats(0, 1), st.integers(0, 100), st.integers(0, 2000))
def test_a_ramp_waits_rises_and_stops(rate: float, cap: float, start: int, step: int):
    expected = 0.0 if step <= start else min(rate * (step - start), cap)
    assert Ramp(rate, cap, start)(step) == pytest.approx(expected)
    assert Constant(cap)(step) == cap
