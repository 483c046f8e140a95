"""Dynamic degree and warp smoothness are their formulas under a known flow, and refuse the hacks they are known for."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from framework.conformance import check_reward
from framework.types import VideoBatch
from rewards.dynamic_degree import DynamicDegree, enough_motion, frame_step, top_motion
from rewards.frame_sampling import AllFrames
from rewards.warp_smoothness import WarpSmoothness, consistent, inside, triple_smoothness, warp
from tests.rewards.tiny_encoders import KnownFlow, SearchedFlow, batch, noise_clips
from tests.support import close, holds, normal, over, refuted

SEEDS = st.integers(0, 2**20)


def clocked(frames: int, height: int = 16, width: int = 24, clips: int = 1) -> Tensor:
    """Clips whose first pixel tells the time; `KnownFlow` reads it."""
    video = noise_clips(clips, 1, 3, height, width).expand(clips, frames, 3, height, width).clone()
    video[:, :, 0, 0, 0] = torch.arange(frames, dtype=torch.uint8)
    return video


# dynamic degree


def test_every_kth_frame_is_about_an_eighth_of_a_second():
    assert [frame_step(fps) for fps in (4, 8, 10, 12, 15, 16, 20, 24, 30, 60)] == [1, 1, 1, 2, 2, 2, 2, 3, 4, 8]


def check_top_motion(measure: Callable[[Tensor], Tensor], seed: int, height: int, width: int) -> None:
    flow = normal(seed, 2, 2, height, width)
    for n, field in enumerate(flow.tolist()):
        lengths = sorted((math.hypot(x, y) for r, s in zip(*field, strict=True) for x, y in zip(r, s, strict=True)))
        best = lengths[-max(1, int(0.05 * len(lengths))) :]
        assert math.isclose(measure(flow)[n].item(), sum(best) / len(best), rel_tol=1e-9)


def of_all_pixels(flow: Tensor) -> Tensor:
    """A planted error."""
    return flow.norm(dim=1).flatten(1).mean(1)


def test_motion_is_the_mean_of_the_longest_twentieth():
    holds(partial(check_top_motion, top_motion), SEEDS, st.integers(1, 8), st.integers(2, 9), examples=20)
    refuted(partial(check_top_motion, of_all_pixels), SEEDS, st.integers(1, 8), st.integers(2, 9))


@over(st.integers(2, 20), st.sampled_from([8.0, 16.0, 24.0]), st.floats(-3, 3), st.floats(-3, 3), examples=20)
def test_a_known_shift_has_the_degree_of_its_length(frames: int, fps: float, x: float, y: float):
    step = frame_step(fps)
    scores = DynamicDegree(KnownFlow(x, y)).score(batch(clocked(frames), fps))
    if frames <= step:
        assert not bool(scores.valid["dynamic_degree"][0])
    else:
        close(scores.values["dynamic_degree"][0], torch.tensor(step * math.hypot(x, y)), atol=1e-4)


def flag_oracle(motion: list[float], height: int, width: int) -> float:
    above = len([r for r in motion if r > 6.0 * min(height, width) / 256])
    return 1.0 if above >= round(4 * (len(motion) + 1) / 16) else 0.0


FLAGS = (st.lists(st.floats(0, 12), min_size=1, max_size=20), st.sampled_from([128, 256, 480]), st.just(512))


def check_flag(flag: Callable[[Tensor, int, int], Tensor], motion: list[float], height: int, width: int) -> None:
    assert flag(torch.tensor([motion], dtype=torch.float64), height, width).item() == flag_oracle(motion, height, width)


def pairs_for_frames(motion: Tensor, height: int, width: int) -> Tensor:
    """A planted error: the quota counts pairs, not frames."""
    wanted = round(4 * motion.shape[1] / 16)
    return ((motion > 6 * min(height, width) / 256).sum(1) >= wanted).float()


def longer_side(motion: Tensor, height: int, width: int) -> Tensor:
    """A planted error."""
    return enough_motion(motion, width, width)


def test_the_flag_counts_pairs_above_the_threshold():
    holds(partial(check_flag, enough_motion), *FLAGS, examples=100)


@pytest.mark.parametrize("mutant", [pairs_for_frames, longer_side])
def test_the_check_of_the_flag_sees_another_quota_and_another_side(mutant: Callable):
    refuted(partial(check_flag, mutant), *FLAGS, examples=300)


@pytest.mark.parametrize(
    ("frames", "above", "flag"),
    [(16, 4, 1), (16, 3, 0), (8, 2, 1), (8, 1, 0), (6, 2, 1), (6, 1, 0), (10, 2, 1), (10, 1, 0), (2, 0, 1)],
)
def test_the_quota_is_a_quarter_of_the_frames_rounded_half_to_even(frames: int, above: int, flag: int):
    motion = torch.tensor([[7.0] * above + [1.0] * (frames - 1 - above)])
    assert enough_motion(motion, 256, 400).item() == flag


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@pytest.mark.parametrize("rule", ["mean", "flag"])
def test_a_flow_that_is_no_number_is_no_stillness(rule: Literal["mean", "flag"], broken: float):
    scores = DynamicDegree(KnownFlow(broken, 0), rule).score(batch(clocked(17, 64, 64), 8.0))
    assert scores.values["dynamic_degree"].isnan().all() and not scores.valid["dynamic_degree"].any()


def test_the_flag_is_a_reward_too():
    still, fast = KnownFlow(0, 0), KnownFlow(8, 0)
    videos = batch(clocked(17, 256, 256), 8.0)
    assert [DynamicDegree(f, "flag").score(videos).values["dynamic_degree"].item() for f in (still, fast)] == [0, 1]
    with pytest.raises(ValueError, match=r"DynamicDegree.rule must be 'mean' or 'flag', got 'max'"):
        DynamicDegree(still, "max")  # type: ignore[arg-type]


# warping


def test_a_whole_shift_reads_the_pixels_it_names():
    image = noise_clips(1, 3, 6, 7)[0][None].float()
    flow = torch.zeros(1, 2, 6, 7)
    flow[:, 0], flow[:, 1] = 2, -1
    moved = warp(image, flow)
    assert torch.allclose(moved[0, :, 1:, :5], image[0, :, :5, 2:], atol=1e-3)
    assert inside(flow)[0, 1:, :5].all() and not inside(flow)[0, 0].any() and not inside(flow)[0, :, 5:].any()


def test_flows_that_undo_each_other_are_consistent_and_others_are_not():
    forward = torch.full((1, 2, 9, 9), 2.0)
    assert bool(consistent(forward, -forward)[0, :7, :7].all()) and not bool(consistent(forward, -forward)[0, 7:].any())
    assert not bool(consistent(forward, forward).any()) and not bool(consistent(forward, 0 * forward).any())


# smoothness


def texture(seed: int = 0, side: int = 24) -> Tensor:
    """A smooth pattern [3, side, side] on a torus that looks different everywhere."""
    random = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(*[torch.arange(side) * 2 * math.pi / side] * 2, indexing="ij")
    waves = torch.rand(3, 4, generator=random) * 6
    planes = [torch.sin(x + a) + torch.sin(y + b) + torch.sin(2 * x + c) * torch.cos(y + d) for a, b, c, d in waves]
    return (127 + 40 * torch.stack(planes)).clamp(0, 255)


def moving(step: int, frames: int = 7, seed: int = 0) -> Tensor:
    """uint8 [T, 3, side, side]: the pattern shifted by ``step`` pixels a frame."""
    return torch.stack([texture(seed).roll(step * t, -1) for t in range(frames)]).to(torch.uint8)


def scored(clip: Tensor, reward: WarpSmoothness | None = None, fps: float = 8.0) -> float:
    reward = reward or WarpSmoothness(SearchedFlow(), AllFrames())
    scores = reward.score(batch(clip[None], fps))
    assert bool(scores.valid["warp_smoothness"][0])
    return scores.values["warp_smoothness"].item()


def flickering(clip: Tensor) -> Tensor:
    return torch.stack([frame if t % 2 else frame // 2 for t, frame in enumerate(clip)])


def shaking(clip: Tensor) -> Tensor:
    return torch.stack([frame.roll(3 * (t % 2), -1) for t, frame in enumerate(clip[:1].expand_as(clip))])


def noisy(clip: Tensor) -> Tensor:
    return (clip.float() + 25 * normal(1, *clip.shape, dtype=torch.float32)).clamp(0, 255).to(torch.uint8)


def shuffled(clip: Tensor) -> Tensor:
    return clip[[0, 3, 1, 5, 2, 6, 4]]


HACKS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "static": (lambda clip: clip[:1].expand_as(clip), 0.0),
    "noise": (lambda clip: noise_clips(*clip.shape), 0.05),
    "flicker of a still image": (lambda clip: flickering(clip[:1].expand_as(clip)), 0.0),
    "flicker": (flickering, 0.3),
    "shake": (shaking, 0.0),
    "a little noise": (noisy, 0.8),
    "shuffled frames": (shuffled, 0.7),
}
"""What is done to a clip that moves evenly, and a score that it must not reach."""


def check_hacks(score: Callable[[Tensor], float]) -> None:
    """An evenly moving clip is near 1, and every hack stays below its bound and below the honest clip."""
    honest = moving(1)
    best = score(honest)
    assert best > 0.97
    for name, (hack, bound) in HACKS.items():
        assert score(hack(honest)) <= bound < best, name


def ungated(clip: Tensor) -> float:
    """A planted error: what smoothness alone pays, and the still image is the best video of all."""
    pairs = clip[:-2], clip[2:]
    flows = SearchedFlow().flow(*pairs), SearchedFlow().flow(*pairs[::-1])
    return triple_smoothness(*(part.float() for part in (clip[:-2], clip[1:-1], clip[2:])), *flows).mean().item()


def unaware_of_the_middle(clip: Tensor) -> float:
    """A planted error: the middle frame is not compared with what it should be."""
    double = clip.repeat_interleave(2, 0)[: len(clip)]
    return scored(double, WarpSmoothness(SearchedFlow(), AllFrames(), still=0.0, moving=0.01))


def test_a_clip_that_moves_evenly_is_smooth_and_the_known_hacks_are_not():
    check_hacks(scored)


@pytest.mark.parametrize("mutant", [ungated, unaware_of_the_middle])
def test_the_check_of_hacks_sees_a_missing_gate_and_a_middle_that_nobody_looks_at(mutant: Callable[[Tensor], float]):
    with pytest.raises(AssertionError):
        check_hacks(mutant)


def test_speed_is_paid_for_up_to_a_point_and_no_further():
    clip = moving(1)
    speed = 8.0 / 24  # one pixel a frame, in sides per second
    at = [
        scored(clip, WarpSmoothness(SearchedFlow(), AllFrames(), still=s, moving=m))
        for s, m in ((0.0, speed), (0.0, 2 * speed), (speed, 2 * speed))
    ]
    assert at[0] > 0.97 and abs(at[1] / at[0] - 0.5) < 0.01 and at[2] == 0
    assert scored(moving(2)) <= scored(clip) + 1e-3


def test_pixels_that_nothing_explains_cost_what_they_cover():
    frames = moving(2, 3)[:, None].float()
    forward = torch.full((1, 2, 24, 24), 0.0)
    forward[:, 0] = 4
    full = triple_smoothness(*frames, forward, -forward)
    broken = -forward.clone()
    broken[..., 4:] = 40.0  # from most pixels the way back leads elsewhere
    assert float(full) > 0.97 and float(triple_smoothness(*frames, forward, broken)) < 0.4


def test_settings_and_clips_that_mean_nothing():
    with pytest.raises(ValueError, match=r"WarpSmoothness needs 0 ≤ still < moving, got 0.2 and 0.1"):
        WarpSmoothness(SearchedFlow(), still=0.2)
    with pytest.raises(ValueError, match=r"WarpSmoothness.tolerance must lie in \(0, 1\], got 0"):
        WarpSmoothness(SearchedFlow(), tolerance=0)
    for frames in (1, 2):
        scores = WarpSmoothness(SearchedFlow()).score(batch(moving(1, frames)[None]))
        assert not bool(scores.valid["warp_smoothness"][0]) and math.isnan(scores.values["warp_smoothness"].item())


# promises


def test_the_flow_rewards_keep_the_promises_of_a_reward():
    clips = torch.stack([moving(1), moving(2), moving(1, seed=4)])
    videos = batch(clips, 16.0)
    flow = SearchedFlow()
    rewards: list[Any] = [DynamicDegree(flow), DynamicDegree(flow, "flag"), WarpSmoothness(flow)]
    for reward in rewards:
        check_reward(reward, videos, unscorable=batch(clips[:2, :1]))
    windows = tuple((replace(w[0], stop=3), replace(w[0], start=3)) for w in videos.windows)
    for reward in rewards:
        check_reward(reward, VideoBatch(videos.frames, 16.0, windows))
