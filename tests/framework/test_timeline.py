"""Scores along a clip: intervals cover it exactly, and what is said of time follows from the scores of its parts."""

import csv
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from framework.interfaces import RewardModel
from framework.reporting.parts import PartScore, interval_scores, part_table, segment_scores, time_table, write_parts
from framework.timeline import OverTime, Timeline, interval_spans, over_time
from framework.types import Scores, VideoBatch, Window
from rewards.shapes import ShapesReward
from tests.support import PROMPTS, Brightness, close, holds, normal, refuted


def clips(n: int = 4, frames: int = 12, seed: int = 0, windows: tuple[Window, ...] | None = None) -> VideoBatch:
    random = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (n, frames, 3, 16, 16), generator=random, dtype=torch.uint8)
    return VideoBatch(pixels, 4.0, (windows or (Window(0, frames, PROMPTS[0]),),) * n)


SWITCHED = (Window(0, 6, PROMPTS[0]), Window(6, 12, PROMPTS[1]))


@dataclass(frozen=True)
class Strict(RewardModel):
    """The mean pixel of clips of at least ``frames`` frames; shorter ones cannot be scored."""

    frames: int = 1

    @property
    def signals(self) -> tuple[str, ...]:
        return ("bright",)

    def score(self, videos: VideoBatch) -> Scores:
        value = videos.frames.float().mean((1, 2, 3, 4)) / 255
        return Scores.of({"bright": value if videos.frames.shape[1] >= self.frames else value * torch.nan})


# Intervals


def check_spans(spans_of: Callable[..., tuple[tuple[int, int], ...]], frames: int, fps: float, seconds: float) -> None:
    spans, length = spans_of(frames, fps, seconds), round(seconds * fps)
    assert spans[0][0] == 0 and spans[-1][1] == frames
    assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
    assert all(stop - start == length for start, stop in spans[:-1])
    last = spans[-1][1] - spans[-1][0]
    assert last > 0 and (len(spans) == 1 or length / 2 <= last) and (frames < length or last < 1.5 * length)


SIZES = (st.integers(1, 200), st.sampled_from([4.0, 8.0, 16.0, 24.0]), st.sampled_from([0.25, 0.5, 1.0, 2.0, 5.0]))


def test_intervals_follow_each_other_cover_the_clip_and_the_last_is_no_stump():
    holds(functools.partial(check_spans, interval_spans), *SIZES)
    refuted(functools.partial(check_spans, stumps), *SIZES)


def stumps(frames: int, fps: float, seconds: float) -> tuple[tuple[int, int], ...]:
    """Plain chunks, whose last one may be a frame."""
    edges = [*range(0, frames, round(seconds * fps)), frames]
    return tuple(itertools.pairwise(edges))


def test_an_interval_of_no_frame_is_refused():
    with pytest.raises(ValueError, match="holds no frame at 8"):
        interval_spans(21, 8.0, 0.01)
    with pytest.raises(ValueError, match=r"Timeline\.seconds"):
        OverTime(Brightness(), 0.0)


def test_an_interval_scores_what_its_frames_alone_score():
    videos = clips()
    measured = Timeline(Brightness(), 1.0).measure(videos)
    assert measured["bright"].shape == (4, 3)
    for k in range(3):
        close(measured["bright"][:, k], videos.frames[:, 4 * k : 4 * k + 4].float().mean((1, 2, 3, 4)) / 255, 1e-6)


# Consistency over time


def check_over_time(statistics: Callable[[Tensor], dict[str, Tensor]], seed: int, count: int) -> None:
    values = normal(seed, 3, count)
    found = statistics(values)
    for i, row in enumerate(values.tolist()):
        mean = sum(row) / count
        assert found["lowest"][i] == min(row) and math.isclose(found["drift"][i], row[-1] - row[0], abs_tol=1e-12)
        spread = math.sqrt(sum((value - mean) ** 2 for value in row) / count)
        assert math.isclose(found["unevenness"][i], spread, abs_tol=1e-12)


def test_consistency_is_what_its_formulas_say():
    holds(functools.partial(check_over_time, over_time), st.integers(0, 99), st.integers(1, 8))

    def sample_deviation(values: Tensor) -> dict[str, Tensor]:
        return over_time(values) | {"unevenness": values.std(1)}

    refuted(functools.partial(check_over_time, sample_deviation), st.integers(0, 99), st.integers(2, 8))


def test_consistency_is_a_reward_with_signals_of_its_own():
    reward = OverTime(Brightness(), 1.0)
    scores = reward.score(clips())
    assert tuple(scores.values) == reward.signals and "bright_drift" in reward.signals
    measured = Timeline(Brightness(), 1.0).measure(clips())["bright"]
    close(scores.values["bright_drift"], measured[:, -1] - measured[:, 0], 1e-6)
    still = VideoBatch(torch.full((2, 12, 3, 8, 8), 90, dtype=torch.uint8), 4.0, ((Window(0, 12, "x"),),) * 2)
    assert reward.score(still).values["bright_unevenness"].abs().max() == 0


def test_a_clip_with_an_interval_that_cannot_be_scored_is_invalid():
    scores = OverTime(Strict(frames=4), 1.0).score(clips(frames=11))  # 4, 4 and 3 frames
    assert not any(bool(valid.any()) for valid in scores.valid.values())


# Tables


def test_segments_are_what_the_reward_says_of_windows_and_else_what_it_says_of_cut_clips():
    videos = clips(windows=SWITCHED)
    reward = ShapesReward()
    rows = segment_scores(videos, reward.score(videos), reward, first=6, members=2)
    scores = reward.score(videos)
    assert {(row.scene, row.member) for row in rows} == {(3, 0), (3, 1), (4, 0), (4, 1)}
    for row in rows:
        clip = 2 * row.scene + row.member - 6
        assert row.score == scores.windows[row.signal][clip, row.part].item()
        assert (row.start, row.stop, row.prompt) == ((0.0, 1.5, PROMPTS[0]), (1.5, 3.0, PROMPTS[1]))[row.part]
    plain = segment_scores(videos, Brightness().score(videos), Brightness(), first=0, members=2)
    close(
        torch.tensor([row.score for row in plain if row.signal == "bright" and row.part == 1]),
        videos.frames[:, 6:].float().mean((1, 2, 3, 4)) / 255, 1e-6,
    )  # fmt: skip


def test_a_single_prompt_is_one_segment_scored_once():
    class Once(Strict):
        calls = 0

        def score(self, videos: VideoBatch) -> Scores:
            type(self).calls += 1
            return super().score(videos)

    videos, reward = clips(), Once()
    rows = segment_scores(videos, reward.score(videos), reward, 0, 2)
    assert Once.calls == 1 and len(rows) == 4 and all(row.part == 0 for row in rows)


def test_an_interval_is_judged_by_the_prompt_at_its_first_frame():
    rows = interval_scores(clips(windows=SWITCHED), Timeline(Brightness(), 1.0), 0, 2)
    assert [row.prompt for row in rows[:3]] == [PROMPTS[0], PROMPTS[0], PROMPTS[1]]
    assert [(row.start, row.stop) for row in rows[:3]] == [(0.0, 1.0), (1.0, 2.0), (2.0, 3.0)]


def rows_of(values: list[list[float]], members: int = 1) -> list[PartScore]:
    return [
        PartScore(*divmod(clip, members), "s", part, float(part), part + 1.0, "x", value)
        for clip, parts in enumerate(values)
        for part, value in enumerate(parts)
    ]


def test_a_part_is_averaged_over_scenes_and_nan_is_left_out():
    (first, second) = part_table(rows_of([[1.0, 2.0], [3.0, math.nan], [5.0, math.nan]]))
    assert first[:5] == ("s", "0", "0.00", "1.00", "3") and first[5] == 3.0 and first[6] < 3.0 < first[7]
    assert second[4] == "1" and second[5] == 2.0 and math.isnan(second[6])


def test_members_of_a_scene_count_as_one():
    (row,) = part_table(rows_of([[0.0], [2.0], [9.0], [9.0]], members=2))
    assert row[4] == "2" and row[5] == 5.0


def test_the_drift_is_the_last_interval_minus_the_first():
    (row,) = time_table(rows_of([[1.0, 0.0, 3.0], [2.0, 1.0, 3.0], [1.0, math.nan, 100.0]]))
    assert row[:4] == ("s", 1.5, 3.0, 1.5) and row[4] <= 1.5 <= row[5] and row[6] == 0.5
    assert time_table(rows_of([[1.0], [2.0]])) == []


def test_a_csv_file_holds_every_score(tmp_path: Path):
    rows = rows_of([[1.0, math.nan]])
    write_parts(tmp_path / "a.csv", [*rows, PartScore(9, 1, "s", 0, 0.0, 1.0, 'a "b", c\nd', 0.5)])
    with (tmp_path / "a.csv").open(encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file))
    assert [line["score"] for line in read] == ["1.0", "nan", "0.5"]
    assert read[2]["prompt"] == 'a "b", c\nd' and read[2]["scene"] == "9"
