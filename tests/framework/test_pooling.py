"""Pooling is blind to order, stays between its extremes, and says which frames a clip may ruin for free."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from framework.pooling import (
    FramePooling,
    LessDrift,
    MeanFrames,
    TailAware,
    TopFrames,
    drift,
    highest_mean,
    lowest_mean,
    pool_windows,
    share_count,
    span_weights,
)
from tests.support import close, holds, normal, over, refuted

FPS = 16.0
POOLINGS: dict[str, FramePooling] = {"mean": MeanFrames(), "top": TopFrames(), "tail-aware": TailAware()}
Pool = Callable[[Tensor], Tensor]
"""Values [N, T] → [N]."""
SEEDS, FRAMES = st.integers(0, 2**20), st.integers(1, 24)


def pools(pooling: FramePooling) -> Pool:
    return lambda values: pooling(values, FPS)


def trailing(values: Tensor) -> Tensor:
    """A planted error: the last 30 % of the frames in place of the best."""
    return values[:, -share_count(values.shape[1], 0.3) :].mean(1)


def summed(values: Tensor) -> Tensor:
    """A planted error: a sum in place of a mean."""
    return values.sum(1)


def check_order_does_not_matter(pool: Pool, seed: int, frames: int) -> None:
    values = normal(seed, 3, frames)
    shuffled = values[:, torch.randperm(frames, generator=torch.Generator().manual_seed(seed))]
    close(pool(shuffled), pool(values), atol=1e-12)


@pytest.mark.parametrize("pooling", POOLINGS.values(), ids=POOLINGS)
def test_the_order_of_the_frames_does_not_matter(pooling: FramePooling):
    holds(partial(check_order_does_not_matter, pools(pooling)), SEEDS, FRAMES)


def test_the_order_check_sees_the_last_frames():
    refuted(partial(check_order_does_not_matter, trailing), SEEDS, FRAMES)


def check_between_worst_and_best(pool: Pool, seed: int, frames: int) -> None:
    values = normal(seed, 3, frames)
    pooled = pool(values)
    assert bool((pooled >= values.amin(1) - 1e-12).all()) and bool((pooled <= values.amax(1) + 1e-12).all())
    close(pool(values + 3), pooled + 3, atol=1e-9)


@pytest.mark.parametrize("pooling", POOLINGS.values(), ids=POOLINGS)
def test_a_pooled_score_lies_between_the_worst_and_the_best_frame(pooling: FramePooling):
    holds(partial(check_between_worst_and_best, pools(pooling)), SEEDS, FRAMES)


def test_the_bound_check_sees_a_sum():
    refuted(partial(check_between_worst_and_best, summed), SEEDS, FRAMES)


@over(SEEDS, FRAMES)
def test_tails_are_ordered_around_the_mean(seed: int, frames: int):
    values = normal(seed, 3, frames)
    lowest, mean, highest = lowest_mean(values, 0.3), values.mean(1), highest_mean(values, 0.3)
    assert bool((lowest <= mean + 1e-12).all()) and bool((mean <= highest + 1e-12).all())
    close(pools(TailAware())(values), 0.5 * mean + 0.5 * lowest, atol=1e-12)
    close(lowest, -highest_mean(-values, 0.3), atol=1e-12)


def check_one_bad_frame_is_seen(pool: Pool, seed: int, frames: int) -> None:
    values = normal(seed, 2, frames)
    spoilt = values.clone()
    worst = values.argmin(1)
    spoilt[torch.arange(2), worst] -= 5
    assert bool((pool(spoilt) < pool(values) - 5 / frames).all())


FROM_FOUR = st.integers(4, 24)


def test_one_bad_frame_moves_the_tail_aware_mean_more_than_the_mean():
    holds(partial(check_one_bad_frame_is_seen, pools(TailAware())), SEEDS, FROM_FOUR)


@pytest.mark.parametrize("pooling", [*POOLINGS.values(), LessDrift(MeanFrames())])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_a_frame_without_a_score_leaves_its_clip_without_one(pooling: FramePooling, broken: float):
    values = torch.arange(20.0).view(2, 10)
    values[1, 4] = broken
    assert torch.isfinite(pooling(values, 4.0)).tolist() == [True, False]


@pytest.mark.parametrize("blind", [TopFrames(), MeanFrames()])
def test_the_bad_frame_check_sees_poolings_that_hide_it(blind: FramePooling):
    refuted(partial(check_one_bad_frame_is_seen, pools(blind)), SEEDS, FROM_FOUR)


@over(SEEDS, FROM_FOUR)
def test_the_best_frames_let_the_rest_collapse_for_free(seed: int, frames: int):
    values = normal(seed, 1, frames)
    kept = share_count(frames, 0.3)
    ruined = values.clone()
    ruined[0, values[0].argsort()[:-kept]] = -1e6
    close(pools(TopFrames())(ruined), pools(TopFrames())(values), atol=1e-12)


def test_a_share_counts_as_the_released_rewards_do():
    assert [share_count(n, 0.3) for n in (1, 3, 5, 10, 12, 81)] == [1, 1, 1, 3, 3, 24]


# drift


def test_drift_is_what_the_end_lost_and_never_a_bonus():
    falling, rising = torch.linspace(1, 0, 48)[None], torch.linspace(0, 1, 48)[None]
    close(drift(falling, 16), falling[:, :16].mean(1) - falling[:, -16:].mean(1), atol=1e-6)
    assert float(drift(rising, 16)) == 0 and float(drift(falling, 1)) == pytest.approx(1)
    pooled = LessDrift(MeanFrames(), weight=0.5)
    close(pooled(falling, FPS), falling.mean(1) - 0.5 * drift(falling, 16), atol=1e-6)
    close(pooled(rising, FPS), rising.mean(1), atol=1e-6)
    close(pooled(falling[:, :5], FPS), falling[:, :5].mean(1), atol=1e-6)  # a clip of less than a second does not drift
    with pytest.raises(ValueError, match="at least 1 frame"):
        drift(falling, 0)


# windows


def windows_oracle(values: list[list[float]], weights: list[list[float]]) -> list[float]:
    pooled = []
    for row, counts in zip(values, weights, strict=True):
        kept = [(v, w) for v, w in zip(row, counts, strict=True) if w > 0]
        pooled.append(sum(v * w for v, w in kept) / sum(w for _, w in kept) if kept else math.nan)
    return pooled


def check_windows(pool: Callable[[Tensor, Tensor], Tensor], seed: int, windows: int) -> None:
    weights = normal(seed, 4, windows).clamp(min=0)
    values = torch.where(weights > 0, normal(seed + 1, 4, windows), torch.nan)
    expected = torch.tensor(windows_oracle(values.tolist(), weights.tolist()), dtype=torch.float64)
    torch.testing.assert_close(pool(values, weights), expected, equal_nan=True)


def absent_as_zero(values: Tensor, weights: Tensor) -> Tensor:
    """A planted error: a window that a clip does not have counts as a failure."""
    return (values.nan_to_num(0) * weights).mean(1)


WINDOWS = st.integers(1, 5)


def test_windows_are_averaged_by_weight_over_those_a_clip_has():
    holds(partial(check_windows, pool_windows), SEEDS, WINDOWS)


def test_the_window_check_sees_absent_windows_counted_as_zero():
    refuted(partial(check_windows, absent_as_zero), SEEDS, WINDOWS)


def test_a_window_that_counts_and_failed_makes_the_clip_invalid():
    values = torch.tensor([[1.0, torch.nan], [1.0, torch.nan]])
    pooled = pool_windows(values, torch.tensor([[1.0, 2.0], [1.0, 0.0]]))
    assert math.isnan(float(pooled[0])) and float(pooled[1]) == 1


def test_segments_weigh_by_their_length():
    weights = span_weights(torch.tensor([[0, 4]]), torch.tensor([[4, 16]]))
    close(pool_windows(torch.tensor([[1.0, 0.0]]), weights), torch.tensor([0.25]), atol=0)
    with pytest.raises(ValueError, match="0 or more"):
        pool_windows(torch.ones(1, 2), torch.tensor([[1.0, -1.0]]))


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: TopFrames(0.0), r"TopFrames\.fraction"),
        (lambda: TailAware(share=1.5), r"TailAware\.share"),
        (lambda: TailAware(fraction=-0.1), r"TailAware\.fraction"),
        (lambda: LessDrift(MeanFrames(), seconds=0), r"LessDrift\.weight"),
    ],
)
def test_meaningless_shares_are_refused_at_construction(build: Callable[[], FramePooling], name: str):
    with pytest.raises(ValueError, match=name):
        build()
