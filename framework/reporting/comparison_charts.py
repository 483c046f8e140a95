"""The charts of a comparison: one small SVG per question, so that a phone shows them one below the other."""

import base64
import io
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from framework.reporting.comparison import (
    Comparison,
    Point,
    RunResult,
    Scored,
    between_evaluations,
    distances,
    gains,
    held_out_points,
    pooled_gains,
    trained_rewards,
)
from framework.reporting.report import TOTAL

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#5c5c5c")
"""Okabe and Ito's palette, apart for every kind of colour vision; markers differ as well, for print without colour."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
INK, MUTED, RULE, GRID = "#1f2328", "#59636e", "#d0d7de", "#eaeef2"
SIZE = (4.6, 3.1)
"""Inches; at this size the letters are as large as the page's on a phone."""
LONGEST = 18
"""Letters of an arm's name in a chart."""


Series = Sequence[tuple[int, float]]
"""(step, value) in order of steps."""


class Chart(NamedTuple):
    """A chart as a page takes it. alt: what it shows, for who does not see it. uri: the SVG as a data URI."""

    title: str
    alt: str
    uri: str


def shorten(name: str) -> str:
    """The name of an arm as far as a chart has room for it."""
    return name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"


def style(index: int) -> dict[str, Any]:
    """Colour and marker of an arm."""
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}


def draw(title: str, alt: str, paint: Callable[[Axes], None], size: tuple[float, float] = SIZE) -> Chart:
    """A chart on white paper, its letters as outlines: equal on every machine and readable without its fonts."""
    settings: dict[Any, Any] = {
        "svg.fonttype": "path",
        "svg.hashsalt": "armillary",
        "font.size": 9,
        "font.family": "DejaVu Sans",
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        axis = figure.subplots()
        axis.tick_params(labelsize=8, colors=MUTED, length=0)
        axis.grid(color=GRID, linewidth=0.8)
        axis.set_axisbelow(True)
        for side, spine in axis.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(RULE)
        paint(axis)
        axis.xaxis.label.set_color(MUTED)
        axis.yaxis.label.set_color(MUTED)
        handles, _ = axis.get_legend_handles_labels()
        if handles:
            figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=8, labelcolor=INK)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None})
    return Chart(title, alt, "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode())


def band(axis: Axes, xs: Sequence[np.ndarray], ys: Sequence[np.ndarray], index: int, label: str) -> None:
    """Mean line over seeds with their range behind it. xs, ys: [points] per seed; where lengths differ, the shared."""
    points = min(len(y) for y in ys)
    x = np.mean([x[:points] for x in xs], axis=0)
    table = np.stack([y[:points] for y in ys])
    looks = style(index)
    if len(table) > 1:
        axis.fill_between(x, table.min(0), table.max(0), color=looks["color"], alpha=0.16, linewidth=0)
    axis.plot(x, table.mean(0), **looks, label=label, linewidth=1.7, markersize=4.5)


def seeds_of(runs: Sequence[RunResult]) -> str:
    """How many seeds, in words: 1 seed, 3 seeds."""
    return f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"


def gain_chart(comparison: Comparison, signal: str) -> Chart:
    """Pooled gain and its interval per arm, the seeds thin above it."""
    arms = list(comparison.arms.items())
    said: list[str] = []

    def paint(axis: Axes) -> None:
        for i, (arm, runs) in enumerate(arms):
            pooled = next(gain for gain in pooled_gains(runs) if gain.signal == signal)
            said.append(f"{arm} {pooled.gain:+.3f} [{pooled.low:+.3f}, {pooled.high:+.3f}]")
            y, looks = len(arms) - 1 - i, style(i)
            lift = 0.5 / (len(runs) + 1)
            for j, run in enumerate(runs if len(runs) > 1 else ()):
                one = next(gain for gain in gains(run) if gain.signal == signal)
                at = y + 0.1 + (j + 1) * lift
                axis.plot([one.low, one.high], [at, at], color=looks["color"], alpha=0.45, linewidth=1)
                axis.plot([one.gain], [at], **looks, alpha=0.6, markersize=3, linestyle="none")
            axis.plot([pooled.low, pooled.high], [y, y], color=looks["color"], linewidth=2.6)
            axis.plot([pooled.gain], [y], **looks, markersize=7, linestyle="none")
        axis.axvline(0, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axis.set_ylim(-0.5, len(arms) - 0.2)
        axis.set_yticks(range(len(arms)), [shorten(arm) for arm, _ in reversed(arms)], color=INK, fontsize=9)
        axis.set_xlabel(f"held-out gain of {signal}")
        axis.xaxis.set_major_locator(MaxNLocator(5))

    chart = draw(signal, "", paint, (SIZE[0], 1.1 + 0.55 * len(arms)))
    return chart._replace(alt=f"Held-out gain of {signal} with 95 % intervals: {'; '.join(said)}.")


def curve_chart(comparison: Comparison, signal: str, cost: bool) -> Chart:
    """Held-out reward against training clips, or against core-seconds of training."""
    said: list[str] = []

    def paint(axis: Axes) -> None:
        for i, (arm, runs) in enumerate(comparison.arms.items()):
            xs, ys = [], []
            for run in runs:
                points = [point for point in held_out_points(run) if signal in point.scores]
                xs.append(np.array([point.core_s if cost else point.samples for point in points]))
                ys.append(np.array([point.scores[signal] for point in points]))
            band(axis, xs, ys, i, shorten(arm))
            first, last = np.mean([y[0] for y in ys]), np.mean([y[-1] for y in ys])
            said.append(f"{arm} {first:.3f} to {last:.3f} ({seeds_of(runs)})")
        axis.set_xlabel("core-seconds of training" if cost else "clips generated for training")
        axis.set_ylabel(f"held-out {signal}")
        axis.xaxis.set_major_locator(MaxNLocator(5))

    against = "core-seconds" if cost else "training clips"
    return draw(signal, "", paint)._replace(alt=f"Held-out {signal} against {against}: {'; '.join(said)}.")


def _against_held_out(
    comparison: Comparison, name: str, title: str, label: str, series: Callable[[RunResult], Series]
) -> Chart:
    """Held-out total against something logged in training, evaluation by evaluation; seeds thin, mean thick."""

    def paint(axis: Axes) -> None:
        for i, (arm, runs) in enumerate(comparison.arms.items()):
            xs, ys = [], []
            for run in runs:
                points = held_out_points(run)
                found = series(run)
                if found:
                    xs.append(np.array(between_evaluations(found, [point.step for point in points])))
                    ys.append(np.array([point.scores[TOTAL] for point in points]))
            if not xs:
                continue
            shared = min(map(len, xs))
            looks = style(i)
            for x, y in zip(xs, ys, strict=True) if len(xs) > 1 else ():
                axis.plot(x, y, color=looks["color"], alpha=0.35, linewidth=1)
            x, y = (np.mean([part[:shared] for part in parts], axis=0) for parts in (xs, ys))
            axis.plot(x, y, **looks, label=shorten(arm), linewidth=1.7, markersize=4.5)
            axis.plot(x[:1], y[:1], marker=looks["marker"], color=looks["color"], markerfacecolor="white",
                      markersize=6, linestyle="none")  # fmt: skip
        axis.set_xlabel(label)
        axis.set_ylabel("held-out total")
        axis.xaxis.set_major_locator(MaxNLocator(5))

    alt = f"Held-out total against {name}, one point per held-out evaluation; open markers are the start."
    return draw(title, alt, paint)


def hacking_chart(comparison: Comparison) -> Chart:
    """Held-out reward against the reward that is trained on: a line that turns down to the right is hacking."""
    name = "the trained reward of the rollouts"
    return _against_held_out(comparison, name, "trained against held-out", f"{name}, total",
                             lambda run: trained_rewards(run).get(TOTAL, []))  # fmt: skip


def distance_charts(comparison: Comparison) -> list[Chart]:
    """Held-out reward against every distance that some run logged."""
    names = list(dict.fromkeys(name for run in comparison.runs for name in distances(run)))

    def of(name: str) -> Callable[[RunResult], Series]:
        return lambda run: distances(run).get(name, [])

    return [_against_held_out(comparison, f"train/{name}", name, f"train/{name}", of(name)) for name in names]


def per_block(blocks: Scored, signal: str) -> np.ndarray:
    """Mean over captions and noises of one signal, or of all for the total [blocks]."""
    names = blocks if signal == TOTAL else (signal,)
    return np.mean([blocks[name].nanmean((0, 1)).numpy() for name in names], axis=0)


def drift_chart(comparison: Comparison, signal: str) -> Chart:
    """Reward of every block of the judged window, of the start and of what each arm ended with."""
    said: list[str] = []

    def paint(axis: Axes) -> None:
        start = per_block(comparison.start_blocks, signal)
        numbers = np.arange(len(start)) + comparison.first_block
        axis.plot(numbers, start, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.4, label="start")
        said.append(f"start {start[0]:.3f} to {start[-1]:.3f}")
        for i, (arm, runs) in enumerate(comparison.arms.items()):
            ys = [per_block(run.blocks, signal) for run in runs if run.blocks]
            if ys:
                band(axis, [numbers] * len(ys), ys, i, shorten(arm))
                mean = np.mean(ys, axis=0)
                said.append(f"{arm} {mean[0]:.3f} to {mean[-1]:.3f}")
        axis.set_xlabel("block of the stream")
        axis.set_ylabel(f"held-out {signal}")
        axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))

    chart = draw(signal, "", paint)
    return chart._replace(alt=f"Held-out {signal} per block, first to last: {'; '.join(said)}.")


def evaluations(comparison: Comparison) -> int:
    """The fewest held-out evaluations of a run."""
    points: list[list[Point]] = [held_out_points(run) for run in comparison.runs]
    return min(map(len, points))


def finite_costs(comparison: Comparison) -> bool:
    """Whether every evaluation knows the core-seconds before it."""
    return all(math.isfinite(point.core_s) for run in comparison.runs for point in held_out_points(run))
