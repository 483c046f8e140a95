"""How sure a gain is: intervals for paired differences that come in clusters."""

import numpy as np
from torch import Tensor

CHUNK = 1 << 22
"""Resampled clusters held in memory at once."""


def clustered_bootstrap(
    differences: Tensor | np.ndarray, seed: int = 0, resamples: int = 10_000, level: float = 0.95
) -> tuple[float, float, float]:
    """Mean of paired differences d [C, M] (M noises of C captions) and its percentile interval (mean, low, high).

    Clips of one caption succeed and fail together, so whole captions are drawn with replacement; drawing the C·M clips
    one by one gives an interval that is too narrow as soon as captions differ.

        d̄* = (1/C) Σ_c d̄_{c*},  c* ~ U{1 … C};   [low, high] = the (1 ∓ level)/2 quantiles of d̄*

    Efron & Tibshirani, An Introduction to the Bootstrap (1993), §8.3 (resampling the units that are independent) and
    §13.3 (percentile interval). With few captions it is a little narrow: about 93 % of nominal 95 % at C = 24.
    Raises ValueError for another shape, fewer than two captions, non-finite values, or a level outside (0, 1).
    """
    table = np.asarray(differences.detach().cpu().double() if isinstance(differences, Tensor) else differences)
    table = table.astype(np.float64)
    if table.ndim != 2 or table.shape[0] < 2 or table.shape[1] < 1:
        raise ValueError(f"differences must be [captions ≥ 2, noises ≥ 1], got {list(table.shape)}")
    if not np.isfinite(table).all():
        raise ValueError(f"{(~np.isfinite(table)).sum()} of {table.size} differences are not finite")
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"level must lie in (0, 1) and resamples be positive, got {level} and {resamples}")
    mean = table.mean()
    deviations = table.mean(1) - mean  # around the mean: equal captions give an interval of width zero, not of rounding
    captions = len(deviations)
    rng = np.random.default_rng(seed)
    rows = max(1, CHUNK // captions)
    drawn = [
        deviations[rng.integers(captions, size=(min(rows, resamples - first), captions))].mean(1)
        for first in range(0, resamples, rows)
    ]
    low, high = np.quantile(np.concatenate(drawn), [(1 - level) / 2, (1 + level) / 2])
    return float(mean), float(mean + low), float(mean + high)
