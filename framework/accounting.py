"""Bookkeeping of a training step: wall-clock laps, and metrics under their public tags."""

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from framework.types import Advantage, Scores

Scalars = dict[str, Tensor | float]


class Stopwatch:
    """Wall-clock seconds between laps, by name."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now


def collect_metrics(
    update: Mapping[str, Tensor | float],
    scores: Scores,
    advantage: Advantage,
    active: int,
    laps: Mapping[str, float],
) -> Scalars:
    """The metrics of one step under their public tags."""
    metrics: Scalars = {f"train/{name}": value for name, value in update.items()}
    metrics |= {f"train/{name}": value for name, value in advantage.metrics.items()}
    metrics["train/active_clips"] = active
    total = torch.zeros(())
    for name, value in scores.values.items():
        valid = value[scores.valid[name]]
        metrics[f"reward/{name}/mean"] = valid.mean()
        metrics[f"reward/{name}/std"] = valid.std(correction=0)
        total = total + valid.mean() / len(scores.values)
    metrics["reward/total"] = total
    return metrics | {f"time/{name}": value for name, value in laps.items()}


def add_scalars(into: Scalars, more: Mapping[str, Tensor | float]) -> None:
    """Sum metrics of several probes of one update in place."""
    for name, value in more.items():
        into[name] = into[name] + value if name in into else value
