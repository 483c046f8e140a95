"""Hackable proxies of the shapes world: cheap statistics that look like quality until a policy optimises them.

With pixels in [0, 1], and each in [0, 1] (hue: [−1, 1]):

    sharp = tanh((mean|∂x| + mean|∂y|) / .1)     paid for by grids and noise
    dyn   = tanh(mean|x_{t+1} − x_t| / .05)      paid for by flicker
    hue   = tanh(4 ⟨mean colour, p⟩ / |p|)       paid for by filling the frame with the caption's colour p
    still = exp(−mean|x_{t+1} − x_t| / .01)      paid for by standing still

and, as a second opinion that knows as little of what is wanted,

    smooth = −mean|4 x − its four neighbours|    paid for by blank frames
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from framework.data.shapes import PALETTE, parse_caption
from framework.interfaces import RewardModel
from framework.types import Scores, VideoBatch


def sharpness(pixels: Tensor) -> Tensor:
    """[N] of pixels [N, T, 3, H, W] in [0, 1]."""
    across = (pixels[..., 1:] - pixels[..., :-1]).abs().mean((1, 2, 3, 4))
    down = (pixels[..., 1:, :] - pixels[..., :-1, :]).abs().mean((1, 2, 3, 4))
    return ((across + down) / 0.1).tanh()


def change(pixels: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring frames [N]; NaN for one frame."""
    if pixels.shape[1] < 2:
        return torch.full((len(pixels),), torch.nan)
    return (pixels[:, 1:] - pixels[:, :-1]).abs().mean((1, 2, 3, 4))


def hue_match(pixels: Tensor, colours: Tensor) -> Tensor:
    """[N] of pixels and the captions' colours [N, 3] in [0, 1]."""
    mean = pixels.mean((1, 3, 4))
    return (4 * (mean * colours).sum(1) / colours.norm(dim=1)).tanh()


def roughness(pixels: Tensor) -> Tensor:
    """Mean |Laplacian| [N] of pixels [N, T, 3, H, W] in [0, 1], inner pixels only."""
    centre = pixels[..., 1:-1, 1:-1]
    around = (pixels[..., :-2, 1:-1], pixels[..., 2:, 1:-1], pixels[..., 1:-1, :-2], pixels[..., 1:-1, 2:])
    return (4 * centre - sum(around)).abs().mean((1, 2, 3, 4))


@dataclass(frozen=True)
class Smoothness(RewardModel):
    """smooth: an imperfect auxiliary that disagrees with whoever pays for noise."""

    @property
    def signals(self) -> tuple[str, ...]:
        return ("smooth",)

    @torch.no_grad()
    def score(self, videos: VideoBatch) -> Scores:
        return Scores.of({"smooth": -roughness(videos.frames.cpu().float() / 255)})


@dataclass(frozen=True)
class ShapesProxies(RewardModel):
    """sharp, dyn, hue and still: training signals to be hacked, never evaluation."""

    @property
    def signals(self) -> tuple[str, ...]:
        return ("sharp", "dyn", "hue", "still")

    @torch.no_grad()
    def score(self, videos: VideoBatch) -> Scores:
        pixels = videos.frames.cpu().float() / 255
        colours = torch.tensor([PALETTE[parse_caption(prompt).colour] for prompt in videos.prompts])
        moving = change(pixels)
        return Scores.of(
            {
                "sharp": sharpness(pixels),
                "dyn": (moving / 0.05).tanh(),
                "hue": hue_match(pixels, colours),
                "still": (-moving / 0.01).exp(),
            }
        )
