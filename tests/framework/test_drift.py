"""Reward per block: what a block scores does not depend on its neighbours, and blocks cover the window exactly."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import strategies as st

from framework.data.scenes import SceneSource
from framework.drift import PerBlock, block_spans, judge_blocks, prompt_at, stack_blocks
from framework.evaluation import HeldOut
from framework.types import Scene, VideoBatch, Window
from rewards.shapes import ShapesReward
from tests.support import PROMPTS, Brightness, close, holds, tiny_generator

SPANS = tuple((3 * b, 3 * b + 3) for b in range(4))


def clips(seed: int, frames: int = 12, n: int = 2) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, frames, 3, 16, 16), generator=random, dtype=torch.uint8)


class Prompts(SceneSource):
    """Two prompts of the embedded world."""

    def scenes(self) -> tuple[Scene, ...]:
        return tuple(Scene.single(prompt) for prompt in PROMPTS[:2])


def check_windows(seed: int, shift: int = 0) -> None:
    """The world's reward scores windows itself: an independent way to the same numbers."""
    frames = clips(seed)
    whole = ((Window(0, 12, PROMPTS[0]),), (Window(0, 12, PROMPTS[1]),))
    blocks = tuple(tuple(Window(a, b, windows[0].prompt) for a, b in SPANS) for windows in whole)
    spans = tuple((max(0, a - shift), b - shift * (b < 12)) for a, b in SPANS)
    found = stack_blocks(PerBlock(ShapesReward(), spans).score(VideoBatch(frames, 8.0, whole)).values)
    for signal, values in ShapesReward().score(VideoBatch(frames, 8.0, blocks)).windows.items():
        close(found[signal], values, 1e-6)


def test_a_block_scores_what_a_window_of_its_frames_scores() -> None:
    holds(check_windows, st.integers(0, 50), examples=5)
    with pytest.raises(AssertionError):
        check_windows(0, shift=1)


def test_a_block_does_not_see_its_neighbours() -> None:
    one, two = clips(0), clips(0)
    two[:, 3:6] = clips(1)[:, 3:6]
    windows = ((Window(0, 12, PROMPTS[0]),),) * 2
    left, right = (PerBlock(ShapesReward(), SPANS).score(VideoBatch(c, 8.0, windows)).values for c in (one, two))
    changed = {name for name in left if not torch.equal(left[name], right[name])}
    assert changed == {"VQ@1", "MQ@1", "TA@1"} or changed == {"VQ@1", "TA@1"}


@pytest.mark.parametrize(("first", "blocks"), [(0, 3), (2, 4)])
def test_blocks_follow_each_other_and_only_the_first_of_a_stream_is_shorter(first: int, blocks: int) -> None:
    recipe = replace(tiny_generator().recipe, temporal_stride=4)
    spans = block_spans(recipe, first, blocks)
    assert spans[0][0] == 0 and all(a[1] == b[0] for a, b in itertools.pairwise(spans))
    lengths = [stop - start for start, stop in spans]
    assert lengths == [4 * recipe.block_frames - 3 * (first == 0), *[4 * recipe.block_frames] * (blocks - 1)]


def test_a_block_is_judged_by_the_prompt_in_force() -> None:
    windows = (Window(0, 5, "a"), Window(5, 9, "b"))
    assert [prompt_at(windows, frame) for frame in (0, 4, 5, 8)] == ["a", "a", "b", "b"]


def test_clips_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="end at frame 12, the clips at 9"):
        PerBlock(Brightness(), SPANS).score(VideoBatch(clips(0, 9), 8.0, ((Window(0, 9, "x"),),) * 2))


@pytest.mark.parametrize("first_block", [0, 1])
def test_the_clips_are_those_of_the_usual_evaluation(first_block: int) -> None:
    evaluation = HeldOut(Prompts(), Brightness(), members=2, first_block=first_block)
    generator = tiny_generator()
    blocks, videos = judge_blocks(evaluation, generator)
    usual = evaluation.judge(generator)
    assert torch.equal(videos.frames, usual.videos.frames)
    for signal, value in usual.scores.items():
        assert blocks[signal].shape == (2, 2, generator.recipe.clip_blocks)
        close(blocks[signal].mean(-1), value, 1e-6)  # blocks of equal length, and brightness is a mean over pixels


def test_blocks_are_stacked_in_order_of_their_numbers() -> None:
    named = {f"a@{number}": torch.full((1, 1), float(number)) for number in (10, 9, 11)}
    assert stack_blocks(named)["a"].flatten().tolist() == [9.0, 10.0, 11.0]
