"""What to generate at each step: lists of scenes, and the arithmetic that turns (seed, step) into groups."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from framework.data.scene_files import scene_of_line, scene_of_record
from framework.data.shapes import split_captions
from framework.rng import derive_seed
from framework.types import Scene, Segment


class SceneSource(ABC):
    """Where scenes come from."""

    @abstractmethod
    def scenes(self) -> tuple[Scene, ...]:
        """All scenes, in a fixed order."""


@dataclass(frozen=True)
class ShapesCaptions(SceneSource):
    """Captions of the embedded world. held_out: take the captions that RL never sees instead of the others.
    held_out_count: how many of the 144 those are. limit: at most so many, None for all."""

    held_out: bool = False
    held_out_count: int = 24
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"ShapesCaptions.limit must be at least 1, got {self.limit}")

    def scenes(self) -> tuple[Scene, ...]:
        chosen = split_captions(self.held_out_count)[1 if self.held_out else 0]
        return tuple(Scene.single(str(caption)) for caption in chosen[: self.limit])


@dataclass(frozen=True)
class ShapesSwitches(SceneSource):
    """Scenes of the embedded world whose object turns: two captions of one colour and shape and of two directions.

    switch: latent frame of the second caption. held_out, held_out_count: as in `ShapesCaptions`, for both captions, so
    that RL on one side never reads a caption of the other. limit: at most so many, None for all.
    """

    switch: int = 21
    held_out: bool = False
    held_out_count: int = 24
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.switch < 1 or (self.limit is not None and self.limit < 1):
            raise ValueError(f"ShapesSwitches.switch and limit must be at least 1, got {self.switch} and {self.limit}")

    def scenes(self) -> tuple[Scene, ...]:
        known = split_captions(self.held_out_count)[1 if self.held_out else 0]
        pairs = [
            (a, b)
            for a, b in itertools.permutations(known, 2)
            if (a.colour, a.shape) == (b.colour, b.shape) and a.direction != b.direction
        ]
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
        if not pairs:
            raise ValueError(
                f"ShapesSwitches.held_out_count={self.held_out_count} leaves no two captions to switch between"
            )
        return tuple(
            Scene(f"{a} | {b}", (Segment(str(a)), Segment(str(b), self.switch)))
            for a, b in (pairs[i] for i in order[: self.limit])
        )


@dataclass(frozen=True)
class PromptFile(SceneSource):
    """One scene per line of a file; blank lines and surrounding spaces are ignored. Equal scenes are kept apart by
    their line number.

    path: a text file, where a line is a prompt or several, ``a [5s] | b``, or one that ends in .jsonl; for both see
    `scene_files`. latent_fps: the generator's latent frames per second, for lengths in seconds. frames: of a clip,
    which the prompts of a line without lengths share equally.
    """

    path: str
    latent_fps: float | None = None
    frames: int | None = None

    def scenes(self) -> tuple[Scene, ...]:
        file = Path(self.path)
        if not file.is_file():
            raise ValueError(f"PromptFile.path={self.path!r} is not a file")
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except UnicodeDecodeError as error:
            raise ValueError(f"PromptFile.path={self.path!r} is not UTF-8 text: {error.reason}") from error
        read = [(i, self._scene(line, f"{file}:{i + 1}")) for i, line in enumerate(lines) if line]
        scenes = tuple(replace(scene, key=f"{i}:{scene.key}") for i, scene in read)
        if not scenes:
            raise ValueError(f"PromptFile.path={self.path!r} holds no prompt: the file is empty")
        return scenes

    def _scene(self, line: str, where: str) -> Scene:
        if self.path.endswith(".jsonl"):
            return scene_of_record(line, where)
        return scene_of_line(line, where, self.latent_fps, self.frames)


def scene_indices(total: int, step: int, count: int, seed: int) -> list[int]:
    """Which scenes step ``step`` trains on: epoch after epoch, each a fresh shuffle of all ``total`` scenes.

    Pure arithmetic on (seed, step), so every rank and every resumed run agrees; no scene occurs twice in one step while
    ``count`` ≤ ``total``.
    """
    if not 1 <= count <= total:
        raise ValueError(f"prompts_per_step={count} must lie in 1 … {total}, the number of training prompts")
    # epochs are cut to whole steps, so that a step never straddles two shuffles and repeats a prompt
    steps_per_epoch = total // count
    epoch, place = divmod(step, steps_per_epoch)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(derive_seed(seed, "epoch", epoch))).tolist()
    return order[place * count : (place + 1) * count]


def draw_scenes(scenes: Sequence[Scene], step: int, count: int, seed: int) -> tuple[list[Scene], list[int]]:
    """(scenes of the step, their group ids, unique over the whole run)."""
    picked = [scenes[i] for i in scene_indices(len(scenes), step, count, seed)]
    return picked, [step * count + i for i in range(count)]
