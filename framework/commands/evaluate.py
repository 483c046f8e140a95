"""The root that scores a generator, with or without an adapter, on held-out scenes with fixed noise."""

from pathlib import Path

from framework.adapters import load_adaptation
from framework.devices import prepare
from framework.evaluation import HeldOut
from framework.interfaces import StreamingGenerator
from framework.reporting.progress import say
from framework.reporting.report import format_table, markdown_table
from framework.reporting.runfolder import create_run_folder, fresh_folder
from framework.reporting.sheets import contact_sheet
from framework.reporting.statistics import clustered_bootstrap
from framework.reporting.summary import control_lines, headroom
from framework.reporting.videos import visible_scale, write_mp4
from framework.weights import save_tensors

HEADERS = ("signal", "mean", "low", "high")


def evaluate(
    *,
    generator: StreamingGenerator,
    evaluation: HeldOut,
    output_dir: str | None = None,
    adapter: str | None = None,
    device: str = "cpu",
    threads: int | None = None,
) -> Path:
    """Score, write scores.safetensors, a table, a contact sheet and one video per scene; returns the folder.

    output_dir: a new folder, None for a fresh one under runs/. adapter: a folder that a training run saved; None
    scores the generator as it is. Intervals are 95 %, clustered by scene.
    """
    prepare(generator.network, device, threads)
    folder = create_run_folder(fresh_folder("evaluate") if output_dir is None else output_dir)
    if adapter is not None:
        say(f"adapter: {load_adaptation(generator.network, adapter)}")
    result = evaluation.judge(generator)
    save_tensors(folder / "scores.safetensors", result.scores)
    rows = [(name, *clustered_bootstrap(value)) for name, value in {**result.scores, "total": result.total}.items()]
    (folder / "scores.md").write_text(markdown_table(rows, HEADERS) + "\n", encoding="utf-8")
    contact_sheet(result.videos.frames, result.videos.prompts).save(folder / "contact_sheet.png")
    scale = visible_scale(result.videos.frames.shape[-2])
    for i, clip in enumerate(result.videos.frames):
        write_mp4(folder / "videos" / f"{i:03d}.mp4", clip, result.videos.fps, scale=scale)
    scenes, members = result.total.shape
    for line in (
        f"{scenes} prompts × {members} noises; 95 % intervals clustered by prompt",
        "",
        format_table(rows, HEADERS),
        "",
        f"best of {members} minus mean: {headroom(result):.3f}",
        *control_lines(evaluation),
        f"saved to {folder}",
    ):
        say(line)
    return folder
