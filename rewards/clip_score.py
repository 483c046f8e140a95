"""CLIP score: how well frames agree with the prompt, as the cosine of CLIP's image and text features.

    score of a frame = ⟨image, text⟩, unit vectors            2104.08718 clamps at 0 and multiplies by 2.5 or 100

A plain cosine in [−1, 1]. Known hacks: text rendered into the frame, an object that fills it, a still image; it does
not see motion at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from framework.pooling import FramePooling, MeanFrames
from rewards.encoders import ClipEncoder
from rewards.frame_sampling import FrameSampling, StratifiedFrames
from rewards.windows import WindowReward, take_frames


@dataclass(frozen=True)
class ClipScore(WindowReward):
    """Cosine of frames and prompt, window by window. frames: which are looked at. pooling: how they become one."""

    encoder: ClipEncoder
    frames: FrameSampling = field(default_factory=StratifiedFrames)
    pooling: FramePooling = field(default_factory=MeanFrames)
    name: str = "CLIP"

    def _score_spans(self, clips: Tensor, prompts: Sequence[str], fps: float) -> Tensor:
        shown = take_frames(self.frames, clips, prompts, fps)
        distinct = list(dict.fromkeys(prompts))
        texts = self.encoder.embed_texts(distinct)[[distinct.index(prompt) for prompt in prompts]]  # [n, D]
        images = self.encoder.embed(shown.flatten(0, 1)).unflatten(0, shown.shape[:2])  # [n, M, D]
        rate = fps * shown.shape[1] / clips.shape[1]
        return self.pooling((images * texts[:, None]).sum(-1), rate)[None]
