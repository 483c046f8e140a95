"""Subject consistency: how much the frames of a clip keep looking like its first one and like one another.

    s_t = ½ (max(0, ⟨f_t, f_1⟩) + max(0, ⟨f_t, f_{t−1}⟩)),   t = 2 … M          f: unit image features

VBench's form (2311.17982) with DINO features; CLIP's may stand in. In [0, 1]. Known hack: a still image scores 1,
and slower is always better, so that it needs a reward for motion beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from framework.pooling import FramePooling, MeanFrames
from rewards.encoders import ImageEncoder, check_choice
from rewards.frame_sampling import AllFrames, FrameSampling
from rewards.windows import WindowReward, take_frames

Against = Literal["both", "first", "previous"]


def consistency(features: Tensor, against: Against = "both") -> Tensor:
    """s_t [n, M − 1] of unit features [n, M, D]; against: "both", or the first or the previous frame alone."""
    later = features[:, 1:]
    first = (later * features[:, :1]).sum(-1).clamp(min=0)
    previous = (later * features[:, :-1]).sum(-1).clamp(min=0)
    return {"both": (first + previous) / 2, "first": first, "previous": previous}[against]


@dataclass(frozen=True)
class SubjectConsistency(WindowReward):
    """Mean similarity to the first and the previous frame. A window of one frame cannot be scored."""

    encoder: ImageEncoder
    against: Against = "both"
    frames: FrameSampling = field(default_factory=AllFrames)
    pooling: FramePooling = field(default_factory=MeanFrames)
    name: str = "subject_consistency"

    def __post_init__(self) -> None:
        check_choice("SubjectConsistency.against", self.against, ("both", "first", "previous"))

    def _score_spans(self, clips: Tensor, prompts: Sequence[str], fps: float) -> Tensor:
        shown = take_frames(self.frames, clips, prompts, fps)
        if shown.shape[1] < 2:
            return torch.full((1, len(clips)), torch.nan)
        features = self.encoder.embed(shown.flatten(0, 1)).unflatten(0, shown.shape[:2])
        rate = fps * shown.shape[1] / clips.shape[1]
        return self.pooling(consistency(features, self.against), rate)[None]
