"""Claims: how an interval over seeds decides one, and what it covers."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.claims import UpdateMemory
from framework.claims import (
    Claim,
    HeldOutDifference,
    Interval,
    Verdict,
    decide,
    interval_over_seeds,
    student_quantile,
)
from framework.reporting.claim_tables import Finding
from framework.reporting.statistics import clustered_bootstrap
from framework.weights import save_tensors
from tests.support import close, holds, normal, refuted

# the rule

Rule = Callable[[Interval, float, float], Verdict]
ENDS = st.integers(-4, 4)
REGIONS = st.tuples(st.sampled_from([-math.inf, *range(-4, 4)]), st.sampled_from([math.inf, *range(-3, 5)])).filter(
    lambda region: region[0] < region[1]
)


def check_points(rule: Rule, ends: tuple[int, int], region: tuple[float, float]) -> None:
    """Ends and regions are whole numbers, so the half steps show all: every point inside, none, or some."""
    low, high = sorted(ends)
    inside = [region[0] < low + i / 2 < region[1] for i in range(2 * (high - low) + 1)]
    expected = Verdict.AGREES if all(inside) else Verdict.UNDECIDED if any(inside) else Verdict.DISAGREES
    assert rule(Interval((low + high) / 2, low, high), *region) == expected


def of_the_mean(interval: Interval, low: float, high: float) -> Verdict:
    return Verdict.AGREES if low < interval.mean < high else Verdict.DISAGREES


def of_touching(interval: Interval, low: float, high: float) -> Verdict:
    return Verdict.DISAGREES if not (low < interval.low < high) else decide(interval, low, high)


def test_a_claim_is_decided_only_when_the_whole_interval_is_on_one_side():
    holds(lambda ends, region: check_points(decide, ends, region), st.tuples(ENDS, ENDS), REGIONS, examples=200)
    for planted in (of_the_mean, of_touching):
        refuted(lambda e, r, rule=planted: check_points(rule, e, r), st.tuples(ENDS, ENDS), REGIONS)


def check_widened(rule: Rule, ends: tuple[int, int], more: tuple[int, int], region: tuple[float, float]) -> None:
    """A wider interval says what the narrow one said, or less."""
    low, high = sorted(ends)
    narrow = rule(Interval(low, low, high), *region)
    assert rule(Interval(low, low - more[0], high + more[1]), *region) in (narrow, Verdict.UNDECIDED)


def test_a_wider_interval_decides_nothing_that_a_narrower_one_left_open():
    more = st.tuples(st.integers(0, 3), st.integers(0, 3))
    holds(lambda e, m, r: check_widened(decide, e, m, r), st.tuples(ENDS, ENDS), more, REGIONS, examples=200)
    refuted(lambda e, m, r: check_widened(of_touching, e, m, r), st.tuples(ENDS, ENDS), more, REGIONS)


def check_mirrored(rule: Rule, ends: tuple[int, int], border: int) -> None:
    """Above a border and below it are opposite claims; on the border itself neither holds."""
    low, high = sorted(ends)
    interval = Interval(low, low, high)
    above, below = rule(interval, border, math.inf), rule(interval, -math.inf, border)
    for one, other in ((above, below), (below, above)):
        assert (one is Verdict.AGREES) <= (other is Verdict.DISAGREES)
    if border not in (low, high):
        assert (above is Verdict.UNDECIDED) == (below is Verdict.UNDECIDED)


def test_opposite_claims_are_never_both_borne_out():
    holds(lambda ends, border: check_mirrored(decide, ends, border), st.tuples(ENDS, ENDS), ENDS)

    def one_sided(interval: Interval, low: float, high: float) -> Verdict:
        return Verdict.AGREES if interval.high > low else Verdict.DISAGREES

    refuted(lambda ends, border: check_mirrored(one_sided, ends, border), st.tuples(ENDS, ENDS), ENDS)


@pytest.mark.parametrize(("low", "high", "interval"), [(1, 1, (0, 0, 0)), (2, 1, (0, 0, 0)), (0, 1, (0, 1, 0))])
def test_an_empty_region_or_interval_is_refused(low: float, high: float, interval: tuple[float, float, float]):
    with pytest.raises(ValueError, match="must not be empty"):
        decide(Interval(*interval), low, high)


# the interval


def student_cdf(t: float, v: int, steps: int = 20_000) -> float:
    """By Simpson's rule over the density."""
    front = math.exp(math.lgamma((v + 1) / 2) - math.lgamma(v / 2)) / math.sqrt(v * math.pi)
    x = torch.linspace(0, t, steps + 1, dtype=torch.float64)
    weight = torch.full_like(x, 2.0)
    weight[1::2], weight[0], weight[-1] = 4.0, 1.0, 1.0
    return 0.5 + float((weight * front * (1 + x**2 / v) ** (-(v + 1) / 2)).sum()) * t / steps / 3


@pytest.mark.parametrize("freedom", [1, 2, 3, 5, 9, 10, 14, 30, 200])
def test_quantiles_are_students(freedom: int):
    assert student_cdf(student_quantile(freedom), freedom) == pytest.approx(0.975, abs=1e-5)
    assert abs(student_cdf(student_quantile(freedom) * 1.01, freedom) - 0.975) > 1e-5, "the check would see 1 %"


def test_no_degree_of_freedom_is_refused():
    with pytest.raises(ValueError, match="at least 1 degree"):
        student_quantile(0)


def captions_alone(effects: Sequence[Tensor]) -> Interval:
    return Interval(*clustered_bootstrap(torch.cat(list(effects), 1), resamples=500))


def check_coverage(interval: Callable[[Sequence[Tensor]], Interval]) -> None:
    """An effect of 1 with seeds, captions and clips that all vary is covered in 95 of 100 experiments."""
    covered = 0
    for trial in range(60):
        seeds, captions, clips = normal(trial, 3, 1, 1), normal(trial + 100, 1, 24, 1), normal(trial + 200, 3, 24, 4)
        found = interval(list(1 + 0.3 * seeds + 0.3 * captions + clips))
        covered += found.low <= 1 <= found.high
    assert covered >= 55


def test_the_interval_covers_other_seeds_and_other_captions():
    check_coverage(interval_over_seeds)
    with pytest.raises(AssertionError):
        check_coverage(captions_alone)


def test_one_seed_says_nothing_about_others():
    one = interval_over_seeds([1 + 0.01 * normal(0, 6, 2)])
    assert (one.low, one.high) == (-math.inf, math.inf) and decide(one, 0.0) is Verdict.UNDECIDED


def test_equal_seeds_leave_the_interval_of_captions_and_unequal_ones_widen_it():
    table = normal(1, 12, 3)
    captions = Interval(*clustered_bootstrap(table))
    same, apart = (interval_over_seeds([table + d for d in shift]) for shift in ([0, 0, 0], [-0.5, 0, 0.5]))
    assert same == pytest.approx(captions)
    of_seeds = 4.3027 * 0.5 / math.sqrt(3)
    assert apart.high - apart.mean == pytest.approx(math.hypot(captions.high - captions.mean, of_seeds), rel=1e-6)


@pytest.mark.parametrize("effects", [[], [torch.zeros(3, 2), torch.zeros(3, 1)], [torch.full((3, 2), torch.nan)] * 2])
def test_effects_that_are_no_experiment_are_refused(effects: list[Tensor]):
    with pytest.raises(ValueError, match=r"equal shape|not finite"):
        interval_over_seeds(effects)


# claims and what they read

MEMORY = UpdateMemory()


def claim_of(**more: object) -> Claim:
    return Claim(**{"name": "a", "statement": "", "paper": "", "source": "", "measures": "", "evidence": MEMORY} | more)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"name": "a/b"}, "names files"),
        ({"low": None}, "says nothing"),
        ({"low": 1.0, "high": 1.0}, r"Claim\.low=1\.0 must lie below"),
    ],
)
def test_a_claim_that_cannot_be_tested_is_refused(more: dict, words: str):
    with pytest.raises(ValueError, match=words):
        claim_of(**more)


def test_a_finding_is_shown_with_as_many_digits_as_its_claim_asks_for():
    held = HeldOutDifference("a.gin", "b.gin")
    finding = Finding(claim_of(evidence=held), Verdict.AGREES, Interval(0.12345, 0.1, math.inf), (0.1, 0.2))
    assert (finding.ours, finding.by_seed, finding.claim.rule) == ("+0.123 [+0.100, ∞]", "+0.100 +0.200", "> 0")
    exact = Finding(claim_of(low=0.9, high=1.1, digits=1), Verdict.AGREES, Interval(1.04, 1.04, 1.04), (1.04,))
    assert (exact.ours, exact.by_seed, exact.claim.rule) == ("1.0", "", "in (0.9, 1.1)")


def test_a_difference_is_that_of_the_scores_after_training(tmp_path: Path):
    scores = {f"{when}.{name}": normal(i, 3, 2) for i, (when, name) in
              enumerate((w, n) for w in ("before", "after") for n in ("VQ", "MQ"))}  # fmt: skip
    moved = {
        key: value + (0.5 if key == "after.MQ" else 9.0 * key.startswith("before")) for key, value in scores.items()
    }
    for name, tensors in (("a", scores), ("b", moved)):
        (tmp_path / name).mkdir()
        save_tensors(tmp_path / name / "evaluation.safetensors", tensors)
    runs = {"a.gin": tmp_path / "a", "b.gin": tmp_path / "b"}
    close(HeldOutDifference("b.gin", "a.gin", "MQ").effects(0, runs), torch.full((3, 2), 0.5), atol=1e-12)
    close(HeldOutDifference("b.gin", "a.gin").effects(0, runs), torch.full((3, 2), 0.25), atol=1e-12)
    with pytest.raises(ValueError, match=r"signal='TA', but .* was judged by MQ, VQ, total"):
        HeldOutDifference("b.gin", "a.gin", "TA").effects(0, runs)
