"""Intervals of clustered gains cover what they claim, and only because they resample captions."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.reporting.statistics import clustered_bootstrap

Interval = Callable[[np.ndarray], tuple[float, float, float]]


def draw(seed: int, captions: int = 24, noises: int = 8, between: float = 1.0, within: float = 1.0) -> np.ndarray:
    """Differences [C, M] with mean 0: a part that all clips of a caption share, and one of their own."""
    rng = np.random.default_rng(seed)
    return between * rng.normal(size=(captions, 1)) + within * rng.normal(size=(captions, noises))


def clustered(differences: np.ndarray) -> tuple[float, float, float]:
    return clustered_bootstrap(differences, resamples=400)


def resampling_clips(differences: np.ndarray) -> tuple[float, float, float]:
    """The planted error: clips drawn one by one, as if captions did not matter."""
    return clustered_bootstrap(differences.reshape(-1, 1), resamples=400)


def coverage(interval: Interval, runs: int = 400) -> float:
    hits = 0
    for seed in range(runs):
        _, low, high = interval(draw(seed))
        hits += low <= 0 <= high
    return hits / runs


def check_coverage(interval: Interval) -> None:
    assert 0.90 <= coverage(interval) <= 0.97  # 95 % nominal, 93 % expected of 24 captions, ± 2 · 1.3 % of 400 runs


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    check_coverage(clustered)


def test_the_coverage_check_fails_when_clips_are_resampled_instead_of_captions() -> None:
    with pytest.raises(AssertionError):
        check_coverage(resampling_clips)


def check_wider_than_iid(interval: Interval, differences: np.ndarray) -> None:
    _, low, high = interval(differences)
    _, iid_low, iid_high = clustered_bootstrap(differences.reshape(-1, 1))
    assert high - low > 1.5 * (iid_high - iid_low)


def test_clips_that_agree_within_a_caption_widen_the_interval() -> None:
    check_wider_than_iid(clustered_bootstrap, draw(0, between=1.0, within=0.3))
    with pytest.raises(AssertionError):
        check_wider_than_iid(resampling_clips, draw(0, between=1.0, within=0.3))


def test_the_width_is_the_one_of_the_normal_approximation() -> None:
    differences = draw(3, captions=200)
    _, low, high = clustered_bootstrap(differences)
    error = differences.mean(1).std(ddof=0) / math.sqrt(200)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.03)
    narrow = clustered_bootstrap(differences, level=0.5)
    assert narrow[2] - narrow[1] == pytest.approx(2 * 0.6745 * error, rel=0.03)


@given(st.integers(2, 30), st.integers(1, 6), st.integers(0, 10_000))
@settings(deadline=None, max_examples=40)
def test_the_mean_is_exact_and_the_seed_decides_the_interval(captions: int, noises: int, seed: int) -> None:
    differences = draw(seed, captions, noises)
    mean, low, high = clustered_bootstrap(differences, seed, resamples=50)
    assert mean == pytest.approx(math.fsum(differences.flatten()) / differences.size, rel=1e-12, abs=1e-15)
    assert low <= high
    assert clustered_bootstrap(torch.from_numpy(differences), seed, resamples=50) == (mean, low, high)


@given(st.floats(-10, 10), st.integers(2, 30), st.integers(1, 9))
@settings(deadline=None, max_examples=40)
def test_constant_differences_have_an_interval_of_no_width(gain: float, captions: int, noises: int) -> None:
    mean, low, high = clustered_bootstrap(np.full((captions, noises), gain), resamples=100)
    assert mean == pytest.approx(gain) and high - low <= 1e-14 * max(1, abs(gain))


def test_memory_chunks_do_not_change_what_an_interval_is(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = clustered_bootstrap(draw(0), resamples=4000)
    monkeypatch.setattr("framework.reporting.statistics.CHUNK", 24 * 100)
    assert clustered_bootstrap(draw(0), resamples=4000) == whole  # the generator's draws continue over chunks


@pytest.mark.parametrize(
    ("differences", "message"),
    [
        (np.zeros((1, 8)), "captions ≥ 2"),
        (np.zeros(8), "captions ≥ 2"),
        (np.array([[1.0, np.nan], [0, 0]]), "1 of 4 differences are not finite"),
    ],
)
def test_what_has_no_interval_is_refused(differences: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clustered_bootstrap(differences)


def test_a_level_in_per_cent_is_refused() -> None:
    with pytest.raises(ValueError, match="level"):
        clustered_bootstrap(draw(0), level=95)
