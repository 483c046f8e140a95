"""An average of weights is a running mean by name, and a copy."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from framework.averaging import WeightAverage
from tests.support import close, holds, refuted


def scalar_average(values: list[float], decays: list[float]) -> float:
    average = values[0]
    for value, decay in zip(values[1:], decays, strict=True):
        average = decay * average + (1 - decay) * value
    return average


def check_average(update: Callable[[WeightAverage, dict[str, Tensor], float], None], drawn: list) -> None:
    values, decays = [v for v, _ in drawn], [d for _, d in drawn[1:]]
    tensors = [{"w": torch.full((2,), v, dtype=torch.float64)} for v in values]
    average = WeightAverage(tensors[0])
    for weights, decay in zip(tensors[1:], decays, strict=True):
        update(average, weights, decay)
    close(average.weights["w"], torch.full((2,), scalar_average(values, decays)).double(), atol=1e-5)


VALUES = st.lists(st.tuples(st.floats(-5, 5), st.floats(0, 1)), min_size=2, max_size=6)


def test_an_average_is_d_times_the_average_plus_the_rest():
    holds(partial(check_average, WeightAverage.update), VALUES)


def test_the_average_check_sees_the_decay_on_the_wrong_side():
    refuted(partial(check_average, lambda a, weights, decay: a.update(weights, 1 - decay)), VALUES)


def test_an_average_is_a_copy_and_takes_weights_by_name():
    weights = {"a": torch.zeros(2), "b": torch.ones(2)}
    average = WeightAverage(weights)
    weights["a"] += 1
    assert average.weights["a"].sum() == 0
    average.update({"b": weights["b"], "a": weights["a"]}, 0.0)
    assert average.weights["a"].sum() == 2 and average.weights["b"].sum() == 2
    with pytest.raises(KeyError, match="c"):
        average.update({"a": weights["a"], "c": weights["b"]}, 0.5)
