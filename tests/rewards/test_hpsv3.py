"""HPSv3 judges chosen frames by Pillow's pixels, pools them in the open, and says how sure it is."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from framework.conformance.scores import check_reward
from framework.pooling import FramePooling, MeanFrames, TailAware, TopFrames
from framework.types import VideoBatch, Window
from rewards import hpsv3
from rewards.frame_sampling import AllFrames, FrameSampling, StratifiedFrames
from rewards.hpsv3 import HPSv3
from rewards.preprocess import normalise, patchify, resize_pillow, resize_rounded
from rewards.prompts import HPSV3
from tests.rewards.scorers import (
    PROMPTS,
    SMALL,
    STAND_IN,
    byte_tokenizer,
    clips,
    conversation,
    hps,
    pinned,
    reward,
    setup,
)
from tests.support import close


def by_hand(videos: VideoBatch, resize: Callable[[Tensor, tuple[int, int]], Tensor] = resize_pillow) -> Tensor:
    """(μ, s) [N, T, 2] of every frame alone."""
    model, chat = reward("hpsv3"), conversation("hpsv3")
    out = []
    for frames, (window,) in zip(videos.frames, videos.windows, strict=True):
        for image in resize(frames, SMALL.size(*frames.shape[-2:])):
            patches, grid = patchify(normalise(image[None]))
            out.append(model([chat.row(window.prompt, grid)], patches, [grid])[0])
    return torch.stack(out).unflatten(0, videos.frames.shape[:2])


VIDEOS = clips(3, frames=6)


@pytest.mark.parametrize("pooling", [MeanFrames(), TopFrames(0.3), TailAware()])
@pytest.mark.parametrize("frames", [AllFrames(), StratifiedFrames(4)])
def test_a_clip_is_the_pooling_of_its_chosen_frames(pooling: FramePooling, frames: FrameSampling):
    each = by_hand(VIDEOS)[..., 0]
    chosen = torch.stack(
        [row[list(frames.indices(6, 8.0, prompt))] for row, prompt in zip(each, VIDEOS.prompts, strict=True)]
    )
    scores = hps(frames=frames, pooling=pooling).score(VIDEOS)
    close(scores.values["HPSv3"], pooling(chosen, 8.0), atol=1e-5)


def test_frames_resized_by_the_tensor_rule_score_otherwise():
    ours = hps(frames=AllFrames()).score(VIDEOS).values["HPSv3"]
    with pytest.raises(AssertionError):
        close(ours, by_hand(VIDEOS, resize_rounded)[..., 0].mean(1), atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 5, 32])
def test_how_many_frames_go_at_once_changes_nothing(batch_size: int):
    expected = hps().score(VIDEOS).values["HPSv3"]
    close(hps(batch_size=batch_size).score(VIDEOS).values["HPSv3"], expected, atol=1e-5)


def test_uncertainty_is_the_mean_deviation_and_only_where_asked():
    scores = hps(frames=AllFrames(), uncertainty=True).score(VIDEOS)
    assert tuple(scores.values) == ("HPSv3", "HPSv3_uncertainty") and hps().signals == ("HPSv3",)
    close(scores.values["HPSv3_uncertainty"], by_hand(VIDEOS)[..., 1].exp().mean(1), atol=1e-5, rtol=1e-5)


def test_the_score_depends_on_the_prompt():
    other = replace(VIDEOS, windows=tuple((Window(0, 6, "a blue square"),) for _ in range(3)))
    frames = AllFrames()
    one, two = (hps(frames=frames).score(videos).values["HPSv3"] for videos in (VIDEOS, other))
    assert float((one - two).abs().min()) > 1e-4


def test_siblings_are_judged_by_the_same_frames():
    same = replace(VIDEOS, windows=tuple((Window(0, 6, PROMPTS[0]),) for _ in range(3)))
    equal = replace(same, frames=same.frames[:1].expand(3, -1, -1, -1, -1))
    scores = hps(frames=StratifiedFrames(3)).score(equal).values["HPSv3"]
    close(scores, scores[:1].expand(3), atol=1e-6)


def test_windows_are_judged_by_their_own_prompts():
    windows = tuple((Window(0, 2, "a"), Window(2, 6, "b")) for _ in range(3))
    scores = hps(frames=AllFrames()).score(replace(VIDEOS, windows=windows))
    for column, (start, stop, prompt) in enumerate([(0, 2, "a"), (2, 6, "b")]):
        cut = VideoBatch(VIDEOS.frames[:, start:stop], 8.0, tuple((Window(0, stop - start, prompt),) for _ in range(3)))
        close(scores.windows["HPSv3"][:, column], by_hand(cut)[..., 0].mean(1), atol=1e-5)


def test_a_frame_that_cannot_be_scored_makes_its_clip_invalid(monkeypatch: pytest.MonkeyPatch):
    score = HPSv3.score_frames

    def broken(self: HPSv3, *given) -> Tensor:
        scores = score(self, *given)
        scores[7] = torch.nan  # the second clip's second frame
        return scores

    monkeypatch.setattr(HPSv3, "score_frames", broken)
    for pooling in (MeanFrames(), TopFrames(0.3), TailAware()):
        scores = hps(frames=AllFrames(), pooling=pooling).score(VIDEOS)
        assert scores.valid["HPSv3"].tolist() == [True, False, True]
        assert not bool((scores.values["HPSv3"] == 0).any())


def test_a_frame_of_minus_infinity_hides_behind_no_better_one_and_is_no_certainty(monkeypatch: pytest.MonkeyPatch):
    """The best frames would leave it out, and σ = exp(−∞) is a zero."""
    score = HPSv3.score_frames

    def broken(self: HPSv3, *given) -> Tensor:
        scores = score(self, *given)
        scores[7] = -torch.inf
        return scores

    monkeypatch.setattr(HPSv3, "score_frames", broken)
    scores = hps(frames=AllFrames(), pooling=TopFrames(0.3), uncertainty=True).score(VIDEOS)
    for name in ("HPSv3", "HPSv3_uncertainty"):
        assert scores.valid[name].tolist() == [True, False, True] and bool(scores.values[name][1].isnan())


def test_scores_have_no_graph_and_are_float32():
    value = hps().score(VIDEOS).values["HPSv3"]
    assert value.dtype == torch.float32 and not value.requires_grad


def test_it_keeps_the_promises_of_a_reward_model():
    check_reward(hps(uncertainty=True), VIDEOS)


def test_impossible_arguments_are_refused():
    with pytest.raises(ValueError, match="batch_size"):
        hps(batch_size=0)
    with pytest.raises(ValueError, match="same tokens"):
        HPSv3(reward("hpsv3"), conversation("videoalign"))


def test_what_scores_depend_on_is_said():
    said = hps().details()
    assert "StratifiedFrames" in said["sampling"] and "MeanFrames" in said["pooling"]
    assert hps(frames=AllFrames()).details() != said != hps(pooling=TopFrames()).details()


def test_a_release_is_put_together_from_its_folder_or_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from safetensors.torch import save_file

    monkeypatch.setattr(hpsv3, "HPSV3", pinned(HPSV3, STAND_IN["hpsv3"]))
    folder, base = tmp_path / "release", tmp_path / "base"
    folder.mkdir()
    save_file(setup().checkpoint("hpsv3"), folder / "HPSv3.safetensors")
    setup().config().save_pretrained(base)
    byte_tokenizer(()).save_pretrained(base)
    (tmp_path / "t.txt").write_bytes(STAND_IN["hpsv3"].encode())
    for place in (folder, folder / "HPSv3.safetensors"):
        loaded = hpsv3.released(
            checkpoint=str(place), template=str(tmp_path / "t.txt"), base=str(base), dtype="float32", rows=320,
            tokens=setup().reward_tokens("hpsv3"), pooling=TopFrames(0.3), uncertainty=True,
        )  # fmt: skip
        scores = replace(loaded, pixels=SMALL).score(VIDEOS)
        expected = hps(pooling=TopFrames(0.3), uncertainty=True).score(VIDEOS)
        assert all(torch.equal(scores.values[name], expected.values[name]) for name in loaded.signals)


def test_a_missing_wheel_is_said_in_one_line():
    with pytest.raises(ValueError, match="'hpsv3' is not installed") as refused:
        hpsv3.released(checkpoint="nowhere")
    assert "\n" not in str(refused.value)
