"""The root that scores video files with any reward, so that people see what it likes before they train on it."""

import csv
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image

from framework.config.registry import did_you_mean, one_line
from framework.data.scene_files import scene_of_line
from framework.data.scenes import PromptFile
from framework.interfaces import RewardModel
from framework.judging import check_available
from framework.reporting.progress import progress, say
from framework.reporting.read_videos import Clip, read_clip
from framework.reporting.report import format_table, markdown_table
from framework.reporting.runfolder import create_run_folder, fresh_folder, write_run_files
from framework.reporting.score_sheets import Strip, score_sheet, thumbnails
from framework.types import Scene, Scores, VideoBatch, Window


@dataclass(frozen=True)
class Prompts:
    """What the videos are judged by: one for all of them, or one for each in their order; from flags or from a file."""

    given: Sequence[str]
    file: str | None

    def __len__(self) -> int:
        return len(self.given) if self.file is None else len(PromptFile(self.file, 1.0, 1 << 20).scripts())

    def windows(self, index: int, clip: Clip) -> tuple[Window, ...]:
        """The spans of a clip and their prompts; of several in a line each has its own, ``a [3s] | b``."""
        frames = len(clip.frames)
        if self.file is not None:
            scenes: Sequence[Scene] = PromptFile(self.file, clip.fps, frames).scenes()
            return windows_of(scenes[index if len(scenes) > 1 else 0], frames)
        text = self.given[index if len(self.given) > 1 else 0]
        if not text.strip():
            return (Window(0, frames, ""),)  # said on purpose, for a reward that reads no prompt
        return windows_of(scene_of_line(text, "--prompt", clip.fps, frames), frames)


@dataclass(frozen=True)
class Judged:
    """A video and what became of it.

    size: (width, height). values: score per signal, NaN where it failed. windows: the spans of several prompts and
    their scores. strip: thumbnails. problem: why there is no score, or only a part of it.
    """

    file: str
    prompt: str = ""
    size: tuple[int, int] | None = None
    frames: int = 0
    fps: float = math.nan
    values: dict[str, float] = field(default_factory=dict)
    windows: tuple[tuple[Window, dict[str, float]], ...] = ()
    strip: tuple[Image.Image, ...] = ()
    problem: str = ""


def score(
    *,
    reward: RewardModel,
    videos: Sequence[str],
    prompts: Sequence[str] = (),
    prompt_file: str | None = None,
    output_dir: str | None = None,
    sort_by: str | None = None,
    scale: int | None = None,
    rows: int = 24,
    threads: int | None = None,
    operative_config: str = "",
) -> Path:
    """Score every video by itself; write a table and pictures sorted by score; returns their folder.

    videos: files that FFmpeg reads. prompts, prompt_file: one prompt for all videos or one for each, in their order;
    an empty one for a reward that reads none. output_dir: a new folder, None for a fresh one under runs/. sort_by: the
    signal that the tables are sorted by, None for the reward's first. scale: how many times the videos were enlarged,
    None for what they say of themselves. rows: of a picture; of more videos it shows the best and the worst.

    What cannot be read or scored is named and left out. Raises ValueError at the end where there was any.
    """
    check_available(reward)  # a service that is down is asked for its signals again and again
    signals = tuple(reward.signals)
    if sort_by is not None and sort_by not in signals:
        raise ValueError(
            f"score.sort_by={sort_by!r} is no signal of {type(reward).__name__}{did_you_mean(sort_by, signals)}; "
            f"its signals: {', '.join(signals)}"
        )
    if rows < 2:
        raise ValueError(f"score.rows must be at least 2, got {rows}")
    texts = Prompts(prompts, prompt_file)
    check_prompts(texts, len(videos))
    if threads is not None:
        torch.set_num_threads(threads)
    folder = create_run_folder(fresh_folder("score") if output_dir is None else output_dir)
    write_run_files(folder, operative_config)
    judged = [judge(reward, file, texts, i, scale) for i, file in enumerate(progress(videos, "scoring"))]
    for one in judged:
        if one.problem:
            print(f"armillary: {one.problem}", file=sys.stderr)
    write_tables(folder, judged, signals, sort_by or signals[0])
    write_sheets(folder, judged, signals, rows)
    say(f"saved to {folder}")
    failed = [one for one in judged if one.problem]
    if failed:
        raise ValueError(f"{len(failed)} of {len(videos)} videos could not be scored; the reasons are above")
    return folder


def check_prompts(prompts: Prompts, videos: int) -> None:
    """Raises ValueError unless there is a prompt for every video."""
    if prompts.given and prompts.file is not None:
        raise ValueError("give --prompt or --prompts, not both")
    if prompts.file is None and not prompts.given:
        raise ValueError(
            "no prompt to judge by: give --prompts FILE or --prompt TEXT; --prompt '' for a reward that reads none"
        )
    if len(prompts) not in (1, videos):
        raise ValueError(f"{len(prompts)} prompts for {videos} videos; give one for all, or one each in their order")


def windows_of(scene: Scene, frames: int) -> tuple[Window, ...]:
    """The segments of a scene on a clip of so many frames; what starts behind its end is not in it."""
    stops = [segment.start for segment in scene.segments[1:]] + [frames]
    return tuple(
        Window(segment.start, min(stop, frames), segment.prompt)
        for segment, stop in zip(scene.segments, stops, strict=True)
        if segment.start < frames
    )


def judge(reward: RewardModel, file: str, prompts: Prompts, index: int, scale: int | None) -> Judged:
    """One video, read, scored and forgotten but for some thumbnails. Whatever fails becomes its problem."""
    try:
        clip = read_clip(file, scale)
    except ValueError as error:
        return Judged(file, problem=one_line(error))
    height, width = clip.frames.shape[-2:]
    seen = Judged(
        file, size=(int(width), int(height)), frames=len(clip.frames), fps=clip.fps, strip=thumbnails(clip.frames)
    )
    try:
        windows = prompts.windows(index, clip)
        seen = replace(seen, prompt=" | ".join(window.prompt for window in windows))
        scores = reward.score(VideoBatch(clip.frames[None], clip.fps, (windows,)))
    except Exception as error:  # somebody's reward raises anything; the scores of the other videos are not lost with it
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        return replace(seen, problem=f"{file}: {kind}{one_line(error)}")
    values = {name: valid_number(scores, name) for name in reward.signals}
    failed = [name for name, value in values.items() if math.isnan(value)]
    problem = f"{file}: {', '.join(failed)} could not be scored" if failed else ""
    return replace(seen, values=values, windows=of_windows(scores, windows), problem=problem)


def valid_number(scores: Scores, name: str) -> float:
    """The score of the only clip, NaN where it failed."""
    return scores.values[name][0].item() if bool(scores.valid[name][0]) else math.nan


def of_windows(scores: Scores, windows: tuple[Window, ...]) -> tuple[tuple[Window, dict[str, float]], ...]:
    """Window by window what the model scored apart; nothing for a clip of one window."""
    if len(windows) < 2 or not scores.windows:
        return ()
    tables = {name: table[0].tolist() for name, table in scores.windows.items()}
    return tuple((window, {name: row[i] for name, row in tables.items()}) for i, window in enumerate(windows))


def write_tables(folder: Path, judged: Sequence[Judged], signals: Sequence[str], sort_by: str) -> None:
    """scores.csv in the order given, scores.md and the terminal sorted; windows.csv where clips have several."""
    rows = [
        [one.file, one.prompt, *(one.size or ("", "")), one.frames or "", "" if math.isnan(one.fps) else one.fps]
        + ["" if math.isnan(value := one.values.get(name, math.nan)) else value for name in signals]
        + [one.problem]
        for one in judged
    ]
    write_csv(folder / "scores.csv", ("video", "prompt", "width", "height", "frames", "fps", *signals, "problem"), rows)
    windows = [
        [one.file, span.start, span.stop, span.prompt]
        + ["" if math.isnan(value := scored.get(name, math.nan)) else value for name in signals]
        for one in judged
        for span, scored in one.windows
    ]
    if windows:
        write_csv(folder / "windows.csv", ("video", "start", "stop", "prompt", *signals), windows)

    def order(one: Judged) -> float:
        value = one.values.get(sort_by, math.nan)
        return math.inf if math.isnan(value) else -value

    table = [
        [*(cell(one.values.get(name, math.nan)) for name in signals), one.file, one.prompt]
        for one in sorted(judged, key=order)
    ]
    headers = (*signals, "video", "prompt")
    (folder / "scores.md").write_text(markdown_table(table, headers) + "\n", encoding="utf-8")
    for line in (format_table(table, headers), ""):
        say(line)


def cell(value: float) -> str:
    """A score as text; "—" where there is none."""
    return "—" if math.isnan(value) else f"{value:.4f}"


def write_csv(path: Path, headers: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Comma-separated values with quotes where a prompt needs them."""
    with path.open("x", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(headers)
        writer.writerows(rows)


def write_sheets(folder: Path, judged: Sequence[Judged], signals: Sequence[str], rows: int) -> None:
    """A picture per signal, sorted by it."""
    for name in signals:
        strips = [
            Strip(one.strip, Path(one.file).name, one.prompt, value)
            for one in judged
            if not math.isnan(value := one.values.get(name, math.nan))
        ]
        if strips:
            plain = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)
            file = "contact_sheet.png" if len(signals) == 1 else f"contact_sheet_{plain}.png"
            score_sheet(strips, f"What {name} likes: the best of {len(strips)} videos first", rows).save(folder / file)
