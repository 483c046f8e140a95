"""The velocity KL is a mean square, zero at the reference, and diluted by unmarked clips."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from framework.flow import velocity_distance
from framework.records import EndpointShift, endpoint_shift, written_shift
from framework.types import Objective
from strategies.regularizers.velocity_kl import VelocityKL, batch_normalised, masked_mean
from tests.support import close, holds, normal, over, refuted

SEEDS = st.integers(0, 2**20)


@over(SEEDS, st.floats(0.0, 2.0))
def test_the_penalty_is_the_mean_square_of_the_velocity_gap(seed: int, weight: float):
    current, reference = normal(seed, 3, 1, 2, 2, 2, 2), normal(seed + 1, 3, 1, 2, 2, 2, 2)
    written = written_shift(endpoint_shift({"current": current, "reference": reference}))
    assert isinstance(written[EndpointShift], EndpointShift)
    objective = Objective(torch.zeros(3), written)
    expected = torch.stack([(c - r).square().mean() for c, r in zip(current, reference, strict=True)])
    close(VelocityKL(weight).penalty(objective, None), weight * expected, atol=1e-12)
    marks = torch.tensor([1.0, 0.0, 1.0])
    close(VelocityKL(weight).penalty(objective, marks), weight * expected * marks, atol=1e-12)


def check_dilution(normalised: Callable[[Tensor, Tensor], Tensor], seed: int, unmarked: int) -> None:
    """Unmarked clips added to the batch scale the term by 1/B and by nothing else."""
    values, mask = normal(seed, 4).square(), torch.tensor([1.0, 0.0, 1.0, 0.0])
    more = torch.cat([values, normal(seed + 1, unmarked).square()])
    diluted = normalised(more, torch.cat([mask, torch.zeros(unmarked)]))
    close(diluted, normalised(values, mask) * 4 / (4 + unmarked), atol=1e-12)


def test_a_lone_marked_clip_weighs_one_over_the_batch():
    holds(partial(check_dilution, batch_normalised), SEEDS, st.integers(1, 5))


def test_the_dilution_check_sees_a_mean_over_the_marked():
    refuted(partial(check_dilution, masked_mean), SEEDS, st.integers(1, 5))


@over(SEEDS)
def test_the_kl_is_zero_only_at_the_reference(seed: int):
    velocity = normal(seed, 2, 1, 2, 2, 2, 2)
    assert bool((velocity_distance(velocity, velocity) == 0).all())
    assert bool((velocity_distance(velocity, velocity + 1e-3) > 0).all())


def test_a_negative_weight_is_refused():
    with pytest.raises(ValueError, match=r"VelocityKL\.weight"):
        VelocityKL(-1e-3)
