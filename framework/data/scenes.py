"""What to generate at each step: lists of scenes, and the arithmetic that turns (seed, step) into groups."""

import csv
import functools
import io
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from framework.data.scene_files import script_of_line, script_of_record
from framework.data.script import Cue, Script
from framework.data.shapes import split_captions
from framework.rng import check_seed, derive_seed
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
    """The scenes of a file. Equal ones are kept apart by their line number.

    path: a text file, where a line is a prompt or several, ``a [5s] | b``; one that ends in .jsonl, with an object a
    line (for both see `scene_files`; blank lines are ignored); or in .csv, where every row's column ``prompt`` is one
    prompt as it stands. latent_fps: the generator's latent frames per second, for lengths in seconds. switch_frames:
    latent frames at which lists of prompts without lengths switch, e.g. (39, 75, 111) for four. frames: of a clip,
    which such prompts share equally where switch_frames is empty.
    """

    path: str
    latent_fps: float | None = None
    frames: int | None = None
    switch_frames: Sequence[int] = ()

    def scenes(self) -> tuple[Scene, ...]:
        """Raises ValueError for a script with a cut, beside what `scripts` refuses."""
        return tuple(_scene(script, self.path) for script in self.scripts())

    def scripts(self) -> tuple[Script, ...]:
        """The same with cuts, as `generate` shows them. Raises ValueError that names the file and the line."""
        file = Path(self.path)
        if not file.is_file():
            raise ValueError(f"PromptFile.path={self.path!r} is not a file")
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"PromptFile.path={self.path!r} is not UTF-8 text: {error.reason}") from error
        if self.path.endswith(".csv"):
            scripts = [(i, Script(prompt, (Cue(prompt),))) for i, prompt in _column(text, file)]
        else:
            lines = [(i, line.strip()) for i, line in enumerate(text.splitlines()) if line.strip()]
            scripts = [(i, self._script(line, f"{file}:{i + 1}")) for i, line in lines]
        if not scripts:
            raise ValueError(f"PromptFile.path={self.path!r} holds no prompt: the file is empty")
        return tuple(replace(script, key=f"{i}:{script.key}") for i, script in scripts)

    def _script(self, line: str, where: str) -> Script:
        if self.path.endswith(".jsonl"):
            return script_of_record(line, where, self.frames, self.switch_frames)
        return script_of_line(line, where, self.latent_fps, self.frames, self.switch_frames)


def _scene(script: Script, path: str) -> Scene:
    try:
        return script.scene()
    except ValueError as error:
        line = int(script.key.partition(":")[0]) + 1
        raise ValueError(f"{path}:{line}: {error}") from error


def _column(text: str, file: Path) -> Iterator[tuple[int, str]]:
    """(index of the line at which a row ends, its prompt) of a table with a column ``prompt``."""
    rows = csv.DictReader(io.StringIO(text, newline=""))
    try:
        if text.strip() and "prompt" not in (rows.fieldnames or ()):
            raise ValueError(f"{file}:1: the first line must name a column 'prompt', got {rows.fieldnames}")
        for row in rows:
            prompt = " ".join((row["prompt"] or "").split())
            if not prompt:
                raise ValueError(f"{file}:{rows.line_num}: the column 'prompt' is empty")
            yield rows.line_num - 1, prompt
    except csv.Error as error:
        raise ValueError(f"{file}:{rows.line_num}: not a CSV table: {error}") from error


@dataclass(frozen=True)
class Grouped(SceneSource):
    """Scenes of several segments, made of the single prompts of another source.

    source: of scenes with one prompt each. segments: prompts of a scene. segment_frames: latent frames that each of
    them holds. seed: of the order in which prompts meet; all of them are used once, but for a remainder that does not
    fill a scene. rewrite: called once with the prompts of each scene, returns as many texts, e.g. a language model's
    that tell one story: ``@my_plugin.rewrite`` without parentheses for ``def rewrite(prompts, /)``, or an object with
    ``__call__``; None leaves them as they are.
    """

    source: SceneSource
    segments: int = 2
    segment_frames: int = 21
    seed: int = 0
    rewrite: Callable[[Sequence[str]], Sequence[str]] | None = None

    def __post_init__(self) -> None:
        if self.segments < 2 or self.segment_frames < 1:
            raise ValueError(
                f"Grouped.segments must be at least 2 and segment_frames at least 1, got {self.segments} and "
                f"{self.segment_frames}"
            )
        check_seed(self.seed, "Grouped.seed")

    def scenes(self) -> tuple[Scene, ...]:
        """Raises ValueError for a source with switches of its own, too few prompts, or a rewrite that returns another
        number of texts."""
        return self._made

    @functools.cached_property
    def _made(self) -> tuple[Scene, ...]:
        """Made once: a rewriting model is slow, and may answer otherwise when it is asked again."""
        singles = self.source.scenes()
        several = next((scene.key for scene in singles if len(scene.segments) > 1), None)
        if several is not None:
            raise ValueError(f"Grouped.source must give single prompts, but {several!r} switches by itself")
        if len(singles) < self.segments:
            raise ValueError(f"Grouped.segments={self.segments} needs as many prompts, the source has {len(singles)}")
        seed = derive_seed(self.seed, "grouped")
        order = torch.randperm(len(singles), generator=torch.Generator().manual_seed(seed)).tolist()
        groups = [order[i : i + self.segments] for i in range(0, len(order) - self.segments + 1, self.segments)]
        return tuple(self._group(number, [singles[i].prompt for i in group]) for number, group in enumerate(groups))

    def _group(self, number: int, prompts: list[str]) -> Scene:
        texts = prompts if self.rewrite is None else list(self.rewrite(prompts))
        if len(texts) != len(prompts) or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(
                f"Grouped.rewrite must return {len(prompts)} texts for {len(prompts)} prompts, got {texts}"
            )
        segments = tuple(Segment(text.strip(), i * self.segment_frames) for i, text in enumerate(texts))
        return Scene(f"{number}:{' | '.join(segment.prompt for segment in segments)}", segments)


def scene_indices(total: int, step: int, count: int, seed: int) -> list[int]:
    """Which scenes step ``step`` trains on: epoch after epoch, each a fresh shuffle of all ``total`` scenes.

    Pure arithmetic on (seed, step), so every rank and every resumed run agrees; no scene occurs twice in one step while
    ``count`` ≤ ``total``.
    """
    if not 1 <= count <= total:
        raise ValueError(f"train.prompts_per_step={count} must lie in 1 … {total}, the number of training prompts")
    # epochs are cut to whole steps, so that a step never straddles two shuffles and repeats a prompt
    steps_per_epoch = total // count
    epoch, place = divmod(step, steps_per_epoch)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(derive_seed(seed, "epoch", epoch))).tolist()
    return order[place * count : (place + 1) * count]


def draw_scenes(scenes: Sequence[Scene], step: int, count: int, seed: int) -> tuple[list[Scene], list[int]]:
    """(scenes of the step, their group ids, unique over the whole run)."""
    picked = [scenes[i] for i in scene_indices(len(scenes), step, count, seed)]
    return picked, [step * count + i for i in range(count)]
