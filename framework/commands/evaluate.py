"""The root that scores a generator, with or without an adapter, on held-out scenes with fixed noise."""

from pathlib import Path

from framework.commands.adaptation import put_on
from framework.devices import prepare
from framework.evaluation import HeldOut
from framework.interfaces import StreamingGenerator
from framework.judging import check_available
from framework.reporting.parts import (
    PART_HEADERS,
    TIME_HEADERS,
    PartScore,
    interval_scores,
    part_table,
    segment_scores,
    time_table,
    write_parts,
)
from framework.reporting.progress import say
from framework.reporting.report import format_table, markdown_table
from framework.reporting.runfolder import create_run_folder, fresh_folder, removed_if_empty
from framework.reporting.sheets import contact_sheet
from framework.reporting.statistics import clustered_bootstrap
from framework.reporting.summary import control_lines, headroom
from framework.reporting.vbench import VBenchFolder
from framework.reporting.videos import visible_scale, write_mp4
from framework.timeline import Timeline
from framework.types import Scores, VideoBatch
from framework.weights import save_tensors

HEADERS = ("signal", "mean", "low", "high")


def evaluate(
    *,
    generator: StreamingGenerator,
    evaluation: HeldOut,
    timeline: Timeline | None = None,
    vbench: bool = False,
    output_dir: str | None = None,
    adapter: str | None = None,
    device: str = "cpu",
    threads: int | None = None,
) -> Path:
    """Score, write scores.safetensors, tables, csv files, a contact sheet and one video per scene; returns the folder.

    timeline: a reward asked about intervals of time, e.g. a CLIP score, beside the evaluation's own, which is reported
    per prompt segment. vbench: also write every clip as VBench's evaluator reads it, ``vbench/{prompt}-{index}.mp4``.
    output_dir: a new folder, None for a fresh one under runs/. adapter: a training run or its adapter, or
    exported LoRA weights; None scores the generator as it is. Intervals are 95 %, clustered by scene.
    """
    prepare(generator.network, device, threads)
    check_available(evaluation.reward, *([] if timeline is None else [timeline.reward]))
    put_on(generator, adapter)
    folder = create_run_folder(fresh_folder("evaluate") if output_dir is None else output_dir)
    segments: list[PartScore] = []
    intervals: list[PartScore] = []
    exported = VBenchFolder(folder / "vbench") if vbench else None

    def watch(first: int, videos: VideoBatch, scores: Scores) -> None:
        segments.extend(segment_scores(videos, scores, evaluation.reward, first, evaluation.members))
        if timeline is not None:
            intervals.extend(interval_scores(videos, timeline, first, evaluation.members))
        if exported is not None:
            for windows, clip in zip(videos.windows, videos.frames, strict=True):
                exported.add(" | ".join(window.prompt for window in windows), clip, videos.fps)

    with removed_if_empty(folder):
        result = evaluation.judge(generator, watch=watch)
    save_tensors(folder / "scores.safetensors", result.scores)
    rows = [(name, *clustered_bootstrap(value)) for name, value in {**result.scores, "total": result.total}.items()]
    tables: list[tuple[str, list[tuple], tuple[str, ...]]] = [("whole clips", rows, HEADERS)]
    write_parts(folder / "segments.csv", segments)
    if any(row.part for row in segments):
        tables.append(("per prompt segment", part_table(segments), PART_HEADERS))
    if timeline is not None:
        write_parts(folder / "intervals.csv", intervals)
        tables.append((f"per interval of {timeline.seconds:g} s", part_table(intervals), PART_HEADERS))
        if any(row.part for row in intervals):
            tables.append(("consistency over time", time_table(intervals), TIME_HEADERS))
    write_tables(folder / "scores.md", tables)
    contact_sheet(result.videos.frames, result.videos.prompts).save(folder / "contact_sheet.png")
    scale = visible_scale(result.videos.frames.shape[-2])
    for i, clip in enumerate(result.videos.frames):
        write_mp4(folder / "videos" / f"{i:03d}.mp4", clip, result.videos.fps, scale=scale)
    if exported is not None:
        say(f"for VBench: {exported.close().parent}")
    scenes, members = result.total.shape
    for line in (
        f"{scenes} prompts × {members} noises; 95 % intervals clustered by prompt",
        *(f"\n{title}\n{format_table(table, headers)}" for title, table, headers in tables),
        "",
        f"best of {members} minus mean: {headroom(result):.3f}",
        *control_lines(evaluation),
        f"saved to {folder}",
    ):
        say(line)
    return folder


def write_tables(path: Path, tables: list[tuple[str, list[tuple], tuple[str, ...]]]) -> None:
    """Tables in Markdown, each below its title."""
    texts = [f"**{title}**\n\n{markdown_table(rows, headers)}" for title, rows, headers in tables]
    path.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
