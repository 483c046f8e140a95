"""Videos whose score is known in advance: what a perfect generator would reach, and what a reward must not pay for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from framework.data.shapes import BACKGROUND, CAPTIONS, ClipFactors, parse_caption, render_clips
from framework.interfaces import ControlVideos
from framework.rng import make_generator
from framework.types import Scene, VideoBatch


@dataclass(frozen=True)
class ShapesControls(ControlVideos):
    """Ceiling and floors of the shapes world's reward.

    Ceiling: clean renderings of the scene's own caption. Floors: blank, static, shuffled in time, pixel noise, and
    clean videos of another caption. frames: length of the clips."""

    frames: int = 21
    fps: float = 8.0
    seed: int = 0

    def videos(self, scenes: Sequence[Scene]) -> Mapping[str, VideoBatch]:
        """Raises ValueError for a scene of several prompts."""
        if any(len(scene.segments) > 1 for scene in scenes):
            raise ValueError("ShapesControls renders scenes of one caption; set HeldOut.controls = None for switches")
        random = make_generator(self.seed)
        prompts = [scene.prompt for scene in scenes]
        captions = [parse_caption(prompt) for prompt in prompts]
        clean = render_clips(captions, self.frames, ClipFactors.clean(len(captions)), random)
        # a caption that differs in colour, shape and direction, found by walking the fixed list of all captions
        others = [
            next(o for o in CAPTIONS if o.colour != c.colour and o.shape != c.shape and o.direction != c.direction)
            for c in captions
        ]
        wrong = render_clips(others, self.frames, ClipFactors.clean(len(others)), random)
        shuffle = torch.randperm(self.frames, generator=random)
        clips: dict[str, Tensor] = {
            "ceiling (clean rendering)": clean,
            "wrong caption": wrong,
            "shuffled frames": clean[:, :, shuffle],
            "static": clean[:, :, :1].expand_as(clean),
            "blank": torch.full_like(clean, 2 * BACKGROUND - 1),
            "noise": torch.randn(clean.shape, generator=random),
        }
        return {name: VideoBatch.from_signed(x.transpose(1, 2), self.fps, prompts) for name, x in clips.items()}
