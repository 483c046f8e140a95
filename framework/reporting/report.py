"""What a run achieved, as a person reads it: the reward curve, and the table of held-out gains."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from framework.reporting.metrics import read_metrics
from framework.reporting.statistics import clustered_bootstrap
from framework.reporting.videos import write_whole

TOTAL = "total"
ROLLOUT_TAG, EVALUATION_TAG = re.compile(r"reward/(.+)/mean|reward/(total)"), re.compile(r"eval/reward/(.+)")
ROLLOUT_COLOUR, EVALUATION_COLOUR, MUTED = "#8c959f", "#0969da", "#656d76"


class Gain(NamedTuple):
    """One signal's paired comparison: means over all clips, their difference, and its interval."""

    signal: str
    before: float
    after: float
    gain: float
    low: float
    high: float


GAIN_HEADERS = ("signal", "before", "after", "gain", "low", "high")


def gain_table(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    *,
    seed: int = 0,
    resamples: int = 10_000,
    level: float = 0.95,
) -> list[Gain]:
    """Gains on the same captions and noises, with intervals clustered by caption (`clustered_bootstrap`).

    before, after: per signal float [captions, noises]. The last row, "total", is the mean of the signals.
    Raises ValueError when signals or shapes differ, a score is not finite, or a signal is called "total" itself.
    """
    if not before or set(before) != set(after):
        raise ValueError(f"before and after must score the same signals, got {sorted(before)} and {sorted(after)}")
    if TOTAL in before:
        raise ValueError(f"{TOTAL!r} is the mean of the other signals and is added here; leave it out")
    for name, scores in before.items():
        if scores.shape != after[name].shape or scores.shape != next(iter(before.values())).shape:
            raise ValueError(
                f"{name!r} has scores of shape {list(scores.shape)} before and {list(after[name].shape)} after; "
                "all signals need the same [captions, noises]"
            )
        bad = int((~(torch.isfinite(scores) & torch.isfinite(after[name]))).sum())
        if bad:
            raise ValueError(f"{bad} of {scores.numel()} pairs of {name!r} have a score that is not finite")
    pairs = {name: (before[name].double().cpu(), after[name].double().cpu()) for name in before}
    first, second = (torch.stack([pair[side] for pair in pairs.values()]).mean(0) for side in (0, 1))
    rows = []
    for name, (old, new) in {**pairs, TOTAL: (first, second)}.items():
        gain, low, high = clustered_bootstrap(new - old, seed, resamples, level)
        rows.append(Gain(name, old.mean().item(), new.mean().item(), gain, low, high))
    return rows


def gain_cells(rows: Sequence[Gain]) -> list[list[str]]:
    """Rows of `gain_table` as text for a table with GAIN_HEADERS; differences carry their sign."""
    return [
        [row.signal, f"{row.before:.3f}", f"{row.after:.3f}", *(f"{x:+.3f}" for x in (row.gain, row.low, row.high))]
        for row in rows
    ]


def _cells(rows: Sequence[Sequence[object]], headers: Sequence[str]) -> tuple[list[list[str]], list[bool]]:
    """Text of all cells, floats with three decimals, and which columns hold nothing but numbers."""
    for row in rows:
        if len(row) != len(headers):
            raise ValueError(f"a row has {len(row)} cells under {len(headers)} headers: {list(row)}")
    table = [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    return table, [bool(table) and all(_is_number(row[i]) for row in table) for i in range(len(headers))]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def format_table(rows: Sequence[Sequence[object]], headers: Sequence[str]) -> str:
    """Aligned plain text for a terminal: columns of numbers to the right, others to the left, a rule below the headers.

    Raises ValueError for a row that does not fit the headers.
    """
    table, numeric = _cells(rows, headers)
    widths = [max(len(line[i]) for line in [list(headers), *table]) for i in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.rjust(w) if n else c.ljust(w) for c, w, n in zip(cells, widths, numeric, strict=True)]
        return "  ".join(padded).rstrip()

    return "\n".join([line(headers), "  ".join("─" * width for width in widths), *map(line, table)])


def markdown_table(rows: Sequence[Sequence[object]], headers: Sequence[str]) -> str:
    """The same table in GitHub's Markdown. Raises ValueError for a row that does not fit the headers."""
    table, numeric = _cells(rows, headers)
    marks = ["---:" if right else ":---" for right in numeric]
    lines = [list(headers), marks, *table]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _series(records: Sequence[Mapping[str, float]], tag: re.Pattern[str]) -> dict[str, np.ndarray]:
    """Per signal the points [n, 2] of (samples seen, value) that have a tag, in order of samples."""
    points: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        for key, value in record.items():
            if found := tag.fullmatch(key):
                signal = next(name for name in found.groups() if name is not None)
                points.setdefault(signal, []).append((record["samples_seen"], value))
    return {signal: np.array(sorted(pairs, key=lambda pair: pair[0])) for signal, pairs in points.items()}


def running_mean(values: np.ndarray, reach: int) -> np.ndarray:
    """Mean over the up to 2·reach + 1 neighbours of each point [n], NaN left out; the window shrinks at both ends."""
    windows = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return np.array([w[~np.isnan(w)].mean() if (~np.isnan(w)).any() else np.nan for w in windows])


def reward_curve(metrics_path: Path | str, out_png: Path | str, *, overwrite: bool = False) -> None:
    """Draw a run: per signal the rollout reward and the held-out evaluations against the clips generated so far.

    One panel per signal, the total last. Grey: mean reward of each rollout and its running mean; prompts change from
    step to step, so it swings. Blue: held-out evaluation; dashed: its first point, the baseline.
    Raises ValueError when metrics.jsonl holds no reward; FileExistsError when the picture exists.
    """
    from matplotlib.artist import Artist
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # late, and without pyplot's global state
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    records = read_metrics(Path(metrics_path))
    rollouts, evaluations = _series(records, ROLLOUT_TAG), _series(records, EVALUATION_TAG)
    signals = sorted({*rollouts, *evaluations}, key=lambda name: (name == TOTAL, name))
    if not signals:
        raise ValueError(f"{metrics_path} holds no reward: no line has a tag reward/<name>/mean or eval/reward/<name>")
    columns = min(len(signals), 4)
    rows = -(-len(signals) // columns)
    figure = Figure(figsize=(3.3 * columns + 0.6, 2.7 * rows + 0.7), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    handles: dict[str, Artist] = {}
    axes = figure.subplots(rows, columns, squeeze=False)
    for index, axis in enumerate(axes.flat):
        if index >= len(signals):
            axis.set_axis_off()
            continue
        signal = signals[index]
        if signal in rollouts:
            x, y = rollouts[signal].T
            (handles["each rollout"],) = axis.plot(x, y, color=ROLLOUT_COLOUR, alpha=0.4, linewidth=0.8)
            reach = max(1, len(y) // 20)
            (handles["rollouts, running mean"],) = axis.plot(
                x, running_mean(y, reach), color=ROLLOUT_COLOUR, linewidth=1.8
            )
        if signal in evaluations:
            x, y = evaluations[signal].T
            handles["held-out baseline"] = axis.axhline(
                y[0], color=EVALUATION_COLOUR, linestyle=(0, (4, 3)), linewidth=1, alpha=0.7
            )
            (handles["held-out evaluation"],) = axis.plot(
                x, y, color=EVALUATION_COLOUR, marker="o", markersize=4, linewidth=1.6
            )
            if len(y) > 1:
                axis.set_title(
                    f"held out {y[-1] - y[0]:+.3f}", loc="right", fontsize=9, fontweight="bold", color=EVALUATION_COLOUR
                )
        axis.margins(y=0.08)
        axis.set_title(signal, loc="left", fontsize=11, fontweight="bold")
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.tick_params(labelsize=8, colors=MUTED, length=0)
        axis.grid(color="#eaeef2", linewidth=0.8)
        axis.set_axisbelow(True)
        for side, spine in axis.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color("#d0d7de")
    figure.supxlabel("clips generated for training", fontsize=9, color=MUTED)
    figure.supylabel("reward", fontsize=9, color=MUTED)
    figure.legend(list(handles.values()), list(handles), loc="outside upper left", ncols=4, frameon=False, fontsize=9)
    write_whole(Path(out_png), lambda partial: figure.savefig(partial, format="png", facecolor="white"), overwrite)
