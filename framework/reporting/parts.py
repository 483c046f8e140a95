"""Where in a clip a reward was earned: scores of prompt segments and of intervals of time, as csv and as tables."""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import torch

from framework.interfaces import RewardModel
from framework.reporting.statistics import clustered_bootstrap
from framework.reporting.videos import write_whole
from framework.timeline import Timeline, over_time
from framework.types import Scores, VideoBatch, Window

PART_HEADERS = ("signal", "part", "from s", "to s", "scenes", "mean", "low", "high")
TIME_HEADERS = ("signal", "first", "last", "drift", "low", "high", "lowest", "unevenness")


@dataclass(frozen=True)
class PartScore:
    """One signal on one part of one clip. part: its number in the clip. start, stop: seconds of the clip. prompt: what
    it was judged by. score: NaN where it could not be scored."""

    scene: int
    member: int
    signal: str
    part: int
    start: float
    stop: float
    prompt: str
    score: float


def segment_scores(
    videos: VideoBatch, scores: Scores, reward: RewardModel, first: int, members: int
) -> list[PartScore]:
    """Scores of the prompt segments of clips, the first of which is clip number ``first``.

    What the reward said of windows is taken; a reward that gave one score for a clip of several segments is asked
    again about each of them alone.
    """
    rows = []
    for i, windows in enumerate(videos.windows):
        for name in reward.signals:
            if len(windows) == 1:
                values = [float(scores.values[name][i]) if bool(scores.valid[name][i]) else math.nan]
            elif name in scores.windows:
                values = scores.windows[name][i, : len(windows)].tolist()
            else:
                values = [_alone(videos, i, window, reward, name) for window in windows]
            spans = [(w.start, w.stop, w.prompt) for w in windows]
            rows += _rows(first + i, members, name, spans, values, videos.fps)
    return rows


def _alone(videos: VideoBatch, clip: int, window: Window, reward: RewardModel, signal: str) -> float:
    """The score of one window of one clip, cut out."""
    frames = videos.frames[clip : clip + 1, window.start : window.stop]
    whole = ((Window(0, window.stop - window.start, window.prompt),),)
    scores = reward.score(VideoBatch(frames, videos.fps, whole))
    return float(scores.values[signal][0]) if bool(scores.valid[signal][0]) else math.nan


def interval_scores(videos: VideoBatch, timeline: Timeline, first: int, members: int) -> list[PartScore]:
    """Scores of the intervals of time of clips, the first of which is clip number ``first``."""
    rows, spans = [], timeline.spans(videos)
    for name, values in timeline.measure(videos).items():
        for i, windows in enumerate(videos.windows):
            prompts = [[windows[0], *(w for w in windows if w.start <= start)][-1].prompt for start, _ in spans]
            named = [(start, stop, prompt) for (start, stop), prompt in zip(spans, prompts, strict=True)]
            rows += _rows(first + i, members, name, named, values[i].tolist(), videos.fps)
    return rows


def _rows(
    clip: int, members: int, signal: str, spans: Sequence[tuple[int, int, str]], values: Sequence[float], fps: float
) -> list[PartScore]:
    scene, member = divmod(clip, members)
    return [
        PartScore(scene, member, signal, part, start / fps, stop / fps, prompt, value)
        for part, ((start, stop, prompt), value) in enumerate(zip(spans, values, strict=True))
    ]


def write_parts(path: Path, rows: Iterable[PartScore]) -> None:
    """A csv file with a line per score."""
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(field.name for field in fields(PartScore))
    table.writerows(astuple(row) for row in rows)
    write_whole(path, lambda partial: partial.write_text(text.getvalue(), encoding="utf-8"))


def part_table(rows: Sequence[PartScore]) -> list[tuple]:
    """Per signal and part: its earliest start and latest stop, how many scenes have it, the mean over them and its
    95 % interval, clustered by scene. Scores that are NaN are left out; the interval is too where two scenes lack."""
    table = []
    for signal in dict.fromkeys(row.signal for row in rows):
        of_signal = [row for row in rows if row.signal == signal]
        for part in sorted({row.part for row in of_signal}):
            here = [row for row in of_signal if row.part == part]
            scenes = _by_scene(here)
            span = min(row.start for row in here), max(row.stop for row in here)
            table.append((signal, str(part), *(f"{second:.2f}" for second in span), str(len(scenes)), *_mean(scenes)))
    return table


def time_table(rows: Sequence[PartScore]) -> list[tuple]:
    """Per signal: the mean score of the first and of the last interval, their difference with its 95 % interval
    clustered by scene, the mean of each clip's lowest interval, and of its standard deviation over time.

    Clips with an interval that could not be scored are left out. Empty where a clip is one interval long.
    """
    table = []
    for signal in dict.fromkeys(row.signal for row in rows):
        clips: dict[tuple[int, int], list[PartScore]] = {}
        for row in rows:
            if row.signal == signal:
                clips.setdefault((row.scene, row.member), []).append(row)
        whole = [clip for clip in clips.values() if len(clip) > 1 and not any(math.isnan(row.score) for row in clip)]
        if not whole:
            continue
        values = torch.tensor([[row.score for row in sorted(clip, key=lambda row: row.part)] for clip in whole])
        found = over_time(values.double())
        drift: dict[int, list[float]] = {}
        for clip, value in zip(whole, found["drift"].tolist(), strict=True):
            drift.setdefault(clip[0].scene, []).append(value)
        ends = [float(values[:, k].mean()) for k in (0, -1)]
        rest = [float(found[name].mean()) for name in ("lowest", "unevenness")]
        table.append((signal, *ends, *_mean(list(drift.values())), *rest))
    return table


def _by_scene(rows: Sequence[PartScore]) -> list[list[float]]:
    """The scores of each scene that has any."""
    scenes: dict[int, list[float]] = {}
    for row in rows:
        if not math.isnan(row.score):
            scenes.setdefault(row.scene, []).append(row.score)
    return list(scenes.values())


def _mean(scenes: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """(mean over scenes, low, high); NaN where there is nothing to say."""
    means = torch.tensor([[sum(values) / len(values)] for values in scenes], dtype=torch.float64)
    if len(means) < 2:
        return float(means.mean()) if len(means) else math.nan, math.nan, math.nan
    return clustered_bootstrap(means)
