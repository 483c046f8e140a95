"""What several arms and seeds achieved side by side: read from run folders, paired, pooled, and checked for hacking."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from framework.reporting.memory import read_memory
from framework.reporting.metrics import read_metrics
from framework.reporting.report import EVALUATION_TAG, ROLLOUT_TAG, TOTAL, Gain, gain_table
from framework.reporting.summary import read_scores
from framework.weights import read_tensors

DISTANCES = ("kl", "kl_penalised", "kl_diluted", "penalty", "distance_to_old")
"""Metrics under ``train/`` that say how far a policy has gone, or what it pays for that."""
Scored = Mapping[str, Tensor]


@dataclass(frozen=True)
class RunResult:
    """One finished run. before, after: per signal [captions, noises]. records: the lines of metrics.jsonl.

    blocks: per signal [captions, noises, blocks] of the policy that the run ended with. clips: one video per shown
    caption. peak_rss_mib: None where the run did not record it. command: what started it.
    """

    arm: str
    seed: int
    folder: Path
    before: Scored
    after: Scored
    records: Sequence[Mapping[str, float]]
    steps: int
    samples: int
    core_s: float
    peak_rss_mib: float | None
    command: str
    blocks: Scored = field(default_factory=dict)
    clips: tuple[Path, ...] = ()

    @property
    def signals(self) -> tuple[str, ...]:
        """Of the held-out reward, the total last."""
        return (*self.before, TOTAL)

    def judged(self, blocks: Scored, clips: tuple[Path, ...]) -> "RunResult":
        """The same with what judging its final policy block by block gave."""
        return replace(self, blocks=blocks, clips=clips)


class Failure(NamedTuple):
    """A run that did not finish, and the line that says why."""

    run: str
    line: str


class Point(NamedTuple):
    """One held-out evaluation. core_s: of training so far. scores: per signal and in total."""

    step: int
    samples: float
    core_s: float
    scores: dict[str, float]


def read_run(arm: str, seed: int, folder: Path, command: str = "") -> RunResult:
    """What `armillary train` left in a folder.

    Raises OSError for a missing file, ValueError for one that is damaged or holds a score that is not finite.
    """
    before, after = read_scores(read_tensors(folder / "evaluation.safetensors"))
    gain_table(before, after, resamples=1)  # refuses what cannot be compared
    try:
        facts = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        numbers = int(facts["steps"]), int(facts["samples"]), float(facts["training_core_s"])
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder / 'summary.json'} is not the summary of a run: {error!r}") from error
    records = read_metrics(folder / "metrics.jsonl")
    return RunResult(arm, seed, folder, before, after, records, *numbers, read_memory(folder).get("peak_rss_mib"),
                     command)  # fmt: skip


def gains(run: RunResult) -> list[Gain]:
    """Before and after of one run, paired by caption and noise; intervals clustered by caption."""
    return gain_table(run.before, run.after)


def side_by_side(sides: Sequence[Scored]) -> dict[str, Tensor]:
    """Scores [captions, noises] of several runs as columns of one table [captions, runs · noises]."""
    return {signal: torch.cat([side[signal] for side in sides], dim=1) for signal in sides[0]}


def pooled_gains(runs: Sequence[RunResult]) -> list[Gain]:
    """Gains over all seeds of an arm: the mean over seeds, with the interval of captions.

    The seeds are those that were run and are not resampled: three say little about all others. Their spread is shown
    beside the interval.
    """
    return gain_table(side_by_side([run.before for run in runs]), side_by_side([run.after for run in runs]))


def difference(runs: Sequence[RunResult], baseline: Sequence[RunResult]) -> list[Gain]:
    """After against after: an arm minus the baseline on the same captions, noises and seeds.

    Raises ValueError when the two share no seed.
    """
    theirs = {run.seed: run for run in baseline}
    pairs = [(theirs[run.seed], run) for run in runs if run.seed in theirs]
    if not pairs:
        raise ValueError(f"{runs[0].arm} and {baseline[0].arm} have no seed in common")
    return gain_table(side_by_side([a.after for a, _ in pairs]), side_by_side([b.after for _, b in pairs]))


def held_out_points(run: RunResult) -> list[Point]:
    """The held-out evaluations of a run in order of steps, the start first."""
    spent = {0.0: 0.0} | {r["step"]: r["time/core_s"] for r in run.records if "time/core_s" in r}
    points = []
    for record in run.records:
        scores = {found[1]: value for key, value in record.items() if (found := EVALUATION_TAG.fullmatch(key))}
        if scores:
            step = record["step"]
            points.append(Point(int(step), record["samples_seen"], spent.get(step, math.nan), scores))
    return sorted(points, key=lambda point: point.step)


def trained_rewards(run: RunResult) -> dict[str, list[tuple[int, float]]]:
    """Per trained signal and in total: (step, mean reward of its rollouts), in order of steps."""
    series: dict[str, list[tuple[int, float]]] = {}
    for record in run.records:
        for key, value in record.items():
            if found := ROLLOUT_TAG.fullmatch(key):
                signal = next(name for name in found.groups() if name is not None)
                series.setdefault(signal, []).append((int(record["step"]), value))
    return {signal: sorted(values) for signal, values in series.items()}


def between_evaluations(series: Sequence[tuple[int, float]], steps: Sequence[int]) -> list[float]:
    """Mean of a training series since the last held-out evaluation, one value per evaluation at ``steps``.

    The first evaluation comes before any step; the rollouts of the first step, which the untrained policy made, stand
    for it. NaN where nothing was logged.
    """
    means = []
    for i, step in enumerate(steps):
        low = steps[i - 1] if i else 0
        values = [value for at, value in series if (low < at <= step if i else at == 1)]
        values = [value for value in values if math.isfinite(value)]
        means.append(sum(values) / len(values) if values else math.nan)
    return means


def distances(run: RunResult) -> dict[str, list[tuple[int, float]]]:
    """The `DISTANCES` that a run logged and that were ever other than zero: (step, value) by name."""
    found = {}
    for name in DISTANCES:
        series = [(int(r["step"]), r[f"train/{name}"]) for r in run.records if f"train/{name}" in r]
        if any(value for _, value in series):
            found[name] = sorted(series)
    return found


class Rise(NamedTuple):
    """How a training series moved: mean of its last quarter minus mean of its first, and that difference's error."""

    change: float
    error: float

    @property
    def certain(self) -> bool:
        """Whether it rose by more than two standard errors."""
        return self.change > 2 * self.error


def rise(values: Sequence[float]) -> Rise | None:
    """Last quarter against first quarter of at least eight finite values, with Welch's standard error; None for less.

    Δ = m₂ − m₁,   s² = (v₁ + v₂) / n   with the quarters' means m, variances v and n = ⌊N/4⌋ values each
    """
    finite = [value for value in values if math.isfinite(value)]
    quarter = len(finite) // 4
    if quarter < 2:
        return None
    first, last = (torch.tensor(part, dtype=torch.float64) for part in (finite[:quarter], finite[-quarter:]))
    error = ((first.var() + last.var()) / quarter).sqrt()
    return Rise(float(last.mean() - first.mean()), float(error))


ALARM_RULE = (
    "Alarm: some held-out reward ended below its best evaluation (the start counts) by more than half the width of its "
    "gain's 95 % interval, while in the rollouts since then the mean of some trained reward is higher in the last "
    "quarter than in the first by more than two standard errors. With fewer than eight rollouts since then nothing is "
    "said."
)


def alarms(run: RunResult) -> list[str]:
    """One line for each held-out reward of a run that `ALARM_RULE` is true of."""
    widths = {gain.signal: (gain.high - gain.low) / 2 for gain in gains(run)}
    points, trained = held_out_points(run), trained_rewards(run)
    lines = []
    for signal in run.signals:
        best = max(points, key=lambda point: point.scores[signal])
        fall = best.scores[signal] - points[-1].scores[signal]
        if not fall > widths[signal]:
            continue
        moved = {name: rise([value for step, value in series if step > best.step]) for name, series in trained.items()}
        risen = [f"{name} {move.change:+.3f}" for name, move in moved.items() if move is not None and move.certain]
        if risen:
            lines.append(f"{run.arm}, seed {run.seed}: held-out {signal} fell by {fall:.3f} since step {best.step}, "
                         f"while the rollouts gained in {', '.join(risen)}")  # fmt: skip
    return lines


@dataclass(frozen=True)
class Comparison:
    """Everything that the report shows. runs: of all arms, finished. failures: runs that are not among them.

    configs: arm → its configuration in full. start_blocks, start_clips: as in `RunResult`, of the policy that all arms
    started from. captions: of the shown clips. shown: their rows in the tables of scores. command: of the comparison.
    """

    runs: tuple[RunResult, ...]
    failures: tuple[Failure, ...] = ()
    configs: Mapping[str, str] = field(default_factory=dict)
    start_blocks: Scored = field(default_factory=dict)
    start_clips: tuple[Path, ...] = ()
    captions: tuple[str, ...] = ()
    shown: tuple[int, ...] = ()
    first_block: int = 0
    command: str = ""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("a comparison needs at least one finished run")
        for run in self.runs:
            theirs = {signal: tuple(value.shape) for signal, value in run.before.items()}
            ours = {signal: tuple(value.shape) for signal, value in self.runs[0].before.items()}
            if theirs != ours:
                raise ValueError(f"{run.folder} was judged as {theirs}, {self.runs[0].folder} as {ours}: not alike")

    @property
    def arms(self) -> dict[str, list[RunResult]]:
        """Finished runs by arm, in the order given."""
        found: dict[str, list[RunResult]] = {}
        for run in self.runs:
            found.setdefault(run.arm, []).append(run)
        return found

    @property
    def signals(self) -> tuple[str, ...]:
        """Of the held-out reward, the total first."""
        return (TOTAL, *self.runs[0].before)

    @property
    def alarms(self) -> list[str]:
        """Of all runs."""
        return [line for run in self.runs for line in alarms(run)]
