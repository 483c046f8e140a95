"""Kind l3: the mask of the selective KL, its risk ratio, when the reference moves, and how the old policy lags."""

from collections.abc import Iterator

import torch
from torch import Tensor

from framework.interfaces import Schedule
from framework.optimization import Constant, Ramp
from framework.reference import Dynamic, released_resets
from strategies.regularizers.selective_kl import AdaptiveRatio, rank_gap, risk_threshold
from tests.golden.case import Case, Row, compare

INPUTS: tuple[str, ...] = ("selective.primary", "selective.auxiliary", "reset.kl", "old_policy.step")
NOT_TAKEN_UP: tuple[str, ...] = ()
TOLERANCE = 1e-9
SIGNS = {"released": -1, "paper": 1}
"""The release ranks from the best: its gap is the negative one."""
DECAYS: dict[str, Schedule] = {"0": Constant(0.0), "1": Ramp(0.001, 0.5), "2": Ramp(0.0075, 0.999, start=75)}


def check(case: Case) -> list[Row]:
    """All rows. Masks and moves are compared exactly."""
    return [
        compare(case, tensor, actual, 0 if tensor.endswith((".mask", ".reset")) else TOLERANCE, "float64")
        for compute in (selective, resets, decays)
        for tensor, actual in compute(case)
    ]


def selective(case: Case) -> Iterator[tuple[str, Tensor]]:
    """Gap, ratio, threshold and mask of every epoch, all clips of an epoch ranked together."""
    primary, auxiliary = case["selective.primary"], case["selective.auxiliary"]
    together = torch.zeros(primary.shape[1], dtype=torch.long)
    z = (primary - primary.mean(1, keepdim=True)) / primary.std(1, correction=0, keepdim=True)
    of_masked = []
    for kind, sign in SIGNS.items():
        low, high = case.hparam("bounds")
        ratio = AdaptiveRatio(case.hparam("base"), case.hparam("step"), low, high, case.hparam("buffer"))
        rows: dict[str, list[Tensor]] = {name: [] for name in ("delta", "mean_positive", "rho", "threshold", "mask")}
        for scores, others in zip(primary, auxiliary, strict=True):
            gap = sign * rank_gap(scores, list(others), together)
            positive = gap[gap >= 0]
            rho = ratio.update(float(positive.mean()))
            threshold = risk_threshold(positive, rho)
            values = (
                gap,
                positive.mean(),
                torch.tensor(rho, dtype=torch.float64),
                torch.tensor(threshold, dtype=torch.float64),
            )
            for name, value in zip(rows, (*values, gap > threshold), strict=True):
                rows[name].append(value)
        stacked = {name: torch.stack(values) for name, values in rows.items()}
        yield from ((f"selective.{kind}.{name}", value) for name, value in stacked.items())
        flagged = [row[mask].mean() for row, mask in zip(z, stacked["mask"], strict=True) if mask.any()]
        of_masked.append(torch.stack(flagged).mean())
    yield "selective.masked_mean_primary_z", torch.stack(of_masked)


def resets(case: Case) -> Iterator[tuple[str, Tensor]]:
    """The released rule, and ours without an average and without adaptation."""
    kl = case["reset.kl"].tolist()
    moved, thresholds = released_resets(kl, case.hparam("tau0_released"), case.hparam("reset_timer_released"))
    yield "reset.released.reset", torch.tensor(moved)
    yield "reset.released.threshold", torch.tensor(thresholds, dtype=torch.float64)
    constant = case.hparam("reset_constant")
    # the golden rows move at the start of an epoch, after more than K_max whole ones
    schedule = Dynamic(constant["tau"], constant["K_max"] + 1, ema=0.0, raised=1.0, lowered=1.0)
    yield "reset.constant.reset", torch.tensor([False, *(schedule.due(value) for value in kl[:-1])])


def decays(case: Case) -> Iterator[tuple[str, Tensor]]:
    """The three schedules of the old policy."""
    steps = case["old_policy.step"].tolist()
    for kind, schedule in DECAYS.items():
        yield f"old_policy.decay_type{kind}", torch.tensor([schedule(step) for step in steps], dtype=torch.float64)
