"""Block weights leave the size of a loss alone, and every family runs between known ends.

Statement. Weights of blocks of n_j frames satisfy Σ_j w_j n_j = Σ_j n_j. With p_j the share of the clip from block j
on,

    FutureParticipation(α):  α = −1: w ∝ 1/p;  α = 1: w ∝ p;  |α| → ∞: uniform;  α → 0⁺: the first block alone,
                             α → 0⁻: the last block alone (α = 0 itself is uniform, by convention)
    LogitNormal(m, s):       m → −∞: the last block alone;  m → ∞: the first block alone
    Mode(0):                 uniform

and at T = 7, α = −1 the published row .3857 .4500 .5399 .6749 .8999 1.3499 2.6997.
"""

from collections.abc import Callable, Sequence

from framework.block_weights import BlockWeights, FutureParticipation, LogitNormal, Mode, Uniform, participation
from theory_checks.statement import Finding, worst

Weighing = Callable[[BlockWeights, Sequence[int]], Sequence[float]]
PUBLISHED = (0.3857, 0.4500, 0.5399, 0.6749, 0.8999, 1.3499, 2.6997)
FRAMES = ((3,) * 7, (1, 3, 3, 3), (3, 3, 1), (4,), (1, 2, 3, 4, 5))


def scaled(family: BlockWeights, frames: Sequence[int]) -> Sequence[float]:
    return family(frames)


def distance(left: Sequence[float], right: Sequence[float]) -> float:
    return worst(*(abs(a - b) for a, b in zip(left, right, strict=True)))


def of_mean_one(raw: Sequence[float], frames: Sequence[int]) -> list[float]:
    """Any raw weights, scaled here."""
    total = sum(w * n for w, n in zip(raw, frames, strict=True))
    return [w * sum(frames) / total for w in raw]


def violation(weigh: Weighing) -> float:
    """Largest error of the mean, the limits and the published row."""
    families = [FutureParticipation(a) for a in (-3.0, -1.0, -0.2, 0.0, 0.5, 2.0)]
    families += [LogitNormal(-1.0, 0.7), LogitNormal(2.0, 1.5), Mode(-0.8), Mode(1.5), Uniform()]
    largest = distance([round(w, 4) for w in weigh(FutureParticipation(-1.0), (3,) * 7)], PUBLISHED)
    for frames in FRAMES:
        p, total = participation(frames), sum(frames)
        for family in families:
            mean = sum(w * n for w, n in zip(weigh(family, frames), frames, strict=True)) / total
            largest = worst(largest, abs(mean - 1))
        first = [total / frames[0], *(0.0 for _ in frames[1:])]
        last = [*(0.0 for _ in frames[1:]), total / frames[-1]]
        even = [1.0 for _ in frames]
        limits = (
            (FutureParticipation(-1.0), of_mean_one([1 / p_j for p_j in p], frames)),
            (FutureParticipation(1.0), of_mean_one(p, frames)),
            (FutureParticipation(1e9), even),
            (FutureParticipation(-1e9), even),
            (FutureParticipation(1e-9), first),
            (FutureParticipation(-1e-9), last),
            (LogitNormal(-60.0, 1.0), last),
            (LogitNormal(60.0, 1.0), first),
            (Mode(0.0), even),
        )
        largest = worst(largest, *(distance(weigh(family, frames), limit) for family, limit in limits))
    return largest


def check() -> Finding:
    """Five clips, eleven families, nine limits; planted: weights that are not scaled."""
    planted = violation(lambda family, frames: family.raw(frames))
    return Finding("Σ w_j n_j = Σ n_j; the limits of α, logit-normal and mode weights", "11 families, 5 clips, fp64",
                   violation(scaled), 1e-5, planted)  # fmt: skip
