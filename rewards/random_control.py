"""A reward that knows nothing: the control that any claimed gain is compared with."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from framework.interfaces import RewardModel
from framework.rng import make_generator
from framework.types import Scores, VideoBatch


@dataclass(frozen=True)
class RandomReward(RewardModel):
    """U(0, 1) per clip and signal, seeded by the clip's content: repeatable, and unrelated to anything one can see."""

    names: Sequence[str] = ("VQ", "MQ", "TA")

    def __post_init__(self) -> None:
        if not self.names or len(set(self.names)) < len(self.names):
            raise ValueError(f"RandomReward.names must name at least one signal, each once, got {list(self.names)}")

    @property
    def signals(self) -> tuple[str, ...]:
        return tuple(self.names)

    def score(self, videos: VideoBatch) -> Scores:
        rows = []
        for clip in videos.frames.cpu():
            digest = hashlib.blake2b(clip.numpy().tobytes(), digest_size=7).digest()
            rows.append(torch.rand(len(self.names), generator=make_generator(int.from_bytes(digest, "big"))))
        return Scores.of(dict(zip(self.names, torch.stack(rows).unbind(1), strict=True)))
