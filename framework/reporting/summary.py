"""The end of a run: files for people's eyes, a table, and where everything was saved."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from framework.evaluation import EvaluationResult, HeldOut
from framework.reporting.progress import say
from framework.reporting.report import GAIN_HEADERS, format_table, gain_cells, gain_table, markdown_table, reward_curve
from framework.reporting.sheets import before_after_animation, before_after_sheet
from framework.reporting.videos import visible_scale, write_gif, write_mp4
from framework.weights import save_tensors

SHOWN = 6
"""Held-out scenes in the before/after pictures."""


@dataclass(frozen=True)
class RunReport:
    """What a training run hands over. training_core_s: process time of the training steps, evaluation left out.

    result: what was trained, a file or folder of the run's. earlier_core_s: process time of the processes that the run
    went through before this one, up to the checkpoint that each left behind.
    """

    folder: Path
    before: EvaluationResult
    after: EvaluationResult
    training_core_s: float
    samples_seen: int
    steps: int
    controls: tuple[str, ...] = ()
    result: str = "adapter"
    earlier_core_s: float = 0.0


def headroom(result: EvaluationResult) -> float:
    """Mean over scenes of (best member − mean member) of the total: the room that a reward has to choose in."""
    total = result.total
    return float((total.amax(1) - total.mean(1)).mean())


def score_line(name: str, result: EvaluationResult) -> str:
    """One line: the mean of every signal and the total."""
    cells = [f"{signal} {float(value.nanmean()):.3f}" for signal, value in result.scores.items()]
    return f"{name}: {', '.join(cells)}, total {float(result.total.nanmean()):.3f}"


def control_lines(evaluation: HeldOut) -> list[str]:
    """Ceiling and floors of the held-out reward, one line each; none without controls."""
    if evaluation.controls is None:
        return []
    scenes = evaluation.scenes.scenes()
    lines = []
    for name, videos in evaluation.controls.videos(scenes).items():
        values = evaluation.reward.score(videos).values
        total = torch.stack(list(values.values())).mean()
        lines.append(
            f"  {name:28s}" + "  ".join(f"{k} {v.mean():.3f}" for k, v in values.items()) + f"  total {total:.3f}"
        )
    return ["held-out reward of control videos:", *lines]


def write_scores(path: Path, before: EvaluationResult, after: EvaluationResult) -> None:
    """Every held-out score, per signal [scenes, members]: what intervals can be recomputed from."""
    tensors = {f"{when}.{name}": value for when, result in (("before", before), ("after", after))
               for name, value in result.scores.items()}  # fmt: skip
    save_tensors(path, tensors)


def read_scores(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(before, after) of `write_scores`."""
    sides = ({}, {})
    for key, value in tensors.items():
        when, _, name = key.partition(".")
        sides[when == "after"][name] = value
    return sides


def write_report(report: RunReport) -> None:
    """Write the curve, the before/after pictures and the gain table; print the table and the paths."""
    folder, before, after = report.folder, report.before, report.after
    captions = before.videos.prompts[:SHOWN]
    old, new = before.videos.frames[:SHOWN], after.videos.frames[:SHOWN]
    scores_old, scores_new = before.total[:SHOWN, 0].tolist(), after.total[:SHOWN, 0].tolist()
    sheet, film, still = folder / "before_after.png", folder / "before_after.mp4", folder / "before_after.gif"
    before_after_sheet(old, new, captions, scores_old, scores_new).save(sheet)
    animation = before_after_animation(old, new, captions, scores_old, scores_new)
    write_mp4(film, animation, before.videos.fps)
    write_gif(still, animation, before.videos.fps)
    for i, clip in enumerate(after.videos.frames[:SHOWN]):
        scale = visible_scale(clip.shape[-2])
        write_mp4(
            folder / "samples" / f"step_{report.steps:06d}" / f"{i:02d}.mp4", clip, before.videos.fps, scale=scale
        )
    reward_curve(folder / "metrics.jsonl", folder / "reward_curve.png")

    write_scores(folder / "evaluation.safetensors", before, after)
    cells = gain_cells(gain_table(before.scores, after.scores))
    scenes, members = before.total.shape
    facts = [
        f"held-out gain, {scenes} prompts never trained on × {members} noises, paired; 95 % clustered by prompt",
        f"training: {report.steps} steps, {report.samples_seen} clips, {report.training_core_s:.0f} core-seconds",
        f"room of the start: best of {members} minus mean {headroom(before):.3f}",
    ]
    (folder / "gains.md").write_text(
        "\n".join([*facts, "", markdown_table(cells, GAIN_HEADERS), "", *report.controls, ""])
    )
    numbers = {
        "steps": report.steps,
        "samples": report.samples_seen,
        "training_core_s": report.training_core_s,
        "process_core_s": report.earlier_core_s + time.process_time(),  # of everything: imports, evaluations, pictures
    }
    (folder / "summary.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    say("")
    for line in [*facts, "", format_table(cells, GAIN_HEADERS), "", *report.controls]:
        say(line)
    say("")
    for name, path in (
        ("before/after video", film), ("before/after grid", sheet), ("reward curve", folder / "reward_curve.png"),
        ("gain table", folder / "gains.md"), (Path(report.result).stem, folder / report.result),
        ("metrics", folder / "metrics.jsonl"),
        ("TensorBoard", folder / "tb"),
    ):  # fmt: skip
        say(f"  {name:20s}{path}")
