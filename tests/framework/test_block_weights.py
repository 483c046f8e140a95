"""Block weights: the published table, one mean for all families, densities against sums over a fine grid."""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from itertools import pairwise

import pytest
from hypothesis import strategies as st

from framework.block_weights import (
    BlockWeights,
    FutureParticipation,
    LogitNormal,
    Mode,
    Uniform,
    block_weights,
    participation,
)
from tests.support import holds, refuted

Family = Callable[[Sequence[int]], Sequence[float]]
FRAMES = st.lists(st.integers(1, 6), min_size=1, max_size=9)
SEVEN = [3] * 7
TABLE = {
    -1.0: (0.3857, 0.4500, 0.5399, 0.6749, 0.8999, 1.3499, 2.6997),
    1.0: (1.75, 1.5, 1.25, 1.0, 0.75, 0.5, 0.25),
    0.0: (1.0,) * 7,
}
FAMILIES = {
    "uniform": Uniform(),
    "late": FutureParticipation(-1.0),
    "early": FutureParticipation(2.0),
    "none": FutureParticipation(0.0),
    "logit-normal": LogitNormal(-0.5, 0.8),
    "middle": Mode(1.29),
    "ends": Mode(-0.8),
}


def check_table(make: Callable[[float], Family]) -> None:
    for alpha, expected in TABLE.items():
        assert make(alpha)(SEVEN) == pytest.approx(expected, abs=5e-5)


def test_seven_equal_blocks_have_the_published_weights():
    check_table(FutureParticipation)
    assert FutureParticipation(-2.0)(SEVEN)[::6] == pytest.approx((0.509, 2.037), abs=5e-4)
    assert FutureParticipation(-0.5)(SEVEN)[::6] == pytest.approx((0.275, 3.58), abs=5e-3)
    inverse = [1 / (8 - j) for j in range(1, 8)]  # α = −1 is proportional to 1 / (blocks still to come)
    assert FutureParticipation(-1.0)(SEVEN) == pytest.approx([w * 7 / sum(inverse) for w in inverse])


@pytest.mark.parametrize(
    "mutant",
    [
        lambda alpha: FutureParticipation(-alpha),  # early and late exchanged
        lambda alpha: FutureParticipation(alpha).raw,  # not scaled
        lambda alpha: lambda frames: block_weights(participation(frames), frames),  # α ignored
    ],
)
def test_the_table_check_sees_other_weights(mutant):
    with pytest.raises(AssertionError):
        check_table(mutant)


def exact_participation(alpha: Fraction, frames: Sequence[int]) -> list[Fraction]:
    """The formula of the paper in exact arithmetic, block by block."""
    share = [Fraction(sum(frames[j:]), sum(frames)) for j in range(len(frames))]
    if alpha < 0:
        share, alpha = [share[-1] / p for p in share], -alpha
    raw = [alpha * p / (1 + (alpha - 1) * p) if alpha else Fraction(1) for p in share]
    mean = sum((w * n for w, n in zip(raw, frames, strict=True)), Fraction(0)) / sum(frames)
    return [w / mean for w in raw]


def check_exact(make: Callable[[float], Family], quarters: int, frames: list[int]) -> None:
    exact = exact_participation(Fraction(quarters, 4), frames)
    assert make(quarters / 4)(frames) == pytest.approx([float(w) for w in exact], rel=1e-12)


def test_future_participation_is_its_formula_in_exact_arithmetic_for_blocks_of_any_length():
    holds(partial(check_exact, FutureParticipation), st.integers(-20, 20), FRAMES, examples=100)


class EveryBlockAlike(FutureParticipation):
    """A planted error: blocks of other lengths count as if they were equal."""

    def raw(self, frames):
        return super().raw([1] * len(frames))


def test_the_formula_check_sees_lengths_that_do_not_count():
    refuted(partial(check_exact, EveryBlockAlike), st.integers(-20, 20), FRAMES)


def check_mean(family: Family, frames: list[int]) -> None:
    """Element mean 1, no weight below 0, one weight per block."""
    weights = family(frames)
    assert len(weights) == len(frames) and min(weights) >= 0
    assert math.isclose(sum(w * n for w, n in zip(weights, frames, strict=True)) / sum(frames), 1, rel_tol=1e-12)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_family_has_element_mean_one(family: BlockWeights):
    holds(partial(check_mean, family), FRAMES)
    assert family([4]) == pytest.approx((1.0,))


def test_the_mean_check_sees_a_mean_over_blocks():
    def over_blocks(frames: Sequence[int]) -> list[float]:
        raw = FutureParticipation(-1.0).raw(frames)
        return [w * len(raw) / sum(raw) for w in raw]

    refuted(partial(check_mean, over_blocks), FRAMES)


def test_weights_per_frame_repeat_those_of_the_block():
    family = FutureParticipation(-1.0)
    first, second = family([1, 3])
    assert family.per_frame([1, 3]) == (first, second, second, second)


def check_density(family: BlockWeights, density: Callable[[float], float], frames: list[int]) -> None:
    """The weights are averages of the density over [p_{j+1}, p_j], by the midpoint rule."""
    edges = [*participation(frames), 0.0]
    points = 4000
    expected = []
    for high, low in pairwise(edges):
        width = (high - low) / points
        expected.append(sum(density(low + (i + 0.5) * width) for i in range(points)) / points)
    assert list(family(frames)) == pytest.approx(expected, rel=2e-3, abs=2e-3)


def logit_normal_density(p: float) -> float:
    z = (math.log(p / (1 - p)) + 0.5) / 0.8
    return math.exp(-z * z / 2) / (0.8 * math.sqrt(2 * math.pi) * p * (1 - p))


def mode_density(scale: float) -> Callable[[float], float]:
    """|dp/du|⁻¹ where p(u) = p, found on a fine grid."""
    grid = [i / 20_000 for i in range(20_001)]
    values = [1 - u - scale * (math.cos(math.pi * u / 2) ** 2 - 1 + u) for u in grid]

    def density(p: float) -> float:
        low, high = 0, len(grid) - 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if values[middle] > p else (low, middle)
        return (grid[high] - grid[low]) / (values[low] - values[high])

    return density


DENSITIES = {
    "logit-normal": (LogitNormal(-0.5, 0.8), logit_normal_density),
    "mode": (Mode(1.29), mode_density(1.29)),
    "mode of the ends": (Mode(-0.8), mode_density(-0.8)),
}


@pytest.mark.parametrize(("family", "density"), DENSITIES.values(), ids=DENSITIES)
def test_the_density_families_are_averages_of_their_density(family: BlockWeights, density: Callable[[float], float]):
    for frames in (SEVEN, [1, 3, 3], [5, 1, 2, 2]):
        check_density(family, density, frames)


@pytest.mark.parametrize(
    ("wrong", "density"),
    [
        (LogitNormal(0.5, 0.8), logit_normal_density),  # from the other end
        (LogitNormal(-0.5, 0.64), logit_normal_density),  # variance for deviation
        (Mode(-1.0), mode_density(1.29)),
    ],
)
def test_the_density_check_sees_other_densities(wrong: BlockWeights, density: Callable[[float], float]):
    with pytest.raises(AssertionError):
        check_density(wrong, density, SEVEN)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FutureParticipation(math.nan), r"FutureParticipation\.alpha must be finite"),
        (lambda: LogitNormal(0.0, 0.0), "LogitNormal needs a finite mean and a std above 0"),
        (lambda: Mode(1.8), r"Mode\.scale must lie in \[-1, 1\.7519\], got 1\.8"),
        (lambda: Uniform()([]), "at least one block"),
        (lambda: Uniform()([3, 0]), "at least one frame"),
        (lambda: block_weights([0.0, 0.0], [1, 1]), "not all 0"),
    ],
)
def test_weights_that_are_none_are_refused(make: Callable[[], object], message: str):
    with pytest.raises(ValueError, match=message):
        make()
