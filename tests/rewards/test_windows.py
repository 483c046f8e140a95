"""Windows are cut where they say and scored by their own prompts; one that failed makes its clip invalid, not worse."""

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from framework.types import Scores, VideoBatch, Window
from rewards.frame_sampling import StratifiedFrames
from rewards.windows import SpanScore, score_windows, take_frames
from tests.rewards.tiny_encoders import noise_clips
from tests.support import close, holds, over, refuted

SEEDS = st.integers(0, 2**20)
SPAN = st.tuples(st.integers(0, 4), st.integers(1, 3))
SPANS = st.lists(st.lists(SPAN, min_size=1, max_size=3), min_size=1, max_size=4)


def judge(frames: Tensor, prompts: Sequence[str], fps: float) -> Tensor:
    """Two scores of a span: its mean pixel with its prompt's length; NaN where the span is a single frame."""
    mean = frames.double().mean((1, 2, 3, 4)) + torch.tensor([len(p) for p in prompts]) + fps
    return torch.stack([mean, mean if frames.shape[1] > 1 else torch.full_like(mean, torch.nan)])


Run = Callable[[VideoBatch, Sequence[str], SpanScore], Scores]


def failures_as_zero(videos: VideoBatch, signals: Sequence[str], spans: SpanScore) -> Scores:
    """A planted error."""
    return score_windows(videos, signals, lambda *given: spans(*given).nan_to_num(0))


def failures_left_out(videos: VideoBatch, signals: Sequence[str], spans: SpanScore) -> Scores:
    """A planted error: the mean over the windows that could be scored."""
    found = score_windows(videos, signals, spans)
    return Scores.of({k: v.nanmean(1) for k, v in found.windows.items()})


def prompts_shifted(videos: VideoBatch, signals: Sequence[str], spans: SpanScore) -> Scores:
    """A planted error: prompts belong to other clips than frames."""
    return score_windows(videos, signals, lambda frames, prompts, fps: spans(frames, [*prompts[1:], prompts[0]], fps))


def check_windows(run: Run, seed: int, spans: list[list[tuple[int, int]]]) -> None:
    windows = tuple(
        tuple(Window(a, a + n, "p" * (1 + 7 * i + 3 * j)) for j, (a, n) in enumerate(clip))
        for i, clip in enumerate(spans)
    )
    frames = noise_clips(len(spans), 7, 3, 2, 2, seed=seed)
    found = run(VideoBatch(frames, 5.0, windows), ("a", "b"), judge)
    for i, clip in enumerate(windows):
        for k, name in enumerate(("a", "b")):
            each = [judge(frames[i : i + 1, w.start : w.stop], [w.prompt], 5.0)[k, 0] for w in clip]
            expected = torch.stack(each).mean()
            assert bool(found.valid[name][i]) == bool(torch.isfinite(expected))
            close(found.values[name][i].nan_to_num(-1), expected.nan_to_num(-1), atol=1e-4)


def test_each_window_is_scored_on_its_own_span_by_its_own_prompt():
    holds(partial(check_windows, score_windows), SEEDS, SPANS)


@pytest.mark.parametrize("mutant", [failures_as_zero, failures_left_out, prompts_shifted])
def test_the_check_of_windows_sees_failures_taken_for_scores_and_prompts_astray(mutant: Run):
    refuted(partial(check_windows, mutant), SEEDS, SPANS)


@pytest.mark.parametrize("broken", [torch.inf, -torch.inf, torch.nan])
def test_a_window_that_is_no_number_is_nan_and_its_clip_invalid(broken: float):
    windows = ((Window(0, 2, "a"), Window(2, 4, "b")),)
    videos = VideoBatch(noise_clips(1, 4, 3, 2, 2), 5.0, windows)
    found = score_windows(videos, ("a",), lambda f, p, fps: torch.tensor([[broken if p == ["b"] else 1.0]]))
    assert found.values["a"].isnan().all() and not found.valid["a"].any()
    assert found.windows["a"].isnan().tolist() == [[False, True]]


@pytest.mark.parametrize("fps", [0, -16, float("nan"), float("inf")])
def test_clips_without_a_true_frame_rate_are_refused(fps: float):
    with pytest.raises(ValueError, match=r"VideoBatch.fps must be positive and finite"):
        VideoBatch(noise_clips(1, 4, 3, 2, 2), fps, ((Window(0, 4, "a"),),))


def test_columns_of_windows_that_a_clip_does_not_have_are_nan_and_its_score_is_valid():
    windows = ((Window(0, 3, "a"), Window(3, 6, "b")), (Window(0, 6, "c"),))
    found = score_windows(VideoBatch(noise_clips(2, 6, 3, 2, 2), 5.0, windows), ("a", "b"), judge)
    assert torch.isnan(found.windows["a"]).tolist() == [[False, False], [False, True]]
    assert found.valid["a"].tolist() == [True, True]


@over(SEEDS, st.integers(1, 12))
def test_the_frames_of_a_prompt_are_the_same_for_all_its_clips(seed: int, frames: int):
    clips = torch.arange(frames, dtype=torch.uint8)[None, :, None, None, None].expand(3, frames, 3, 1, 1)
    taken = take_frames(StratifiedFrames(4, seed), clips, ["a", "b", "a"], 8.0)
    assert torch.equal(taken[0], taken[2]) and taken.shape[1] == min(4, frames)
