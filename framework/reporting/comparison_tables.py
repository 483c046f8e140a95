"""The numbers of a comparison as CSV files, one row per number, that a spreadsheet or a script can read."""

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from framework.reporting.comparison import (
    Comparison,
    between_evaluations,
    difference,
    distances,
    gains,
    held_out_points,
    pooled_gains,
    trained_rewards,
)
from framework.reporting.report import GAIN_HEADERS

POOLED = "pooled"
Row = Sequence[object]


def write_tables(comparison: Comparison, folder: Path) -> list[Path]:
    """Write all CSV files into a folder, replacing those of an earlier report; returns their paths."""
    tables: dict[str, tuple[Sequence[str], Iterable[Row]]] = {
        "held_out": (("arm", "seed", *GAIN_HEADERS), held_out_rows(comparison)),
        "differences": (("arm", "baseline", *GAIN_HEADERS), difference_rows(comparison)),
        "cost": (("arm", "seed", "steps", "samples", "training_core_s", "peak_rss_mib"), cost_rows(comparison)),
        "curves": (("arm", "seed", "step", "samples", "core_s", "quantity", "value"), curve_rows(comparison)),
        "blocks": (("arm", "seed", "block", "signal", "reward"), block_rows(comparison)),
    }
    paths = []
    for name, (headers, rows) in tables.items():
        path = folder / f"{name}.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(headers)
            writer.writerows(rows)
        paths.append(path)
    return paths


def held_out_rows(comparison: Comparison) -> list[Row]:
    """Per arm, seed and signal; ``pooled`` in place of a seed for all seeds of an arm."""
    rows: list[Row] = []
    for arm, runs in comparison.arms.items():
        rows += [(arm, run.seed, *gain) for run in runs for gain in gains(run)]
        rows += [(arm, POOLED, *gain) for gain in pooled_gains(runs)]
    return rows


def difference_rows(comparison: Comparison) -> list[Row]:
    """Every later arm minus the first one, by signal, pooled over the seeds that both finished."""
    (baseline, *others) = comparison.arms.items()
    rows: list[Row] = []
    for arm, runs in others:
        if {run.seed for run in runs} & {run.seed for run in baseline[1]}:
            rows += [(arm, baseline[0], *gain) for gain in difference(runs, baseline[1])]
    return rows


def cost_rows(comparison: Comparison) -> list[Row]:
    """One row per run; an empty cell for memory that was not recorded."""
    return [
        (run.arm, run.seed, run.steps, run.samples, f"{run.core_s:.3f}",
         "" if run.peak_rss_mib is None else run.peak_rss_mib)
        for run in comparison.runs
    ]  # fmt: skip


def curve_rows(comparison: Comparison) -> list[Row]:
    """At each held-out evaluation: the held-out rewards, and trained rewards and distances since the last one."""
    rows: list[Row] = []
    for run in comparison.runs:
        points = held_out_points(run)
        steps = [point.step for point in points]
        along = {f"trained/{name}": between_evaluations(s, steps) for name, s in trained_rewards(run).items()}
        along |= {f"distance/{name}": between_evaluations(s, steps) for name, s in distances(run).items()}
        for i, point in enumerate(points):
            where = (run.arm, run.seed, point.step, int(point.samples), point.core_s)
            rows += [(*where, f"held_out/{name}", value) for name, value in point.scores.items()]
            rows += [(*where, name, values[i]) for name, values in along.items() if math.isfinite(values[i])]
    return rows


def block_rows(comparison: Comparison) -> list[Row]:
    """Mean reward per block, of the start and of every run."""
    judged = [("start", "", comparison.start_blocks), *((run.arm, run.seed, run.blocks) for run in comparison.runs)]
    return [
        (arm, seed, comparison.first_block + number, signal, float(value))
        for arm, seed, blocks in judged
        for signal, scores in blocks.items()
        for number, value in enumerate(scores.nanmean((0, 1)))
    ]
