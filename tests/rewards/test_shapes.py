"""The ground-truth rewards pay for quality, motion and truth, and for nothing that looks like them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from framework.data.shapes import BACKGROUND, CAPTIONS, SIZE, Caption, ClipFactors, blur, coverage, render_clips, wrap
from framework.data.shapes_controls import ShapesControls
from framework.interfaces import RewardModel
from framework.pooling import MeanFrames, TailAware, TopFrames
from framework.types import Scene, Scores, VideoBatch, Window
from rewards.shapes import SHAPE_OFFSETS, ShapesReward, analyse, locate, motion_quality, visual_quality
from tests.support import close, holds, over, refuted

Score = Callable[[VideoBatch], Scores]
FRAMES = 12
CHOSEN = st.lists(st.sampled_from(CAPTIONS), min_size=1, max_size=4)
SEEDS = st.integers(0, 2**20)


def clean(captions: list[Caption], seed: int, frames: int = FRAMES, **factors: Tensor) -> Tensor:
    """Clips [N, 3, frames, SIZE, SIZE] without a flaw, or with some factors changed."""
    changed = replace(ClipFactors.clean(len(captions)), **factors)
    return render_clips(captions, frames, changed, torch.Generator().manual_seed(seed))


def videos(clips: Tensor, captions: list[Caption]) -> VideoBatch:
    return VideoBatch.from_signed(clips.transpose(1, 2), 8.0, [str(caption) for caption in captions])


def real(batch: VideoBatch) -> Scores:
    return ShapesReward().score(batch)


def total(scores: Scores) -> Tensor:
    return torch.stack(list(scores.values.values())).mean(0)


# bounds


def check_bounded(score: Score, captions: list[Caption], seed: int, kind: str) -> None:
    """Every score of every video lies in [0, 1] and is valid."""
    random = torch.Generator().manual_seed(seed)
    clips = {
        "clean": clean(captions, seed),
        "noise": 3 * torch.randn(len(captions), 3, FRAMES, SIZE, SIZE, generator=random),
        "two tones": (torch.rand(len(captions), 3, FRAMES, SIZE, SIZE, generator=random) > 0.5) * 2.0 - 1,
        "garbled": clean(captions, seed).roll(1, dims=1).flip(-1) * torch.rand(1, generator=random) * 3,
        "blank": torch.full((len(captions), 3, FRAMES, SIZE, SIZE), float(torch.rand(1, generator=random)) * 2 - 1),
    }[kind]
    scores = score(videos(clips, captions))
    for name in ("VQ", "MQ", "TA"):
        assert bool(scores.valid[name].all()) and scores.values[name].dtype == torch.float32
        assert bool(((scores.values[name] >= 0) & (scores.values[name] <= 1)).all())


KINDS = st.sampled_from(["clean", "noise", "two tones", "garbled", "blank"])


def contrast(batch: VideoBatch) -> Scores:
    """A reward that grows with contrast."""
    spread = batch.frames.float().std((1, 2, 3, 4)) / 60
    return Scores.of({"VQ": spread, "MQ": spread, "TA": spread})


def test_every_score_of_every_video_is_between_zero_and_one():
    holds(partial(check_bounded, real), CHOSEN, SEEDS, KINDS)


def test_the_bounds_check_sees_a_reward_without_a_ceiling():
    refuted(partial(check_bounded, contrast), CHOSEN, SEEDS, KINDS)


# what it pays for


@over(CHOSEN, SEEDS)
def test_clean_renderings_are_near_the_ceiling(captions: list[Caption], seed: int):
    values = real(videos(clean(captions, seed), captions)).values
    assert bool((values["VQ"] > 0.95).all()) and bool((values["MQ"] > 0.82).all()) and bool((values["TA"] > 0.8).all())


def motionless(kind: str, captions: list[Caption], seed: int) -> Tensor:
    clips = clean(captions, seed)
    if kind == "static":
        return clips[:, :, :1].expand_as(clips)
    if kind == "blank":
        return torch.full_like(clips, 2 * BACKGROUND - 1)
    if kind == "grey":
        return torch.zeros_like(clips)
    if kind == "flicker":
        return clips[:, :, :1] * (1 + 0.4 * (-1.0) ** torch.arange(FRAMES)[:, None, None])
    assert kind == "shaking on the spot"
    return torch.stack([clips[:, :, 0].roll(t % 2, dims=-1) for t in range(FRAMES + 1)], dim=2)[:, :, :-1]


def check_no_motion_no_reward(score: Score, kind: str, captions: list[Caption], seed: int) -> None:
    assert bool((score(videos(motionless(kind, captions, seed), captions)).values["MQ"] < 0.01).all())


def ungated(batch: VideoBatch) -> Scores:
    """Smoothness alone, as in the first version of this reward: a static video earns it all."""
    seen = analyse(batch.frames.float() / 127.5 - 1)
    acceleration = (seen.velocity[:, 1:] - seen.velocity[:, :-1]).norm(dim=-1)
    return Scores.of({"MQ": (-acceleration).exp().mean(1)})


@pytest.mark.parametrize("kind", ["static", "blank", "grey", "flicker"])
def test_without_motion_there_is_no_motion_reward(kind: str):
    holds(partial(check_no_motion_no_reward, real, kind), CHOSEN, SEEDS, examples=20)


@pytest.mark.parametrize("kind", ["static", "blank"])
def test_the_motion_check_sees_a_reward_without_gates(kind: str):
    refuted(partial(check_no_motion_no_reward, ungated, kind), CHOSEN, SEEDS)


@over(CHOSEN, SEEDS, examples=20)
def test_motion_back_and_forth_earns_little(captions: list[Caption], seed: int):
    shaking = real(videos(motionless("shaking on the spot", captions, seed), captions)).values["MQ"]
    assert bool((shaking < 0.2).all())


@over(CHOSEN, SEEDS, examples=20)
def test_noise_earns_nothing_and_shuffled_frames_no_motion(captions: list[Caption], seed: int):
    random = torch.Generator().manual_seed(seed)
    clips = clean(captions, seed)
    assert bool((total(real(videos(torch.randn(clips.shape, generator=random), captions))) < 0.15).all())
    order = torch.tensor([0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11])
    in_order, shuffled = (real(videos(c, captions)).values for c in (clips, clips[:, :, order]))
    assert bool((shuffled["MQ"] < 0.3 * in_order["MQ"]).all())
    close(shuffled["VQ"], in_order["VQ"], atol=1e-6)


# the caption


WORDS = {"colour": 0, "shape": 1, "direction": 2, "speed": 3}


def other(caption: Caption, word: str, step: int) -> Caption:
    """The caption with one word exchanged."""
    choices = sorted({getattr(c, word) for c in CAPTIONS} - {getattr(caption, word)})
    return replace(caption, **{word: choices[step % len(choices)]})


def check_truth_pays(score: Score, captions: list[Caption], seed: int, word: str) -> None:
    """Judged by a caption with one wrong word, a clip loses text alignment and nothing else."""
    clips = clean(captions, seed)
    wrong = [other(caption, word, seed) for caption in captions]
    told, untold = score(videos(clips, captions)).values, score(videos(clips, wrong)).values
    assert bool((untold["TA"] < told["TA"] - 0.15).all())
    assert torch.equal(told["VQ"], untold["VQ"]) and torch.equal(told["MQ"], untold["MQ"])


def deaf(batch: VideoBatch) -> Scores:
    """The caption is not read: quality stands in for truth."""
    values = real(batch).values
    return Scores.of({**values, "TA": values["VQ"]})


def test_every_word_of_the_caption_counts_and_counts_in_text_alignment_only():
    holds(partial(check_truth_pays, real), CHOSEN, SEEDS, st.sampled_from(list(WORDS)))


def test_the_truth_check_sees_a_reward_that_does_not_read():
    refuted(partial(check_truth_pays, deaf), CHOSEN, SEEDS, st.sampled_from(list(WORDS)))


# the torus


def check_shift_invariant(score: Score, captions: list[Caption], seed: int, shift: tuple[int, int]) -> None:
    """Rolling all frames around the torus changes no score."""
    clips = clean(captions, seed, exposure=torch.full((len(captions),), 0.8))
    here, there = (score(videos(c, captions)).values for c in (clips, clips.roll(shift, dims=(-2, -1))))
    for name in here:
        close(there[name], here[name], atol=1e-4)


def on_the_plane(batch: VideoBatch) -> Scores:
    """Displacements that are not wrapped: crossing the border looks like a jump."""
    seen = analyse(batch.frames.float() / 127.5 - 1)
    centre = locate((batch.frames.float() / 127.5 - 2 * BACKGROUND).square().sum(2))
    return Scores.of({"MQ": motion_quality(replace(seen, velocity=centre[:, 1:] - centre[:, :-1]))})


SHIFTS = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE))


def test_where_on_the_torus_a_clip_plays_does_not_matter():
    holds(partial(check_shift_invariant, real), CHOSEN, SEEDS, SHIFTS)


def test_the_torus_check_sees_displacements_that_are_not_wrapped():
    refuted(partial(check_shift_invariant, on_the_plane), CHOSEN, SEEDS, SHIFTS)


@over(st.tuples(st.floats(0, 16), st.floats(0, 16)), st.integers(0, 2))
def test_an_object_is_located_to_a_tenth_of_a_pixel(centre: tuple[float, float], shape: int):
    place = torch.tensor(centre)
    found = locate(coverage(place)[shape].square())
    assert wrap(found - place - SHAPE_OFFSETS[shape]).abs().max() < 0.12


# flaws cost, more flaws cost more


def flawed(captions: list[Caption], seed: int, flaw: str, amount: float) -> Tensor:
    """The same clips with a flaw of a given amount in [0, 1]."""
    n = len(captions)
    if flaw == "exposure":
        return clean(captions, seed, exposure=torch.full((n,), 1 - 0.6 * amount))
    if flaw == "slow":
        return clean(captions, seed, pace=torch.full((n,), 1 - 0.6 * amount))
    if flaw == "fast":
        return clean(captions, seed, pace=torch.full((n,), 1 + 0.6 * amount))
    if flaw == "jitter":
        return clean(captions, seed, jitter=torch.full((n,), amount))
    clips = clean(captions, seed)
    return blur(clips, 0.4 + amount) if amount else clips


FLAWS = {"exposure": "VQ", "blur": "VQ", "slow": "TA", "fast": "TA", "jitter": "MQ"}
"""Each flaw and the signal that it must cost."""


def check_monotone(score: Score, flaw: str, captions: list[Caption], seed: int) -> None:
    levels = [score(videos(flawed(captions, seed, flaw, amount), captions)).values for amount in (0.0, 0.35, 0.7, 1.0)]
    for better, worse in pairwise(levels):
        assert bool((worse[FLAWS[flaw]] < better[FLAWS[flaw]]).all())
    assert bool((levels[-1][FLAWS[flaw]] < 0.9 * levels[0][FLAWS[flaw]]).all())


def saturated(batch: VideoBatch) -> Scores:
    """A reward that only asks whether anything is there."""
    values = real(batch).values
    return Scores.of({name: (value > 0.05).float() for name, value in values.items()})


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_larger_flaw_costs_more(flaw: str):
    holds(partial(check_monotone, real, flaw), CHOSEN, SEEDS, examples=20)


@pytest.mark.parametrize("flaw", FLAWS)
def test_the_flaw_check_sees_a_reward_that_saturates(flaw: str):
    refuted(partial(check_monotone, saturated, flaw), CHOSEN, SEEDS)


# batches and windows


def check_company_does_not_matter(reward: RewardModel, captions: list[Caption], seed: int) -> None:
    batch = videos(clean(captions, seed, jitter=torch.full((len(captions),), 0.3)), captions)
    whole = reward.score(batch).values
    for i in range(len(captions)):
        alone = VideoBatch(batch.frames[i : i + 1], batch.fps, batch.windows[i : i + 1])
        for name, value in reward.score(alone).values.items():
            close(value[0], whole[name][i], atol=2e-5)


@dataclass(frozen=True)
class BatchNormalised(ShapesReward):
    """A planted error: scores relative to the best of the batch."""

    def score(self, videos: VideoBatch) -> Scores:
        return Scores.of({name: value / value.max() for name, value in super().score(videos).values.items()})


def test_a_score_does_not_depend_on_the_batch():
    holds(partial(check_company_does_not_matter, ShapesReward()), CHOSEN, SEEDS, examples=20)


def test_the_batch_check_sees_scores_relative_to_the_batch():
    refuted(partial(check_company_does_not_matter, BatchNormalised()), CHOSEN, SEEDS)


def test_a_clip_of_several_windows_is_scored_window_by_window_and_averaged():
    first, second = CAPTIONS[3], CAPTIONS[100]
    clips = torch.cat([clean([first, first], 0, 9), clean([second, second], 1, 6)], dim=2)
    spans = (Window(0, 9, str(first)), Window(9, 15, str(second)))
    batch = VideoBatch.from_signed(clips.transpose(1, 2), 8.0, [str(first)] * 2)
    scores = ShapesReward().score(replace(batch, windows=(spans, (Window(0, 9, str(first)),))))
    parts = [
        ShapesReward().score(videos(clips[:, :, w.start : w.stop], [caption] * 2)).values
        for w, caption in zip(spans, (first, second), strict=True)
    ]
    for name in ("VQ", "MQ", "TA"):
        close(scores.windows[name][0], torch.stack([part[name][0] for part in parts]), atol=2e-5)
        close(scores.values[name][0], (parts[0][name][0] + parts[1][name][0]) / 2, atol=2e-5)
        close(scores.values[name][1], parts[0][name][1], atol=2e-5)
        assert scores.windows[name][1].isnan().tolist() == [False, True]
        assert bool(scores.valid[name].all())


def test_a_clip_too_short_to_judge_is_invalid_and_not_zero():
    for frames, judged in ((1, {"VQ"}), (2, {"VQ", "TA"}), (3, {"VQ", "MQ", "TA"})):
        scores = real(videos(clean([CAPTIONS[0]], 0, frames=frames), [CAPTIONS[0]]))
        assert {name for name, valid in scores.valid.items() if bool(valid.all())} == judged


def test_videos_of_another_size_and_captions_of_another_world_are_refused():
    frames = torch.zeros(1, 4, 3, 32, 16, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"16×16 videos.*got 32×16.*REWARD"):
        real(VideoBatch(frames, 8.0, ((Window(0, 4, str(CAPTIONS[0])),),)))
    with pytest.raises(ValueError, match=r"cannot read the caption 'a cat on a mat'.*a COLOUR SHAPE moves"):
        real(VideoBatch(frames[..., :16, :], 8.0, ((Window(0, 4, "a cat on a mat"),),)))


def test_scores_carry_no_graph():
    scores = real(videos(clean([CAPTIONS[0]], 0), [CAPTIONS[0]]))
    assert not any(value.requires_grad for value in scores.values.values())


# the controls that results are printed between


def test_the_controls_are_ordered_from_ceiling_to_floors():
    scenes = [Scene.single(str(caption)) for caption in CAPTIONS[::6]]
    controls = ShapesControls().videos(scenes)
    means = {name: {k: float(v.mean()) for k, v in real(batch).values.items()} for name, batch in controls.items()}
    sums = {name: sum(values.values()) / 3 for name, values in means.items()}
    ceiling = sums.pop("ceiling (clean rendering)")
    assert ceiling > 0.93 and all(value < ceiling - 0.15 for value in sums.values())
    assert means["blank"]["MQ"] < 0.01 and means["static"]["MQ"] < 0.01 and means["wrong caption"]["TA"] < 0.2
    assert sums["noise"] < 0.1 and means["shuffled frames"]["MQ"] < 0.1
    assert all(batch.prompts == [scene.prompt for scene in scenes] for batch in controls.values())


def test_quality_is_what_some_clean_object_explains():
    seen = analyse(clean([CAPTIONS[7]], 0).transpose(1, 2))
    assert visual_quality(seen)[0] > 0.98
    assert visual_quality(replace(seen, error=seen.error + 0.03))[0] < 0.4


def test_how_frames_are_pooled_is_a_parameter_of_visual_quality_alone():
    captions = list(CAPTIONS[:3])
    clips = clean(captions, 0)
    clips[:, :, 5] = torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    batch = videos(clips, captions)
    best, mean, worst = (ShapesReward(pooling).score(batch).values
                         for pooling in (TopFrames(), MeanFrames(), TailAware()))  # fmt: skip
    assert bool((worst["VQ"] < mean["VQ"] - 0.05).all()) and bool((mean["VQ"] < best["VQ"] - 0.05).all())
    assert all(torch.equal(best[name], worst[name]) for name in ("MQ", "TA"))
    assert torch.equal(mean["VQ"], ShapesReward().score(batch).values["VQ"])
