"""A comparison as one HTML file that needs nothing else: styles, charts and videos inside, no script, no network."""

import base64
import statistics
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from framework.reporting.comparison import ALARM_RULE, Comparison, RunResult, Scored, difference, gains, pooled_gains
from framework.reporting.comparison_charts import (
    Chart,
    curve_chart,
    distance_charts,
    drift_chart,
    evaluations,
    finite_costs,
    gain_chart,
    hacking_chart,
    seeds_of,
)
from framework.reporting.comparison_style import STYLE
from framework.reporting.report import TOTAL, Gain
from framework.reporting.videos import write_whole

COLUMNS = 4
"""Signals beside each other in a table; more go into a second one."""


def write_page(comparison: Comparison, path: Path, tables: Sequence[Path] = ()) -> None:
    """Write the report, replacing an earlier one. tables: CSV files beside it, named in it."""
    text = page(comparison, [table.name for table in tables])
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"), overwrite=True)


def page(comparison: Comparison, tables: Sequence[str] = ()) -> str:
    """The whole document. Every text that comes from a run is escaped."""
    parts = [
        ("verdict", "What came out", verdict(comparison)),
        ("held-out", "Held-out reward", held_out(comparison)),
        ("curves", "Along training", curves(comparison)),
        ("hacking", "Trained against held-out reward", hacking(comparison)),
        ("drift", "Reward per block", drift(comparison)),
        ("videos", "Before and after", videos(comparison)),
        ("cost", "Cost and memory", cost(comparison)),
        ("runs", "Runs, commands, configurations", record(comparison, tables)),
    ]
    shown = [(anchor, title, body) for anchor, title, body in parts if body]
    links = "".join(f'<li><a href="#{anchor}">{title}</a></li>' for anchor, title, _ in shown)
    sections = "\n".join(f'<section id="{name}">\n<h2>{title}</h2>\n{body}\n</section>' for name, title, body in shown)
    arms = comparison.arms
    one = comparison.runs[0]
    captions, noises = next(iter(one.before.values())).shape
    facts = (
        f"{len(arms)} arm{plural(len(arms))}, {len(comparison.runs)} finished run{plural(len(comparison.runs))} of "
        f"{one.samples} training clips, judged on {captions} captions never trained on × {noises} "
        f"noise{plural(noises)}."
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>Comparison of {escape(', '.join(arms))}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<header>\n<h1>Comparison of {escape(', '.join(arms))}</h1>\n<p>{facts}</p>\n"
        f'<nav aria-label="Contents"><ul>{links}</ul></nav>\n</header>\n<main>\n{sections}\n</main>\n</body>\n</html>\n'
    )


def plural(count: int) -> str:
    """The s of more than one."""
    return "s" if count > 1 else ""


def interval(gain: Gain) -> str:
    """A gain with its interval, marked where the interval leaves out zero."""
    kind = "up" if gain.low > 0 else "down" if gain.high < 0 else "even"
    return (
        f'<span class="{kind}"><b>{signed(gain.gain)}</b></span> '
        f'<span class="interval">[{signed(gain.low)}, {signed(gain.high)}]</span>'
    )


def signed(value: float) -> str:
    """Three decimals with a sign that is as wide as a plus."""
    return f"{value:+.3f}".replace("-", "−")


def table(caption: str, headers: Sequence[str], rows: Iterable[Sequence[str]], strong: Sequence[int] = ()) -> str:
    """A table of HTML cells; on a phone each row becomes a card. strong: numbers of rows that sum up others."""
    head = "".join(f'<th scope="col" role="columnheader">{escape(header)}</th>' for header in headers)
    body = []
    for number, row in enumerate(rows):
        first = f'<th scope="row" role="rowheader">{row[0]}</th>'
        cells = "".join(
            f'<td role="cell" data-label="{escape(header)}"><span>{cell}</span></td>'
            for header, cell in zip(headers[1:], row[1:], strict=True)
        )
        body.append(f'<tr role="row"{" class=strong" if number in strong else ""}>{first}{cells}</tr>')
    return (
        f'<table role="table"><caption>{caption}</caption><thead role="rowgroup"><tr role="row">{head}</tr></thead>'
        f'<tbody role="rowgroup">{"".join(body)}</tbody></table>'
    )


def grid(charts: Iterable[Chart]) -> str:
    """Charts beside each other where there is room."""
    figures = "".join(
        f'<figure><img src="{chart.uri}" alt="{escape(chart.alt)}">'
        f"<figcaption>{escape(chart.title)}</figcaption></figure>"
        for chart in charts
    )
    return f'<div class="grid">{figures}</div>'


def verdict(comparison: Comparison) -> str:
    """One sentence per arm, then alarms and failures."""
    lines = []
    for arm, runs in comparison.arms.items():
        total = next(gain for gain in pooled_gains(runs) if gain.signal == TOTAL)
        each = [next(gain for gain in gains(run) if gain.signal == TOTAL) for run in runs]
        above, below = sum(gain.low > 0 for gain in each), sum(gain.high < 0 for gain in each)
        lines.append(
            f"<li><b>{escape(arm)}</b>: held-out total {total.before:.3f} → {total.after:.3f}, {interval(total)}; "
            f"the interval lies above zero in {above} of {seeds_of(runs)}{f', below in {below}' if below else ''}.</li>"
        )
    body = f"<ul>{''.join(lines)}</ul>"
    if comparison.alarms:
        body += box("alarm", "Alarm: the reward may be hacked", comparison.alarms)
    if comparison.failures:
        failed = [f"{failure.run}: {failure.line}" for failure in comparison.failures]
        body += box("alarm", f"{len(failed)} run{plural(len(failed))} did not finish", failed)
    return body


def box(kind: str, title: str, lines: Sequence[str]) -> str:
    """A framed list that stands out."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<div class="box {kind}"><h3>{escape(title)}</h3><ul>{items}</ul></div>'


def chunks(signals: Sequence[str]) -> list[Sequence[str]]:
    """At most `COLUMNS` signals at a time."""
    return [signals[i : i + COLUMNS] for i in range(0, len(signals), COLUMNS)]


def held_out(comparison: Comparison) -> str:
    """Gains per arm and seed and pooled, and the differences between arms."""
    body = [
        "<p>Gain: after minus before on the same captions and noises. Brackets: 95 % intervals, captions drawn with "
        "replacement. The rows of all seeds average the seeds that were run; they say nothing of other seeds, the rows "
        "above them show how far those that were run lie apart.</p>",
        grid(gain_chart(comparison, signal) for signal in comparison.signals),
    ]
    for signals in chunks(comparison.signals):
        rows: list[list[str]] = []
        strong: list[int] = []
        for arm, runs in comparison.arms.items():
            for run in runs if len(runs) > 1 else ():
                found = {gain.signal: gain for gain in gains(run)}
                rows.append([escape(arm), str(run.seed), *(interval(found[signal]) for signal in signals)])
            pooled = {gain.signal: gain for gain in pooled_gains(runs)}
            name = f"all {len(runs)}" if len(runs) > 1 else str(runs[0].seed)
            strong.append(len(rows))
            rows.append([escape(arm), name, *(interval(pooled[signal]) for signal in signals)])
        body.append(table("Held-out gain", ["arm", "seed", *signals], rows, strong))
    (baseline, *others) = comparison.arms.items()
    seeds = {run.seed for run in baseline[1]}
    paired = [(arm, runs) for arm, runs in others if seeds & {run.seed for run in runs}]
    for signals in chunks(comparison.signals) if paired else ():
        rows = []
        for arm, runs in paired:
            found = {gain.signal: gain for gain in difference(runs, baseline[1])}
            rows.append([escape(arm), *(interval(found[signal]) for signal in signals)])
        body.append(table(f"After training, minus {escape(baseline[0])} on the same captions, noises and seeds",
                          ["arm", *signals], rows))  # fmt: skip
    return "\n".join(body)


def curves(comparison: Comparison) -> str:
    """Held-out reward against clips and against core-seconds."""
    body = ["<p>Lines: mean over seeds; bands: from the lowest to the highest seed.</p>"]
    if evaluations(comparison) < 3:
        body.append("<p>Judged before and after only; <code>evaluation.HeldOut.every</code> adds points between.</p>")
    body += ["<h3>Against training clips</h3>",
             grid(curve_chart(comparison, signal, cost=False) for signal in comparison.signals)]  # fmt: skip
    if finite_costs(comparison):
        body += ["<h3>Against core-seconds of training</h3>",
                 grid(curve_chart(comparison, signal, cost=True) for signal in comparison.signals)]  # fmt: skip
    return "\n".join(body)


def hacking(comparison: Comparison) -> str:
    """Held-out reward against the trained one and against distances, with the rule of the alarm."""
    charts = [hacking_chart(comparison), *distance_charts(comparison)]
    return (
        "<p>Each point is a held-out evaluation; across: the mean of what was logged since the one before it. Open "
        "markers: the start. A line that runs down to the right gains what it is trained on and loses what is wanted. "
        f"Arms with different training rewards share the axis, not its meaning.</p>{grid(charts)}"
        f'<p class="note">{ALARM_RULE} '
        f"{'What it found stands above.' if comparison.alarms else 'No run gave one.'}</p>"
    )


def drift(comparison: Comparison) -> str:
    """Reward of each block alone; empty where no run was judged by blocks."""
    if not comparison.start_blocks:
        return ""
    charts = grid(drift_chart(comparison, signal) for signal in comparison.signals)
    return (
        "<p>Held-out clips of the saved policies, every block scored by itself against its own prompt: a slope is "
        f"drift along the stream. Lines and bands as above.</p>{charts}"
    )


def data_uri(path: Path) -> str:
    """A file as a data URI of its kind, mp4 or png."""
    kind = {".mp4": "video/mp4", ".png": "image/png"}[path.suffix]
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def videos(comparison: Comparison) -> str:
    """Per caption: the start and the first seed of every arm, all from the same noise."""
    if not comparison.start_clips:
        return ""
    first = [runs[0] for runs in comparison.arms.values() if runs[0].clips]
    body = [f"<p>The same caption and the same noise in every row; arms by their first seed ({seed_list(first)}). "
            "Numbers: total held-out reward of the clip.</p>"]  # fmt: skip
    for i, caption in enumerate(comparison.captions):
        before = clip_total(comparison.runs[0].before, comparison.shown[i])
        cells = [clip(comparison.start_clips[i], f"before training: {caption}", "before", f"{before:.3f}")]
        for run in first:
            after = clip_total(run.after, comparison.shown[i])
            words = f"{after:.3f} ({signed(after - before)})"
            cells.append(clip(run.clips[i], f"after training, {run.arm}: {caption}", run.arm, words))
        body.append(f'<h3 class="caption">{escape(caption)}</h3><div class="clips">{"".join(cells)}</div>')
    return "\n".join(body)


def clip_total(scores: Scored, row: int) -> float:
    """Total reward of the first clip of a caption."""
    return statistics.fmean(float(value[row, 0]) for value in scores.values())


def clip(path: Path, label: str, name: str, words: str) -> str:
    """One playing video with its name and score."""
    return (
        f'<figure><video controls loop muted autoplay playsinline preload="auto" aria-label="{escape(label)}" '
        f'poster="{data_uri(path.with_suffix(".png"))}" src="{data_uri(path)}"></video>'
        f"<figcaption><b>{escape(name)}</b> {words}</figcaption></figure>"
    )


def seed_list(runs: Sequence[RunResult]) -> str:
    """The seed of all, or of each arm where they differ."""
    seeds = {run.seed for run in runs}
    return f"seed {seeds.pop()}" if len(seeds) == 1 else escape(", ".join(f"{run.arm} {run.seed}" for run in runs))


def cost(comparison: Comparison) -> str:
    """Clips, steps, core-seconds, memory per run."""
    rows = []
    for arm, runs in comparison.arms.items():
        for run in runs:
            memory = "not recorded" if run.peak_rss_mib is None else f"{run.peak_rss_mib:.0f}"
            rows.append([escape(arm), str(run.seed), str(run.steps), str(run.samples), f"{run.core_s:.1f}",
                         f"{1000 * run.core_s / max(1, run.samples):.1f}", memory])  # fmt: skip
    headers = ["arm", "seed", "steps", "clips", "core-seconds", "core-ms per clip", "peak RSS, MiB"]
    return (
        "<p>Core-seconds: process time of the training steps alone, evaluation and start left out. Peak RSS: highest "
        "resident set of the run's process as the operating system counts it, with the interpreter, libraries and the "
        f"evaluations in it; differences of a few per cent are noise.</p>{table('Cost of training', headers, rows)}"
    )


def record(comparison: Comparison, tables: Sequence[str]) -> str:
    """What it takes to repeat all this."""
    body = []
    if comparison.command:
        body.append(f"<p>This comparison:</p><pre>{escape(comparison.command)}</pre>")
    seeds = "".join(
        f"<li>{escape(arm)}: seed{plural(len(runs))} {', '.join(str(run.seed) for run in runs)}</li>"
        for arm, runs in comparison.arms.items()
    )
    body.append(f"<ul>{seeds}</ul>")
    if tables:
        names = ", ".join(f"<code>{escape(name)}</code>" for name in tables)
        body.append(f"<p>The numbers, in files beside this one: {names}.</p>")
    commands = [run.command for run in comparison.runs if run.command]
    if commands:
        lines = escape("\n".join(commands))
        body.append(f"<p>Its runs, each a process of its own on one thread:</p><pre>{lines}</pre>")
    environment = comparison.runs[0].folder / "env.json"
    if environment.is_file():
        body.append(f"<details><summary>Environment of {escape(environment.parent.name)}</summary>"
                    f"<pre>{escape(environment.read_text(encoding='utf-8'))}</pre></details>")  # fmt: skip
    for arm, config in comparison.configs.items():
        body.append(f"<details><summary>Configuration of {escape(arm)}, first seed</summary>"
                    f"<pre>{escape(config)}</pre></details>")  # fmt: skip
    return "\n".join(body)
