"""Aesthetic score: LAION's heads on the unit image features of CLIP ViT-L/14, a guess at how people rate a picture.

Two heads are in use and give different numbers; name the one that you mean:

    "linear"   Linear(768, 1), LAION-Aesthetics V1 (sa_0_4_vit_l_14_linear.pth): RAVEN's, resize "plain"
    "mlp"      768 → 1024 → 128 → 64 → 16 → 1 without activations, V2 (sac+logos+ava1-l14-linearMSE.pth): Astrolabe's

People rated from 1 to 10; the score is ``scale`` times the head's number, a tenth as RAVEN has it. It does not read the
prompt. Known hacks: saturated colour, shallow depth of field, one pretty still image for the whole clip.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from framework.pooling import FramePooling, MeanFrames
from framework.weights import check_tensors
from rewards.encoders import ClipEncoder, check_choice
from rewards.frame_sampling import FrameSampling, StratifiedFrames
from rewards.weight_files import read_weights
from rewards.windows import WindowReward, take_frames


class AestheticHead(nn.Module):
    """The untrained head of a kind on features [.., width], with the parameter names of LAION's files."""

    def __init__(self, kind: Literal["linear", "mlp"], width: int) -> None:
        super().__init__()
        check_choice("AestheticHead.kind", kind, ("linear", "mlp"))
        self.kind, self.width = kind, width
        if kind == "linear":
            self.weight, self.bias = nn.Parameter(torch.zeros(1, width)), nn.Parameter(torch.zeros(1))
        else:  # numbered as in the file: dropout has no weights and yet takes a number
            self.layers = nn.Sequential(
                nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64),
                nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
            )  # fmt: skip

    def forward(self, features: Tensor) -> Tensor:
        """Ratings [n] of unit features [n, width]."""
        if self.kind == "linear":
            return features @ self.weight[0] + self.bias
        return self.layers(features)[:, 0]


def load_head(file: str, kind: Literal["linear", "mlp"], width: int = 768) -> AestheticHead:
    """LAION's head from a .pth or .safetensors file; every tensor has to fit. width: of the features.

    Raises ValueError for a file that is missing, damaged, holds anything but tensors, or belongs to another head.
    """
    head = AestheticHead(kind, width)
    tensors = read_weights(file)
    check_tensors(tensors, head.state_dict(), f"the aesthetic head {file} (kind {kind!r}, width {width})")
    head.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return head.eval().requires_grad_(False)


@dataclass(frozen=True)
class AestheticScore(WindowReward):
    """Mean aesthetic score of some frames, ``scale`` times the head's number. encoder: CLIP ViT-L/14."""

    encoder: ClipEncoder
    head: AestheticHead
    frames: FrameSampling = field(default_factory=StratifiedFrames)
    pooling: FramePooling = field(default_factory=MeanFrames)
    scale: float = 0.1
    name: str = "aesthetic"

    def __post_init__(self) -> None:
        if self.head.width != self.encoder.width:
            raise ValueError(
                f"the aesthetic head reads features of {self.head.width} numbers and the encoder gives "
                f"{self.encoder.width}; LAION's heads belong to CLIP ViT-L/14, which gives 768"
            )

    def _score_spans(self, clips: Tensor, prompts: Sequence[str], fps: float) -> Tensor:
        shown = take_frames(self.frames, clips, prompts, fps)
        rated = self.head(self.encoder.embed(shown.flatten(0, 1))).unflatten(0, shown.shape[:2])
        return self.pooling(self.scale * rated, fps * shown.shape[1] / clips.shape[1])[None]
