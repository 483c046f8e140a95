"""How branches draw their frames: without replacement, alike, each draw as its docstring says."""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from math import comb

import pytest
import torch
from hypothesis import strategies as st

from framework.rng import Streams
from strategies.exploration.causal_history_routing import (
    CyclicWindows,
    DistinctDraws,
    IndependentDraws,
    RouteDraw,
    cyclic_windows,
    inclusion_probability,
    is_route,
)
from tests.support import holds, over, refuted

SEEDS = st.integers(0, 2**20)
DRAWS = (IndependentDraws(), CyclicWindows())


def check_draw(draw: RouteDraw, pool: range, share: float, branches: int, seed: int) -> None:
    count = max(1, round(share * len(pool)))
    routes = draw.draw(pool, count, branches, Streams(seed))
    assert len(routes) == branches
    assert all(list(route) == sorted(route) and is_route(route, pool, count) for route in routes)
    assert routes == draw.draw(pool, count, branches, Streams(seed))


class WithReplacement(RouteDraw):
    """A planted error."""

    def draw(self, pool: Sequence[int], frames: int, branches: int, streams: Streams) -> list[tuple[int, ...]]:
        places = torch.randint(len(pool), (branches, frames), generator=streams("order")).tolist()
        return [tuple(sorted(pool[i] for i in row)) for row in places]


POOLS = (st.builds(range, st.integers(0, 9), st.integers(10, 40)), st.floats(0.05, 1.0), st.integers(2, 9), SEEDS)


@pytest.mark.parametrize("draw", DRAWS)
def test_a_draw_gives_every_branch_different_frames_of_the_pool(draw: RouteDraw):
    holds(partial(check_draw, draw), *POOLS)


def test_the_draw_check_sees_repeated_frames():
    refuted(partial(check_draw, WithReplacement()), *POOLS)


def check_uniform(draw: RouteDraw, pool: int, count: int, branches: int = 4, tries: int = 600) -> None:
    """Every frame is as often on a route as the paper says: within five deviations of independent tries."""
    hits = torch.zeros(pool, dtype=torch.float64)
    for seed in range(tries):
        for route in draw.draw(range(pool), count, branches, Streams(seed)):
            hits[list(route)] += 1
    p = inclusion_probability(pool, count)
    assert p == pytest.approx(comb(pool - 1, count - 1) / comb(pool, count))
    slack = 5 * (p * (1 - p) / tries) ** 0.5  # branches of a try may be tied, so only tries count
    assert bool(((hits / (branches * tries) - p).abs() < slack + 1e-12).all())


def check_no_twins(draw: RouteDraw, pool: int, count: int, seed: int) -> None:
    branches = min(8, comb(pool, count))
    routes = draw.draw(range(pool), count, branches, Streams(seed))
    assert len(set(routes)) == branches


def test_distinct_draws_give_no_two_branches_the_same_frames():
    holds(partial(check_no_twins, DistinctDraws()), st.integers(4, 9), st.integers(1, 4), SEEDS)


def test_the_twin_check_sees_independent_draws():
    refuted(partial(check_no_twins, IndependentDraws()), st.integers(4, 9), st.integers(1, 4), SEEDS)


def test_distinct_draws_that_do_not_meet_are_the_independent_ones():
    assert DistinctDraws().draw(range(30), 6, 8, Streams(0)) == IndependentDraws().draw(range(30), 6, 8, Streams(0))


def test_a_pool_with_fewer_routes_than_branches_is_refused_by_distinct_draws():
    with pytest.raises(ValueError, match=r"pool of 7 frames has fewer than 8 routes of 6 .* IndependentDraws"):
        DistinctDraws().draw(range(7), 6, 8, Streams(0))


class Oldest(RouteDraw):
    """A planted error: old frames are preferred."""

    def draw(self, pool: Sequence[int], frames: int, branches: int, streams: Streams) -> list[tuple[int, ...]]:
        weight = torch.linspace(2.0, 1.0, len(pool))
        chosen = [torch.multinomial(weight, frames, generator=streams(b)).tolist() for b in range(branches)]
        return [tuple(sorted(pool[i] for i in row)) for row in chosen]


@pytest.mark.parametrize("draw", DRAWS)
def test_frames_of_the_pool_are_drawn_alike(draw: RouteDraw):
    check_uniform(draw, 9, 4)
    check_uniform(draw, 4, 4)


def test_the_uniformity_check_sees_a_preference():
    with pytest.raises(AssertionError):
        check_uniform(Oldest(), 9, 4)


@over(st.integers(1, 20), st.integers(1, 20), st.integers(1, 9))
def test_cyclic_windows_step_through_one_permutation(pool: int, frames: int, branches: int):
    frames = min(frames, pool)
    order = [7 * i % 29 for i in range(pool)]  # 29 is prime: all different
    ring = order * (2 + branches)
    step = max(1, pool // branches)
    expected = [tuple(sorted(ring[b * step : b * step + frames])) for b in range(branches)]
    assert cyclic_windows(order, frames, branches) == expected


def test_neighbouring_windows_overlap_and_independent_draws_do_so_by_chance():
    """KVPO's release: 5 of 14 frames, 8 branches: siblings share 4 with a neighbour, 2.14 on average against 1.79."""

    def overlap(routes: list[tuple[int, ...]]) -> float:
        pairs = [(a, b) for i, a in enumerate(routes) for b in routes[:i]]
        return sum(len({*a} & {*b}) for a, b in pairs) / len(pairs)

    windows = CyclicWindows().draw(range(14), 5, 8, Streams(0))
    assert {len({*a} & {*b}) for a, b in pairwise(windows)} == {4}
    assert overlap(windows) == pytest.approx(2.14, abs=0.005)
    independent = [overlap(IndependentDraws().draw(range(14), 5, 8, Streams(seed))) for seed in range(200)]
    assert sum(independent) / 200 == pytest.approx(25 / 14, abs=0.05)


# What branches and groups share
