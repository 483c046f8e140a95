"""Bookkeeping of a training step: wall-clock laps, and metrics under their public tags."""

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from framework.types import Advantage, GroupPlan, Scores

Scalars = dict[str, Tensor | float]


@dataclass(frozen=True)
class GroupCount:
    """Who is rolled out in a group, and how a reader is told. branches: explore. anchors: explore nothing, on top."""

    branches: int
    anchors: int

    @classmethod
    def of(cls, plan: GroupPlan) -> "GroupCount":
        """Counted in a plan; all plans of a rollout are alike in this."""
        anchors = sum(branch.anchor for branch in plan.branches)
        return cls(len(plan.branches) - anchors, anchors)

    @property
    def clips(self) -> int:
        """All of them are generated, decoded and scored."""
        return self.branches + self.anchors

    def arithmetic(self, prompts: int) -> str:
        """``6 prompts × (8 branches + 1 anchor) = 54 clips``; without anchors ``6 prompts × 8 branches = 48 clips``."""
        anchors = f"{self.anchors} anchor{'s' if self.anchors > 1 else ''}"
        group = f"({self.branches} branches + {anchors})" if self.anchors else f"{self.branches} branches"
        return f"{prompts} prompts × {group} = {prompts * self.clips} clips"


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
    learned: Collection[str],
    advantage: Advantage,
    active: int,
    laps: Mapping[str, float],
) -> Scalars:
    """The metrics of one step under their public tags. learned: the signals of ``reward/total``."""
    metrics: Scalars = {f"train/{name}": value for name, value in update.items()}
    metrics |= {f"train/{name}": value for name, value in advantage.metrics.items()}
    metrics["train/active_clips"] = active
    total = torch.zeros(())
    scored = {name: value[scores.valid[name]] for name, value in scores.values.items() if scores.valid[name].any()}
    for name, valid in scored.items():
        metrics[f"reward/{name}/mean"] = valid.mean()
        metrics[f"reward/{name}/std"] = valid.std(correction=0)
        if name in learned:
            total = total + valid.mean() / len(scored.keys() & set(learned))
    metrics["reward/total"] = total
    return metrics | {f"time/{name}": value for name, value in laps.items()}


def add_scalars(into: Scalars, more: Mapping[str, Tensor | float]) -> None:
    """Sum metrics of several probes of one update in place."""
    for name, value in more.items():
        into[name] = into[name] + value if name in into else value
