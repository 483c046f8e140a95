"""CLIP, aesthetic and consistency scores are their formulas, window by window, and keep a reward's promises."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from framework.conformance import check_reward
from framework.interfaces import RewardModel
from framework.pooling import TailAware
from framework.serving.digest import model_digest
from framework.types import VideoBatch, Window
from rewards.aesthetic import AestheticHead, AestheticScore, load_head
from rewards.clip_score import ClipScore
from rewards.frame_sampling import AllFrames, CountedFrames, StratifiedFrames
from rewards.subject_consistency import SubjectConsistency, consistency
from tests.rewards.tiny_encoders import batch, noise_clips, tiny_clip_encoder, tiny_dino_encoder
from tests.support import close, holds, normal, perturb, refuted

CLIP, DINO = tiny_clip_encoder(), tiny_dino_encoder()
CLIPS = batch(noise_clips(3, 9, 3, 12, 20))
STILL = batch(CLIPS.frames[:2, :1])
SEEDS = st.integers(0, 2**20)


def head_file(folder: Path, kind: str = "linear", width: int = 8, suffix: str = ".pth", seed: int = 0) -> str:
    """Random weights under LAION's names."""
    head = AestheticHead(kind, width)  # type: ignore[arg-type]
    perturb(head, seed, std=0.3)
    file = folder / f"{kind}{suffix}"
    if suffix == ".safetensors":
        save_file(head.state_dict(), file)
    else:
        torch.save(head.state_dict(), file)
    return str(file)


# CLIP score

Score = Callable[[VideoBatch], dict[str, Tensor]]


def clip_scores(videos: VideoBatch) -> dict[str, Tensor]:
    return dict(ClipScore(CLIP, AllFrames()).score(videos).values)


def first_prompt_only(videos: VideoBatch) -> dict[str, Tensor]:
    """A planted error: all windows are judged by the first prompt."""
    windows = tuple(tuple(Window(w.start, w.stop, ws[0].prompt) for w in ws) for ws in videos.windows)
    return clip_scores(VideoBatch(videos.frames, videos.fps, windows))


def whole_clip(videos: VideoBatch) -> dict[str, Tensor]:
    """A planted error: every prompt judges the whole clip."""
    windows = tuple(tuple(Window(0, videos.frames.shape[1], w.prompt) for w in ws) for ws in videos.windows)
    return clip_scores(VideoBatch(videos.frames, videos.fps, windows))


def check_clip_score(score: Score, seed: int, cut: int) -> None:
    """The mean over windows of the mean over frames of the cosine, one frame and one prompt at a time."""
    frames = noise_clips(2, 6, 3, 10, 14, seed=seed)
    windows = ((Window(0, cut, "a dog"), Window(cut, 6, "the sea")), (Window(0, 6, "a dog"),))
    found = score(VideoBatch(frames, 8.0, windows))["CLIP"]
    for i, spans in enumerate(windows):
        means = []
        for span in spans:
            text = CLIP.embed_texts([span.prompt])[0].tolist()
            cosines = []
            for frame in frames[i, span.start : span.stop]:
                image = CLIP.embed(frame[None])[0].tolist()
                cosines.append(sum(a * b for a, b in zip(image, text, strict=True)))
            means.append(sum(cosines) / len(cosines))
        close(found[i], torch.tensor(sum(means) / len(means)), atol=1e-5)


def test_the_clip_score_is_the_mean_cosine_of_each_windows_frames_and_prompt():
    holds(partial(check_clip_score, clip_scores), SEEDS, st.integers(1, 5), examples=10)


@pytest.mark.parametrize("mutant", [first_prompt_only, whole_clip])
def test_the_check_of_the_clip_score_sees_windows_that_are_mixed_up(mutant: Score):
    refuted(partial(check_clip_score, mutant), SEEDS, st.integers(1, 5), examples=10)


def test_frames_that_are_not_looked_at_do_not_count():
    reward, frames = ClipScore(CLIP, StratifiedFrames(3)), CLIPS.frames.clone()
    before = reward.score(CLIPS).values["CLIP"]
    looked = StratifiedFrames(3).indices(9, 8.0, CLIPS.prompts[0])
    frames[0, [t for t in range(9) if t not in looked]] = 0
    assert torch.equal(reward.score(VideoBatch(frames, 8.0, CLIPS.windows)).values["CLIP"], before)
    frames[0, looked[1]] = 0
    assert not torch.equal(reward.score(VideoBatch(frames, 8.0, CLIPS.windows)).values["CLIP"][0], before[0])


def test_the_pooling_is_the_one_that_was_chosen():
    one = VideoBatch(CLIPS.frames[:1], 8.0, CLIPS.windows[:1])
    pooled = ClipScore(CLIP, AllFrames(), TailAware()).score(one).values["CLIP"]
    cosines = CLIP.embed(one.frames[0]) @ CLIP.embed_texts(one.prompts)[0]
    close(pooled, TailAware()(cosines[None], 8.0), atol=1e-6)


# aesthetic heads


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_linear_head_is_a_dot_product_and_a_bias(tmp_path: Path, suffix: str):
    file = head_file(tmp_path, "linear", suffix=suffix)
    reward = AestheticScore(CLIP, load_head(file, "linear", 8), AllFrames())
    weight, bias = (load_head(file, "linear", 8).state_dict()[name].double() for name in ("weight", "bias"))
    found = reward.score(CLIPS).values["aesthetic"]
    for i, clip in enumerate(CLIPS.frames):
        rated = [(CLIP.embed(frame[None])[0].double() @ weight[0] + bias[0]).item() for frame in clip]
        close(found[i], torch.tensor(0.1 * sum(rated) / len(rated)), atol=1e-5)


def test_the_mlp_head_is_five_matrices_and_has_no_activation(tmp_path: Path):
    head = load_head(head_file(tmp_path, "mlp"), "mlp", 8)
    tensors = {name: value.double() for name, value in head.state_dict().items()}
    assert [tuple(tensors[f"layers.{i}.weight"].shape) for i in (0, 2, 4, 6, 7)] == [
        (1024, 8), (128, 1024), (64, 128), (16, 64), (1, 16)
    ]  # fmt: skip
    x = normal(0, 5, 8)
    expected = x
    for i in (0, 2, 4, 6, 7):
        expected = expected @ tensors[f"layers.{i}.weight"].T + tensors[f"layers.{i}.bias"]
    close(head(x.float()), expected[:, 0], atol=2e-2, rtol=1e-4)
    assert torch.equal(head(x.float()), head(x.float()))  # dropout is off
    scores = AestheticScore(CLIP, head, name="mlp", scale=1.0).score(CLIPS)
    assert tuple(scores.values) == ("mlp",)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if k != "bias"}, r"1 tensors missing \['bias'\]"),
        (lambda t: t | {"extra": torch.zeros(1)}, r"1 unknown \['extra'\]"),
        (lambda t: t | {"weight": torch.zeros(1, 9)}, r"weight has shape \(1, 9\), the network needs \(1, 8\)"),
        (lambda t: {f"module.{k}": v for k, v in t.items()}, r"2 tensors missing"),
        (lambda t: {"state_dict": t}, r"must hold tensors by name and nothing else"),
        (lambda t: list(t.values()), r"must hold tensors by name and nothing else, got list"),
    ],
)
def test_a_head_with_any_tensor_out_of_place_is_refused(tmp_path: Path, edit: Callable, message: str):
    torch.save(edit(AestheticHead("linear", 8).state_dict()), tmp_path / "head.pth")
    with pytest.raises(ValueError, match=message) as caught:
        load_head(str(tmp_path / "head.pth"), "linear", 8)
    assert "\n" not in str(caught.value)


def test_one_head_is_not_taken_for_the_other(tmp_path: Path):
    with pytest.raises(ValueError, match=r"kind 'mlp', width 8\) does not fit"):
        load_head(head_file(tmp_path, "linear"), "mlp", 8)
    with pytest.raises(ValueError, match=r"AestheticHead.kind must be 'linear' or 'mlp', got 'big'"):
        load_head(head_file(tmp_path, "linear"), "big", 8)  # type: ignore[arg-type]


def test_a_head_of_another_width_and_a_file_that_is_none_are_refused(tmp_path: Path):
    wide = load_head(head_file(tmp_path, "linear", width=768), "linear")
    with pytest.raises(ValueError, match=r"reads features of 768 numbers and the encoder gives 8; LAION's heads"):
        AestheticScore(CLIP, wide)
    with pytest.raises(ValueError, match=r"there is no file '.*none.pth'"):
        load_head(str(tmp_path / "none.pth"), "linear")
    (tmp_path / "broken.pth").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match=r"broken.pth is not a file of tensors"):
        load_head(str(tmp_path / "broken.pth"), "linear")


class Burglar:
    """A pickle that writes a file when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.touch, (self.mark,)


def test_a_head_that_is_a_pickle_of_code_is_refused_unread(tmp_path: Path):
    torch.save({"weight": Burglar(tmp_path / "was here")}, tmp_path / "head.pth")
    with pytest.raises(ValueError, match=r"head.pth is not a file of tensors"):
        load_head(str(tmp_path / "head.pth"), "linear", 8)
    assert not (tmp_path / "was here").exists()


# subject consistency

Consistency = Callable[[Tensor, str], Tensor]


def unclamped(features: Tensor, against: str) -> Tensor:
    """A planted error: opposite frames count as less than unrelated ones."""
    later, first, previous = features[:, 1:], features[:, :1], features[:, :-1]
    both = ((later * first).sum(-1), (later * previous).sum(-1))
    return {"both": sum(both) / 2, "first": both[0], "previous": both[1]}[against]  # type: ignore[return-value]


def first_twice(features: Tensor, against: str) -> Tensor:
    """A planted error: the previous frame is never looked at."""
    return consistency(features, "first")


def check_consistency(measure: Consistency, seed: int, frames: int) -> None:
    features = torch.nn.functional.normalize(normal(seed, 2, frames, 3), dim=-1)
    for against, weights in (("both", (0.5, 0.5)), ("first", (1, 0)), ("previous", (0, 1))):
        found = measure(features, against)
        assert found.shape == (2, frames - 1)
        for n in range(2):
            for t in range(1, frames):
                one = max(0.0, sum(a * b for a, b in zip(*features[n, [t, 0]].tolist(), strict=True)))
                two = max(0.0, sum(a * b for a, b in zip(*features[n, [t, t - 1]].tolist(), strict=True)))
                assert math.isclose(found[n, t - 1].item(), weights[0] * one + weights[1] * two, abs_tol=1e-9)


def test_consistency_is_the_clamped_similarity_to_the_first_and_the_previous_frame():
    holds(partial(check_consistency, consistency), SEEDS, st.integers(2, 6), examples=20)


@pytest.mark.parametrize("mutant", [unclamped, first_twice])
def test_the_check_of_consistency_sees_a_missing_clamp_and_a_missing_frame(mutant: Consistency):
    refuted(partial(check_consistency, mutant), SEEDS, st.integers(2, 6))


def test_a_still_image_is_the_known_hack_of_consistency_and_a_cut_costs():
    still = CLIPS.frames[:1, :1].expand(1, 8, 3, 12, 20)
    cut = torch.cat([still[:, :4], CLIPS.frames[1:2, :1].expand(1, 4, 3, 12, 20)], 1)
    scores = SubjectConsistency(DINO).score(batch(torch.cat([still, cut]))).values["subject_consistency"]
    close(scores[0], torch.tensor(1.0), atol=1e-5)
    assert float(scores[1]) < float(scores[0]) - 0.002


def test_comparing_with_something_else_is_refused():
    with pytest.raises(ValueError, match=r"SubjectConsistency.against must be 'both' or 'first' or 'previous'"):
        SubjectConsistency(DINO, against="last")  # type: ignore[arg-type]


# promises


def test_the_image_rewards_keep_the_promises_of_a_reward(tmp_path: Path):
    rewards: list[RewardModel] = [
        ClipScore(CLIP),
        AestheticScore(CLIP, load_head(head_file(tmp_path), "linear", 8)),
        SubjectConsistency(DINO),
    ]
    for reward in rewards:
        check_reward(reward, CLIPS)
    windows = ((Window(0, 5, "a dog"), Window(5, 9, "the sea")), *CLIPS.windows[1:])
    for reward in rewards:
        check_reward(reward, VideoBatch(CLIPS.frames, 8.0, windows))


def test_frames_that_cannot_be_chosen_are_no_score_and_no_end_of_the_run():
    check_reward(ClipScore(CLIP, CountedFrames(4)), CLIPS, unscorable=STILL)


def test_a_reward_is_told_from_one_with_other_weights_words_or_pixels(tmp_path: Path):
    """What a service and its clients, and a cache, know a reward by."""
    again = ClipScore(tiny_clip_encoder())
    others = [
        ClipScore(tiny_clip_encoder(1)), ClipScore(tiny_clip_encoder(resize="plain")), ClipScore(CLIP, AllFrames()),
        SubjectConsistency(CLIP), SubjectConsistency(DINO),
    ]  # fmt: skip
    heads = [load_head(head_file(tmp_path, seed=seed), "linear", 8) for seed in (0, 1)]
    digests = [model_digest(reward) for reward in (*others, *(AestheticScore(CLIP, head) for head in heads))]
    assert model_digest(again) == model_digest(ClipScore(CLIP)) not in digests
    assert len(set(digests)) == len(digests)


def test_one_frame_has_no_consistency_and_no_zero():
    check_reward(SubjectConsistency(CLIP), CLIPS, unscorable=STILL)
