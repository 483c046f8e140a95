"""A clip that was scored is not scored again, and what makes it another clip makes it one."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import pytest
import torch
from hypothesis import strategies as st

from framework.conformance.scores import check_reward
from framework.interfaces import RewardModel
from framework.types import Scores, VideoBatch, Window
from rewards.caching import CachedReward
from rewards.random_control import RandomReward
from rewards.shapes import ShapesReward
from tests.support import PROMPTS, holds, refuted

DRAWS = st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=5), min_size=1, max_size=5)
"""Batches of clips, by number."""


@dataclass
class Counting(RewardModel):
    """Scores drawn from the content of a clip; says which clips it was given. failing: whether all of them fail."""

    seen: list[int] = field(default_factory=list)
    failing: bool = False

    @property
    def signals(self) -> tuple[str, ...]:
        return ("a", "b")

    def score(self, videos: VideoBatch) -> Scores:
        self.seen += [int(clip[0, 0, 0, 0]) for clip in videos.frames]
        scores = RandomReward(self.signals).score(videos)
        return Scores.of({n: torch.full_like(v, torch.nan) if self.failing else v for n, v in scores.values.items()})


def clips(numbers: list[int]) -> VideoBatch:
    """Clips that are told apart by their pixels."""
    frames = torch.tensor(numbers, dtype=torch.uint8)[:, None, None, None, None].expand(-1, 2, 3, 4, 4)
    return VideoBatch(frames, 8.0, ((Window(0, 2, "p"),),) * len(numbers))


def check_cache(make: Callable[[RewardModel], RewardModel], batches: list[list[int]]) -> None:
    """The scores are the model's, and no clip reaches it twice."""
    model = Counting()
    cached = make(model)
    for numbers in batches:
        got, expected = cached.score(clips(numbers)), Counting().score(clips(numbers))
        assert all(torch.equal(got.values[n], expected.values[n]) for n in model.signals)
    assert sorted(model.seen) == sorted({n for numbers in batches for n in numbers})


def test_every_clip_is_scored_once_and_gets_its_own_score() -> None:
    holds(partial(check_cache, CachedReward), DRAWS)


def test_the_check_sees_a_cache_that_forgets_or_mixes_up() -> None:
    class Mixed(CachedReward):
        def score(self, videos: VideoBatch) -> Scores:
            scores = super().score(videos)
            return replace(scores, values={n: v.flip(0) for n, v in scores.values.items()})

    refuted(partial(check_cache, lambda model: CachedReward(model, entries=1)), DRAWS)
    refuted(partial(check_cache, Mixed), DRAWS)


def test_another_prompt_frame_rate_window_or_pixel_is_another_clip() -> None:
    plain = clips([1])
    brighter = plain.frames.clone()
    brighter[0, 1, 2, 3, 3] += 1
    others = (
        replace(plain, windows=((Window(0, 2, "q"),),)),
        replace(plain, windows=((Window(0, 1, "p"),),)),
        replace(plain, fps=9.0),
        replace(plain, frames=brighter),
    )
    cached = CachedReward(Counting())
    for videos in (plain, *others, plain, *others):
        cached.score(videos)
    assert (cached.hits, cached.misses) == (5, 5)


def test_a_failed_score_is_not_remembered_and_stays_nan() -> None:
    model = Counting(failing=True)
    cached = CachedReward(model)
    scores = cached.score(clips([1, 1, 2]))
    assert not bool(scores.valid["a"].any()) and bool(scores.values["a"].isnan().all())
    model.failing = False
    assert bool(cached.score(clips([1, 2])).valid["a"].all()) and model.seen == [1, 2, 1, 2]


def test_what_was_asked_for_least_recently_is_forgotten() -> None:
    model = Counting()
    cached = CachedReward(model, entries=2)
    for numbers in ([1], [2], [1], [3], [1], [2]):
        cached.score(clips(numbers))
    assert model.seen == [1, 2, 3, 2]
    with pytest.raises(ValueError, match=r"CachedReward\.entries must be at least 1"):
        CachedReward(model, entries=0)


def test_windows_of_clips_that_have_more_or_fewer_come_back_as_they_were() -> None:
    frames = torch.randint(256, (2, 6, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    one, two = (Window(0, 6, PROMPTS[0]),), (Window(0, 3, PROMPTS[0]), Window(3, 6, PROMPTS[1]))
    videos = VideoBatch(frames, 8.0, (one, two))
    cached, expected = CachedReward(ShapesReward()), ShapesReward().score(videos)
    for scores in (cached.score(videos), cached.score(videos)):
        for name, windows in expected.windows.items():
            assert torch.equal(scores.windows[name].isnan(), windows.isnan())
            assert torch.equal(scores.windows[name].nan_to_num(9), windows.nan_to_num(9))
    alone = cached.score(replace(videos, frames=frames[:1], windows=(one,)))
    assert alone.windows["VQ"].shape == (1, 1)


def test_a_cached_reward_keeps_the_promises_of_one() -> None:
    frames = torch.randint(256, (3, 6, 3, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    check_reward(CachedReward(ShapesReward()), VideoBatch(frames, 8.0, ((Window(0, 6, PROMPTS[0]),),) * 3))
