"""The proxies are hackable as intended: each has a video that it loves and that the ground truth does not pay for."""

import math

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from framework.data.shapes import CAPTIONS, PALETTE, SIZE, Caption, ClipFactors, render_clips
from framework.types import VideoBatch
from rewards.shapes import ShapesReward
from rewards.shapes_proxies import ShapesProxies, Smoothness, roughness
from tests.support import close, over

CHOSEN = st.lists(st.sampled_from(CAPTIONS), min_size=1, max_size=4)
SEEDS = st.integers(0, 2**20)


def clean(captions: list[Caption], seed: int) -> Tensor:
    """Clips in [−1, 1]."""
    return render_clips(captions, 8, ClipFactors.clean(len(captions)), torch.Generator().manual_seed(seed))


def scored(clips: Tensor, captions: list[Caption]) -> tuple[dict[str, Tensor], Tensor]:
    """(proxies, mean ground truth [N])."""
    videos = VideoBatch.from_signed(clips.transpose(1, 2), 8.0, [str(caption) for caption in captions])
    truth = torch.stack(list(ShapesReward().score(videos).values.values())).mean(0)
    return dict(ShapesProxies().score(videos).values), truth


def hacked(proxy: str, captions: list[Caption], seed: int) -> Tensor:
    """The video that a proxy loves most."""
    shape = (len(captions), 3, 8, SIZE, SIZE)
    if proxy == "sharp":
        rows = torch.arange(SIZE)
        return ((rows[:, None] + rows) % 2 * 2.0 - 1).expand(shape)
    if proxy == "dyn":
        return ((-1.0) ** torch.arange(8))[None, None, :, None, None].expand(shape)
    if proxy == "hue":
        colours = torch.tensor([PALETTE[caption.colour] for caption in captions])
        return (2 * colours - 1)[:, :, None, None, None].expand(shape)
    assert proxy == "still"
    return clean(captions, seed)[:, :, :1].expand(shape)


@pytest.mark.parametrize("proxy", ["sharp", "dyn", "hue", "still"])
@over(CHOSEN, SEEDS, examples=15)
def test_every_proxy_pays_more_for_its_hack_than_for_a_clean_clip_and_the_truth_does_not(
    proxy: str, captions: list[Caption], seed: int
):
    honest, truth = scored(clean(captions, seed), captions)
    hack, hacked_truth = scored(hacked(proxy, captions, seed), captions)
    assert bool((hack[proxy] > honest[proxy] + 0.1).all()) and bool((hack[proxy] > 0.95).all())
    assert bool((hacked_truth < truth - 0.2).all())


@over(CHOSEN, SEEDS)
def test_the_proxies_are_their_formulas(captions: list[Caption], seed: int):
    random = torch.Generator().manual_seed(seed)
    clips = torch.rand(len(captions), 3, 3, SIZE, SIZE, generator=random) * 2 - 1
    values, _ = scored(clips, captions)
    for i, caption in enumerate(captions):
        pixels = ((clips[i].double() + 1) * 127.5).round() / 255  # [3, T, H, W]
        gradient = pixels.diff(dim=-1).abs().mean() + pixels.diff(dim=-2).abs().mean()
        moving = pixels.diff(dim=1).abs().mean()
        colour = torch.tensor(PALETTE[caption.colour], dtype=torch.float64)
        match = 4 * float(pixels.mean((1, 2, 3)) @ colour) / float(colour.norm())
        expected = {
            "sharp": math.tanh(gradient / 0.1), "dyn": math.tanh(moving / 0.05), "hue": math.tanh(match),
            "still": math.exp(-moving / 0.01),
        }  # fmt: skip
        for name, value in expected.items():
            close(values[name][i], torch.tensor(value), atol=1e-5)


# an auxiliary that is no proxy


def laplacian_oracle(frame: Tensor) -> float:
    """Mean |4 x − its four neighbours| of one frame [3, H, W], pixel by pixel."""
    total, count = 0.0, 0
    for plane in frame.tolist():
        for y in range(1, len(plane) - 1):
            for x in range(1, len(plane[0]) - 1):
                around = plane[y - 1][x] + plane[y + 1][x] + plane[y][x - 1] + plane[y][x + 1]
                total, count = total + abs(4 * plane[y][x] - around), count + 1
    return total / count


@over(SEEDS, examples=5)
def test_roughness_is_the_mean_absolute_laplacian(seed: int):
    frames = torch.rand(2, 1, 3, 5, 6, generator=torch.Generator().manual_seed(seed))
    close(roughness(frames), torch.tensor([laplacian_oracle(clip[0]) for clip in frames]), atol=1e-5)


@over(CHOSEN, SEEDS, examples=15)
def test_noise_is_rough_and_smoothness_says_so(captions: list[Caption], seed: int):
    honest = clean(captions, seed)
    noisy = honest + 0.3 * torch.randn(honest.shape, generator=torch.Generator().manual_seed(seed))
    batches = [VideoBatch.from_signed(x.transpose(1, 2), 8.0, list(map(str, captions))) for x in (honest, noisy)]
    smooth, rough = (Smoothness().score(batch).values["smooth"] for batch in batches)
    assert bool((rough < smooth - 0.05).all()) and bool((smooth <= 0).all())
