"""Rewards for worker processes; imports little, since a worker imports it too."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from framework.interfaces import RewardModel
from framework.types import Scores, VideoBatch


@dataclass(frozen=True)
class Trouble(RewardModel):
    """`tests.support.Brightness` that does what the frame rate of the clips says. folder: remembers that it died."""

    folder: str = ""

    @property
    def signals(self) -> tuple[str, ...]:
        return ("bright", "red")

    def score(self, videos: VideoBatch) -> Scores:
        mark = Path(self.folder) / "died"
        if videos.fps == 1:
            raise ValueError("one frame per second\nis none")
        if videos.fps == 2:
            raise RuntimeError("no such kernel")
        if videos.fps == 3 or (videos.fps == 4 and not mark.exists()):
            mark.touch()
            os._exit(3)
        if videos.fps == 5:
            time.sleep(60)
        pixels = videos.frames.float() / 255
        return Scores.of({"bright": pixels.mean((1, 2, 3, 4)), "red": pixels[:, :, 0].mean((1, 2, 3))})


@dataclass(frozen=True)
class Unbuildable(Trouble):
    """Has no weights."""

    def __post_init__(self) -> None:
        raise ValueError("the weights are not there:\ndownload them")
