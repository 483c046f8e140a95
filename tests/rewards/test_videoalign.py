"""VideoAlign gives VQ, MQ on a gray copy, and TA, of every window with its own prompt, whatever the batch."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from framework.conformance.scores import check_reward
from framework.interfaces import RewardModel
from framework.types import Scores, VideoBatch, Window
from rewards import videoalign
from rewards.frame_sampling import CountedFrames, UniformFrames
from rewards.preprocess import gray_truncated, normalise, patchify, resize_rounded
from rewards.prompts import VIDEOALIGN
from rewards.qwen2vl import RewardTokens
from rewards.qwen2vl_loading import UnmergedLoRA
from rewards.videoalign import NORMALISATION, SIGNALS, VideoAlign
from tests.rewards.scorers import (
    PROMPTS,
    SMALL,
    STAND_IN,
    byte_tokenizer,
    clips,
    conversation,
    pinned,
    real_templates,
    reward,
    setup,
    video_align,
)
from tests.support import close


def values(scores: Scores) -> Tensor:
    """[N, signals]."""
    return torch.stack(list(scores.values.values()), 1)


def select(videos: VideoBatch, rows: list[int]) -> VideoBatch:
    return VideoBatch(videos.frames[rows], videos.fps, tuple(videos.windows[i] for i in rows))


def one_by_one(videos: VideoBatch, motion: Callable[[Tensor], Tensor] = gray_truncated) -> Tensor:
    """The scores by hand: each clip alone, its frames resized, patched and asked twice."""
    out = []
    model, chat = reward("videoalign"), conversation("videoalign")
    for frames, (window,) in zip(videos.frames, videos.windows, strict=True):
        shown = frames[list(UniformFrames().indices(len(frames), videos.fps, ""))]
        raw = []
        for seen in (shown, motion(shown)):
            patches, grid = patchify(normalise(resize_rounded(seen, SMALL.size(*seen.shape[-2:]))))
            raw.append(model([chat.row(window.prompt, grid)], patches, [grid])[0])
        together = {"VQ": raw[0][0], "MQ": raw[1][1], "TA": raw[0][2]}
        out.append([(together[name] - mean) / std for name, (mean, std) in NORMALISATION.items()])
    return torch.tensor(out)


def test_it_is_a_reward_model():
    assert isinstance(video_align(), RewardModel) and video_align().signals == SIGNALS


def test_scores_are_those_of_each_clip_alone_by_hand():
    videos = clips()
    close(values(video_align().score(videos)), one_by_one(videos), atol=1e-5)
    with pytest.raises(AssertionError):  # motion judged in colour
        close(values(video_align().score(videos)), one_by_one(videos, lambda frames: frames), atol=1e-3)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_how_many_clips_go_at_once_changes_nothing(batch_size: int):
    videos = clips(5)
    scores = video_align(batch_size=batch_size).score(videos)
    close(values(scores), values(video_align().score(videos)), atol=1e-5)
    assert all(bool(valid.all()) for valid in scores.valid.values())


def test_the_order_of_clips_changes_nothing():
    videos = clips(4)
    order = [2, 0, 3, 1]
    close(values(video_align().score(select(videos, order))), values(video_align().score(videos))[order], atol=1e-5)


def test_only_alignment_depends_on_the_prompt():
    """Prompts of one length, so that nothing else moves: exactly equal on the CPU."""
    videos = clips(1)
    other = replace(
        videos, windows=((replace(videos.windows[0][0], prompt="a red square moves down"[:24].ljust(24)),),)
    )
    asked = replace(videos, windows=((replace(videos.windows[0][0], prompt=PROMPTS[0].ljust(24)),),))
    one, two = values(video_align().score(asked)), values(video_align().score(other))
    assert torch.equal(one[:, :2], two[:, :2]) and float((one[:, 2] - two[:, 2]).abs()) > 1e-4


def test_motion_of_a_gray_video_is_judged_as_it_is_and_colour_does_not_matter_to_it():
    videos = clips(2)
    grey = replace(videos, frames=torch.stack([gray_truncated(clip) for clip in videos.frames]))
    motion = video_align(given=("MQ",))
    # a gray frame loses at most a level when it is made gray again: the weights sum to .9999
    close(values(motion.score(grey)), values(motion.score(videos)), atol=0.05)
    in_colour = video_align(given=("MQ",), gray_motion=False)
    assert torch.equal(values(in_colour.score(grey)), values(motion.score(videos)))
    assert float((values(in_colour.score(videos)) - values(motion.score(videos))).abs().max()) > 1e-3


def test_signals_can_be_chosen_and_forwards_saved(monkeypatch: pytest.MonkeyPatch):
    videos = clips(2)
    full = video_align().score(videos).values
    asked: list[int] = []
    forward = VideoAlign.raw_scores
    monkeypatch.setattr(VideoAlign, "raw_scores", lambda self, *given: asked.append(1) or forward(self, *given))
    for given, forwards in ((("TA", "VQ"), 1), (("MQ",), 1), (("MQ", "VQ"), 2)):
        asked.clear()
        scores = video_align(given=given).score(videos).values
        assert tuple(scores) == given and len(asked) == forwards
        for name in given:
            close(scores[name], full[name], atol=1e-5)


def test_raw_scores_are_the_normalised_ones_stretched():
    videos = clips(2)
    raw, scaled = video_align(normalisation=None).score(videos).values, video_align().score(videos).values
    for name, (mean, std) in NORMALISATION.items():
        close(scaled[name] * std + mean, raw[name], atol=1e-5)


def test_another_frame_rate_looks_at_other_frames():
    videos = clips(2, frames=40, fps=8.0)
    slower = replace(videos, fps=4.0)
    assert UniformFrames().indices(40, 8.0, "") != UniformFrames().indices(40, 4.0, "")
    assert not torch.allclose(values(video_align().score(videos)), values(video_align().score(slower)), atol=1e-3)


def test_every_window_is_judged_by_its_frames_and_its_prompt():
    videos = clips(2, frames=40)
    windows = (
        (Window(0, 17, PROMPTS[0]), Window(17, 40, PROMPTS[1])),
        (Window(5, 30, PROMPTS[2]),),
    )
    scores = video_align().score(replace(videos, windows=windows))
    for clip, spans in enumerate(windows):
        for column, window in enumerate(spans):
            cut = videos.frames[[clip], window.start : window.stop]
            alone = one_by_one(VideoBatch(cut, videos.fps, ((Window(0, len(cut[0]), window.prompt),),)))
            close(torch.stack([scores.windows[name][clip, column] for name in SIGNALS]), alone[0], atol=1e-5)
    for name in SIGNALS:
        close(scores.values[name], scores.windows[name].nanmean(1), atol=1e-6)
        assert bool(scores.windows[name][1, 1].isnan())


def test_a_score_that_is_no_number_is_invalid_and_never_zero(monkeypatch: pytest.MonkeyPatch):
    forward = VideoAlign.raw_scores

    def broken(self: VideoAlign, *given) -> Tensor:
        raw = forward(self, *given)
        raw[1, 2] = torch.nan
        return raw

    monkeypatch.setattr(VideoAlign, "raw_scores", broken)
    scores = video_align().score(clips(3))
    assert scores.valid["TA"].tolist() == [True, False, True] and bool(scores.valid["VQ"].all())
    assert bool(scores.values["TA"][1].isnan())


def test_a_score_has_no_graph_and_the_differentiable_one_has():
    videos = clips(1)
    assert not values(video_align().score(videos)).requires_grad
    pixels = (videos.frames / 127.5 - 1).requires_grad_()
    scores = video_align().score_differentiable(pixels, videos.fps, videos.prompts)
    close(torch.stack(list(scores.values()), 1), values(video_align().score(videos)), atol=0.05)
    sum(scores.values()).sum().backward()
    assert pixels.grad is not None and float(pixels.grad.abs().sum()) > 0
    with pytest.raises(ValueError, match=r"pixels in \[−1, 1\]"):
        video_align().score_differentiable(pixels * 1.5, videos.fps, videos.prompts)


def test_a_window_of_one_frame_is_invalid_and_its_siblings_are_not():
    windows = ((Window(3, 4, "x"),), (Window(0, 17, "x"),), (Window(0, 9, "x"), Window(9, 10, "y")))
    scores = video_align().score(replace(clips(3), windows=windows))
    for name in SIGNALS:
        assert scores.valid[name].tolist() == [False, True, False]
        assert scores.values[name].isnan().tolist() == [True, False, True]


def test_it_keeps_the_promises_of_a_reward_model():
    check_reward(video_align(), clips(3), replace(clips(2), windows=((Window(0, 1, "x"),), (Window(4, 5, "y"),))))


def test_a_prompt_with_a_special_token_is_refused():
    videos = clips(1)
    with pytest.raises(ValueError, match="special token"):
        video_align().score(replace(videos, windows=((Window(0, 17, "x <|TA_reward|>"),),)))


@pytest.mark.parametrize("wrong", [{"given": ("VQ", "VQ")}, {"given": ()}, {"given": ("HPSv3",)}, {"batch_size": 0}])
def test_impossible_arguments_are_refused(wrong: dict):
    with pytest.raises(ValueError, match="VideoAlign"):
        video_align(**wrong)


def test_what_scores_depend_on_is_said():
    said = video_align().details()
    assert said["motion"] == "gray" and said["attention"] == "sdpa" and len(said["template_sha256"]) == 64
    changed = [video_align(gray_motion=False), video_align(sampling=CountedFrames(10)), video_align(normalisation=None)]
    assert all(other.details() != said and other.digest() != video_align().digest() for other in changed)
    assert video_align(batch_size=1).digest() == video_align().digest()


def test_another_tokenizer_or_config_is_another_model():
    """Equal weights read other words, or with another epsilon, are other scores."""
    chat = conversation("videoalign")
    chat.tokenizer.add_tokens(["circle"])
    assert video_align(conversation=chat).digest() != video_align().digest()
    other = copy.deepcopy(video_align().model)
    assert video_align(model=other).digest() == video_align().digest()
    other.backbone.config.text_config.rms_norm_eps = 1e-3
    assert video_align(model=other).digest() != video_align().digest()


# A release, as it lies on a disk


def release(folder: Path, settings: dict | None = None) -> dict:
    """A fake release of the released layout; the arguments of `released` for it."""
    inner = folder / "checkpoint-12"
    (inner / "tokenizer").mkdir(parents=True)
    torch.save(setup().checkpoint("videoalign"), inner / "model.pth")
    byte_tokenizer(()).save_pretrained(inner / "tokenizer")
    base = folder / "base"
    setup().config().save_pretrained(base)
    constants = {
        f"{name}_{part}": pair[i] for name, pair in NORMALISATION.items() for i, part in enumerate(("mean", "std"))
    }
    known = {"inference_config": constants, "model_config": {"output_dim": 1}, "peft": {"lora_r": 4, "lora_alpha": 8}}
    (folder / "model_config.json").write_text(json.dumps(known | (settings or {})), encoding="utf-8")
    (folder / "template.txt").write_bytes(STAND_IN["videoalign"].encode())
    return {
        "checkpoint": str(folder), "template": str(folder / "template.txt"), "base": str(base), "rows": 320,
        "dtype": "float32", "tokens": setup().reward_tokens("videoalign"), "lora": setup().lora,
    }  # fmt: skip


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(videoalign, "VIDEOALIGN", pinned(VIDEOALIGN, STAND_IN["videoalign"]))


@pytest.mark.usefixtures("stand_in")
def test_a_release_is_put_together_from_its_folder_or_file(tmp_path: Path):
    given = release(tmp_path)
    videos = clips(2)
    expected = values(video_align().score(videos))
    for place in (tmp_path, tmp_path / "checkpoint-12", tmp_path / "checkpoint-12" / "model.pth"):
        loaded = replace(videoalign.released(**{**given, "checkpoint": str(place)}), pixels=SMALL)
        assert torch.equal(values(loaded.score(videos)), expected)


@pytest.mark.usefixtures("stand_in")
def test_a_release_is_downloaded_where_it_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple] = []
    given = release(tmp_path)
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda name, allow_patterns: asked.append((name, allow_patterns)) or tmp_path,
    )
    assert videoalign.released(**{**given, "checkpoint": "Someone/Release"}).signals == SIGNALS
    assert asked == [("Someone/Release", ["model_config.json", "checkpoint-*/*"])]


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inference_config": {}}, "VQ_mean"),
        ({"more": {"MQ_std": 1.0}}, "several values of 'MQ_std'"),
        ({"peft": {"lora_alpha": 16}}, "lora_alpha 16, expected 8"),
        ({"model_config": {}}, "output_dim"),
        ({"model_config": {"output_dim": 3}}, "rm_head"),
        ({"model_config": {"output_dim": 4}}, "output_dim"),
    ],
)
def test_a_release_with_other_settings_is_refused(settings: dict, message: str, tmp_path: Path):
    given = release(tmp_path, settings)
    with pytest.raises(ValueError, match=message):
        videoalign.released(**given)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rows": 319}, r"embed_tokens.weight is \(320, 64\), not \(319, 64\)"),
        ({"lora": UnmergedLoRA(8, 16)}, "lora_r 4, expected 8"),
        ({"tokens": RewardTokens(261, (263, 264, 266), 262)}, "TA_reward"),
        ({"dtype": "int8"}, "dtype"),
        ({"device": "cuda:99"}, "device='cuda:99' cannot be used here"),
        ({"base": "nowhere/at all"}, "base="),
        ({"checkpoint": "nowhere"}, "checkpoint='nowhere'"),
        ({"template": "nowhere"}, "KlingTeam/VideoAlign|a test"),
    ],
)
def test_a_release_that_is_asked_for_wrongly_is_refused_in_one_line(changed: dict, message: str, tmp_path: Path):
    given = release(tmp_path)
    with pytest.raises(ValueError, match=message) as refused:
        videoalign.released(**{**given, **changed})
    assert "\n" not in str(refused.value)


@pytest.mark.usefixtures("stand_in")
def test_a_release_without_its_settings_is_refused(tmp_path: Path):
    given = release(tmp_path)
    (tmp_path / "model_config.json").unlink()
    with pytest.raises(ValueError, match=r"no model_config\.json"):
        videoalign.released(**given)


def test_the_real_template_is_scored(tmp_path: Path):
    given = release(tmp_path) | {"template": str(real_templates())}
    scores = replace(videoalign.released(**given), pixels=SMALL).score(clips(1))
    assert all(bool(valid.all()) for valid in scores.valid.values())
