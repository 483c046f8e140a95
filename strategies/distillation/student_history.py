"""Which clean past a student is asked behind while it is distilled: its own clips, or real ones."""

from dataclasses import dataclass

import torch
from torch import Tensor

from framework.data.scenes import SceneSource, draw_scenes
from framework.distillation_interfaces import ClipSource, StudentHistory
from framework.interfaces import GeneratorRecipe
from framework.rng import Streams


@dataclass(frozen=True)
class SelfRolled(StudentHistory):
    """The student's own clips, as when it is used: training-time test, no data but prompts.

    scenes: where prompts come from, epoch after epoch in a fresh order.
    """

    scenes: SceneSource

    def draw(
        self, count: int, step: int, recipe: GeneratorRecipe, streams: Streams
    ) -> tuple[tuple[str, ...], Tensor | None]:
        drawn, _ = draw_scenes(self.scenes.scenes(), step, count, streams.seed)
        if any(len(scene.segments) > 1 for scene in drawn):
            raise ValueError("SelfRolled.scenes must be scenes of one prompt: a student is distilled without switches")
        return tuple(scene.prompt for scene in drawn), None


@dataclass(frozen=True)
class RealClips(StudentHistory):
    """Clean clips from data stand before every block: teacher forcing, a past that the student never meets in use.

    The blocks themselves are still the student's samples behind that past, so that against `SelfRolled` the past alone
    differs. data: where captions and clips come from.
    """

    data: ClipSource

    def draw(
        self, count: int, step: int, recipe: GeneratorRecipe, streams: Streams
    ) -> tuple[tuple[str, ...], Tensor | None]:
        clips, captions = self.data.sample(count, recipe.clip_blocks * recipe.block_frames, streams("data"))
        if not bool(torch.isfinite(clips).all()):
            raise ValueError(
                f"RealClips.data={type(self.data).__name__} gave a clip that is not finite; check its files"
            )
        return tuple(str(caption) for caption in captions), clips
