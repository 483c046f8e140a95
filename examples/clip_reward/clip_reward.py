"""A reward from outside: how well frames agree with their prompt, by the CLIP that a folder or the hub holds.

score of a window = mean over some of its frames of ⟨CLIP(frame), CLIP(prompt)⟩, unit vectors
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize
from transformers import CLIPModel, CLIPTokenizer

from framework.interfaces import RewardModel
from framework.types import Scores, VideoBatch, Window

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class PromptMatch(RewardModel):
    """CLIP's cosine of frames and prompt. model: a folder or a name on the hub. frames: looked at in each window."""

    model: str
    frames: int = 4
    network: Any = field(init=False, repr=False, compare=False)
    tokenizer: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise ValueError(f"PromptMatch.frames must be at least 1, got {self.frames}")
        network = CLIPModel.from_pretrained(self.model).eval().requires_grad_(False)
        object.__setattr__(self, "network", network)
        object.__setattr__(self, "tokenizer", CLIPTokenizer.from_pretrained(self.model))

    @property
    def signals(self) -> tuple[str, ...]:
        return ("match",)

    @torch.no_grad()
    def score(self, videos: VideoBatch) -> Scores:
        values = [
            torch.stack([self.of_window(clip, window) for window in windows]).mean()
            for clip, windows in zip(videos.frames, videos.windows, strict=True)
        ]
        return Scores.of({"match": torch.stack(values)})  # a NaN would be invalid; nothing else is

    def of_window(self, clip: Tensor, window: Window) -> Tensor:
        """The score of one span of a clip uint8 [T, 3, H, W] under its own prompt."""
        chosen = torch.linspace(window.start, window.stop - 1, self.frames).round().long().unique()
        text = self.tokenizer([window.prompt], truncation=True, return_tensors="pt")
        # since transformers 5 features come in an output object
        image = self.network.get_image_features(pixel_values=self.pixels(clip[chosen].cpu())).pooler_output
        words = self.network.get_text_features(**text).pooler_output
        return (normalize(image, dim=-1) @ normalize(words, dim=-1).T).mean().cpu()

    def pixels(self, frames: Tensor) -> Tensor:
        """What CLIP takes for frames uint8 [n, 3, H, W]: their middle square, resized and normalised."""
        height, width = frames.shape[-2:]
        side, size = min(height, width), self.network.config.vision_config.image_size
        top, left = (height - side) // 2, (width - side) // 2
        square = frames[..., top : top + side, left : left + side].float() / 255
        resized = interpolate(square, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (torch.tensor(three).view(3, 1, 1) for three in (MEAN, STD))
        return (resized - mean) / std


def contrast(frames: Tensor, fps: float, prompt: str) -> float:
    """A reward can be a plain function of a window too: how much its brightest and darkest pixels differ, 0 to 1."""
    return float(frames.max() - frames.min()) / 255
