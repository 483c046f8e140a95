"""Rotation is a complex product, depends on differences of positions only, and keeps its precision under bf16."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backbones.rope import rope_table, rotate
from tests.backbones.micro import noise
from tests.backbones.oracle import turn


def table(positions, dtype=torch.float64, size=(2, 3), dim=16):
    return rope_table(tuple(positions), *size, dim, 10000.0, dtype, torch.device("cpu"))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=4), st.sampled_from((12, 16, 32)))
def test_a_rotation_is_a_complex_product_per_axis(positions: list[int], dim: int):
    x = noise(0, 2, len(positions), 6, 2, dim)
    found = rotate(x, table(positions, dim=dim))
    for i, time in enumerate(positions):
        expected = turn(x[:, i], time, (2, 3))
        assert float((found[:, i] - expected).abs().max()) < 1e-10
        if time != 1000:
            assert float((found[:, i] - turn(x[:, i], time + 1, (2, 3))).abs().max()) > 1e-2


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 200))
def test_scores_depend_on_the_difference_of_positions(query: int, key: int, shift: int):
    q, k = noise(1, 1, 1, 6, 2, 16), noise(2, 1, 1, 6, 2, 16)

    def scores(a: int, b: int):
        return torch.einsum("nfqhd,nfkhd->hqk", rotate(q, table([a])), rotate(k, table([b])))

    assert torch.allclose(scores(query, key), scores(query + shift, key + shift), atol=1e-9, rtol=0)
    assert not torch.allclose(scores(query, key), scores(query + 1, key), atol=1e-3, rtol=0)


def test_a_bf16_tensor_is_rotated_by_an_unrounded_table():
    x = noise(0, 1, 1, 6, 2, 16).bfloat16()
    narrow = table([1000], torch.float32)
    exact = rotate(x.double(), table([1000]))
    found = rotate(x, narrow)
    assert found.dtype == torch.bfloat16
    half_ulp = 2.0**-8
    assert bool(((found.double() - exact).abs() <= half_ulp * exact.abs() + 1e-6).all())
    coarse = torch.view_as_complex(torch.view_as_real(narrow).bfloat16().float())
    rounded = rotate(x, coarse)  # the planted error
    assert not bool(((rounded.double() - exact).abs() <= half_ulp * exact.abs() + 1e-6).all())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 0.0), (torch.float32, 6e-8)])
def test_tables_are_built_in_float64_and_rounded_once(dtype: torch.dtype, tolerance: float):
    wide, narrow = table([1000]), table([1000], dtype)
    assert narrow.dtype == dtype.to_complex()
    assert float((wide - narrow.to(wide.dtype)).abs().max()) <= tolerance
