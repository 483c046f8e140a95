"""Frames and pixels reach the scorers as their released code feeds them: the tables hold, and wrong rules miss them."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from framework.types import VideoBatch
from rewards.frame_sampling import (
    AllFrames,
    CountedFrames,
    FrameSampling,
    MultiPointFrames,
    StratifiedFrames,
    UniformFrames,
    uniform_count,
)
from rewards.preprocess import (
    HPSV3_PIXELS,
    VIDEOALIGN_PIXELS,
    PixelBudget,
    gray,
    gray_truncated,
    normalise,
    patchify,
    resize,
    resize_pillow,
    resize_rounded,
    token_count,
)
from tests.golden.__main__ import FOLDER
from tests.golden.rewards import check_file
from tests.support import close, holds, refuted

TABLES = FOLDER / "rewards" / "preprocess_golden.json"
LENGTHS, RATES = st.integers(2, 800), st.sampled_from([4.0, 8.0, 16.0, 23.976, 24.0, 30.0])


def missed() -> set[str]:
    return {row.tensor for row in check_file(TABLES) if not row.passed}


def pixels(seed: int, *shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_the_tables_hold():
    assert missed() == set()


# Which frames


def floored(frames: int, fps: float, target: float) -> int:
    """A present-day reader's count: floored to even, not rounded."""
    return int(min(max(frames / fps * target, 4), frames // 2 * 2)) // 2 * 2


def test_a_count_that_is_floored_misses_the_table(monkeypatch: pytest.MonkeyPatch):
    assert uniform_count(88, 16, 2.0) == 12 and floored(88, 16, 2.0) == 10
    monkeypatch.setattr("rewards.frame_sampling.uniform_count", floored)
    assert missed() == {"uniform_2fps"}


def check_uniform(count: Callable[[int, float, float], int], frames: int, fps: float) -> None:
    """An even number within the bounds that is nearest to 2 a second where none of them acts."""
    n = count(frames, fps, 2.0)
    assert n % 2 == 0 and 2 <= n <= min(768, frames)
    wish = frames / fps * 2
    if 4 <= wish <= frames - 1:
        assert abs(n - wish) <= 1


def test_the_count_is_even_and_nearest_to_two_a_second():
    holds(lambda n, fps: check_uniform(uniform_count, n, fps), LENGTHS, RATES)
    refuted(lambda n, fps: check_uniform(floored, n, fps), LENGTHS, RATES)


def check_indices(sampling: FrameSampling, frames: int, fps: float, whole: bool) -> None:
    """Ascending frames of the span, from its first to its last where the rule says so."""
    chosen = sampling.indices(frames, fps, "a prompt")
    assert list(chosen) == sorted(chosen) and chosen[0] >= 0 and chosen[-1] < frames
    if whole:
        assert chosen[0] == 0 and chosen[-1] == frames - 1


@pytest.mark.parametrize("sampling", [UniformFrames(), CountedFrames(10), AllFrames()])
def test_indices_go_from_the_first_frame_to_the_last(sampling: FrameSampling):
    holds(lambda n, fps: check_indices(sampling, n, fps, True), LENGTHS, RATES)


class Shuffled(FrameSampling):
    """A planted error: the right frames in the wrong order."""

    def indices(self, frames: int, fps: float, name: str) -> tuple[int, ...]:
        return tuple(reversed(UniformFrames().indices(frames, fps, name)))


def test_frames_in_the_wrong_order_are_noticed():
    refuted(lambda n, fps: check_indices(Shuffled(), n, fps, True), LENGTHS, RATES)


def test_stratified_frames_lie_one_in_each_part():
    def check(sampling: StratifiedFrames, frames: int, name: str) -> None:
        chosen = sampling.indices(frames, 16.0, name)
        check_indices(sampling, frames, 16.0, False)
        if frames > sampling.count:
            for i, frame in enumerate(chosen):  # the part [i, i + 1) · T/n meets the frame [frame, frame + 1)
                assert frame < (i + 1) * frames / sampling.count and frame + 1 > i * frames / sampling.count
        else:
            assert chosen == tuple(range(frames))

    holds(lambda n, count, name: check(StratifiedFrames(count), n, name), LENGTHS, st.integers(1, 30), st.text())


def test_siblings_are_judged_by_the_same_frames_and_other_prompts_by_others():
    sampling = StratifiedFrames(8)
    assert sampling.indices(81, 16.0, "a") == sampling.indices(81, 16.0, "a")
    drawn = {sampling.indices(81, 16.0, str(i)) for i in range(20)}
    assert len(drawn) == 20 and sampling.indices(81, 16.0, "a") != StratifiedFrames(8, 1).indices(81, 16.0, "a")


def test_every_frame_is_as_likely():
    counts = torch.zeros(21)
    for i in range(4000):
        counts[list(StratifiedFrames(8).indices(21, 16.0, str(i)))] += 1
    assert float((counts / 4000 - 8 / 21).abs().max()) < 5 * (8 / 21 / 4000) ** 0.5


@pytest.mark.parametrize(
    ("sampling", "frames", "message"),
    [
        (UniformFrames(), 1, "1 frames"),
        (CountedFrames(8), 1, "1 frames"),
        (MultiPointFrames(), 11, "MultiPointFrames.width"),
    ],
)
def test_a_span_that_is_too_short_is_refused(sampling: FrameSampling, frames: int, message: str):
    with pytest.raises(ValueError, match=message):
        sampling.indices(frames, 16.0, "")


@pytest.mark.parametrize(
    "build",
    [
        lambda: UniformFrames(0), lambda: CountedFrames(1), lambda: MultiPointFrames(width=5),
        lambda: StratifiedFrames(0), lambda: StratifiedFrames(seed=-1), lambda: PixelBudget(5, 4),
    ],
)  # fmt: skip
def test_impossible_rules_are_refused(build: Callable):
    with pytest.raises(ValueError):
        build()


# Sizes


def check_size(size: Callable[[int, int], tuple[int, int]], budget: PixelBudget, height: int, width: int) -> None:
    """Multiples of 28, inside the bound that acted."""
    new = size(height, width)
    assert all(side % 28 == 0 and side > 0 for side in new)
    plain = round(height / 28) * round(width / 28) * 28 * 28
    if plain > budget.most:
        assert new[0] * new[1] <= budget.most
    elif plain < budget.least:
        assert new[0] * new[1] >= budget.least


SIDES = st.integers(28, 2000)


@pytest.mark.parametrize("budget", [VIDEOALIGN_PIXELS, HPSV3_PIXELS])
def test_sizes_keep_to_the_bound_that_acts(budget: PixelBudget):
    def only_rounded(height: int, width: int) -> tuple[int, int]:
        return round(height / 28) * 28, round(width / 28) * 28

    holds(lambda h, w: check_size(budget.size, budget, h, w), SIDES, SIDES)
    refuted(lambda h, w: check_size(only_rounded, budget, h, w), SIDES, SIDES)


def test_one_bound_for_both_is_not_idempotent():
    assert HPSV3_PIXELS.size(480, 832) == (336, 588) and HPSV3_PIXELS.size(336, 588) == (364, 616)


def test_narrow_frames_are_refused():
    with pytest.raises(ValueError, match="too narrow"):
        VIDEOALIGN_PIXELS.size(10, 2010)


# Pixels


@pytest.mark.parametrize(
    ("rule", "wrong", "entries"),
    [
        ("resize_rounded", lambda frames, size: resize(frames.float(), size).to(torch.uint8), {"tensor_resize"}),
        ("resize_rounded", resize_pillow, {"tensor_resize"}),
        ("resize_pillow", resize_rounded, {"pil_resize"}),
        ("gray_truncated", lambda frames: gray(frames.float()).round().to(torch.uint8), {"gray"}),
    ],
)
def test_another_rule_for_pixels_misses_the_hashes(rule: str, wrong: Callable, entries: set[str], monkeypatch):
    monkeypatch.setattr(f"tests.golden.rewards.{rule}", wrong)
    assert {name.split(".")[-1] for name in missed()} == entries


def test_gray_has_three_equal_channels_and_never_more_than_the_brightest():
    frames = pixels(0, 5, 3, 20, 24)
    seen = gray_truncated(frames)
    assert bool((seen[:, :1] == seen).all()) and bool((seen <= frames.amax(1, keepdim=True)).all())


def slow_patches(frames: Tensor) -> Tensor:
    """Patches one by one, in the documented order."""
    if len(frames) % 2:
        frames = torch.cat([frames, frames[-1:]])
    rows = []
    for t in range(0, len(frames), 2):
        for top in range(0, frames.shape[2], 28):
            for left in range(0, frames.shape[3], 28):
                for y in (top, top + 14):
                    for x in (left, left + 14):
                        cut = frames[t : t + 2, :, y : y + 14, x : x + 14]  # [2, 3, 14, 14]
                        rows.append(cut.transpose(0, 1).flatten())
    return torch.stack(rows)


def test_patches_are_cut_in_merge_order():
    holds(
        lambda seed, t, h, w: close(patchify(x := pixels(seed, t, 3, 28 * h, 28 * w).float())[0], slow_patches(x), 0),
        st.integers(0, 99), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), examples=20,
    )  # fmt: skip


def test_patches_of_another_order_differ():
    frames = pixels(1, 2, 3, 56, 56).float()
    with pytest.raises(AssertionError):
        close(patchify(frames.transpose(2, 3))[0], slow_patches(frames), 0)


def test_patches_equal_those_of_the_image_processor_of_transformers():
    from transformers import Qwen2VLImageProcessorPil

    image = pixels(2, 3, 56, 84)
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 84, "longest_edge": 56 * 84})
    made = processor(images=[image.permute(1, 2, 0).numpy()], return_tensors="pt", do_resize=False)
    patches, grid = patchify(normalise(image[None]))
    assert made["image_grid_thw"].tolist() == [list(grid)]
    close(patches, made["pixel_values"], atol=1e-6)


def test_a_grid_has_a_token_for_every_four_patches():
    patches, grid = patchify(torch.zeros(5, 3, 56, 84))
    assert grid == (3, 4, 6) and len(patches) == 72 and token_count(grid) == 18


def test_sides_that_are_no_multiples_of_28_are_refused():
    with pytest.raises(ValueError, match="multiples of 28"):
        patchify(torch.zeros(2, 3, 56, 80))


def test_signed_floats_and_bytes_give_the_same_pixels():
    frames = pixels(3, 1, 4, 3, 6, 6)
    assert torch.equal(VideoBatch.from_signed(frames / 127.5 - 1, 8.0, ["x"]).frames, frames)


def test_floats_and_other_layouts_are_no_video():
    for wrong in (torch.rand(1, 4, 3, 6, 6), torch.zeros(1, 4, 6, 6, 3, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="uint8"):
            VideoBatch(wrong, 8.0, ())


def test_the_resize_without_rounding_has_a_gradient():
    frames = pixels(4, 1, 3, 40, 40).float().requires_grad_()
    gray(resize(frames, (28, 28))).sum().backward()
    assert frames.grad is not None and bool(frames.grad.abs().sum() > 0)
