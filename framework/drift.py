"""Reward along a stream: every block of a judged window scored by itself, so that drift shows as a slope."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from framework.evaluation import HeldOut
from framework.interfaces import GeneratorRecipe, RewardModel, StreamingGenerator
from framework.types import Scores, VideoBatch, Window

AT = "@"
"""Between a signal and the number of the block that it was measured on."""


def block_spans(recipe: GeneratorRecipe, first_block: int, blocks: int) -> tuple[tuple[int, int], ...]:
    """(start, stop) of each block in pixel frames of the window that starts with block ``first_block``."""
    edges = [recipe.pixels_before((first_block + b) * recipe.block_frames) for b in range(blocks + 1)]
    return tuple((start - edges[0], stop - edges[0]) for start, stop in itertools.pairwise(edges))


@dataclass(frozen=True)
class PerBlock(RewardModel):
    """A reward model asked about each block alone: the signal ``VQ`` of block 3 is called ``VQ@3``.

    A block is judged by the prompt of the window that its first frame lies in; it sees no frame of its neighbours, so
    what a model says of motion across a cut is left out. spans: of the blocks, pixel frames. first_block: the number
    of the first one.
    """

    reward: RewardModel
    spans: tuple[tuple[int, int], ...]
    first_block: int = 0

    @property
    def signals(self) -> tuple[str, ...]:
        numbers = range(self.first_block, self.first_block + len(self.spans))
        return tuple(f"{signal}{AT}{number}" for number in numbers for signal in self.reward.signals)

    def score(self, videos: VideoBatch) -> Scores:
        """Raises ValueError when the clips are not as long as the blocks."""
        if videos.frames.shape[1] != self.spans[-1][1]:
            raise ValueError(f"the blocks end at frame {self.spans[-1][1]}, the clips at {videos.frames.shape[1]}")
        values: dict[str, Tensor] = {}
        valid: dict[str, Tensor] = {}
        for number, (start, stop) in enumerate(self.spans, start=self.first_block):
            windows = tuple((Window(0, stop - start, prompt_at(spans, start)),) for spans in videos.windows)
            scores = self.reward.score(VideoBatch(videos.frames[:, start:stop], videos.fps, windows))
            values |= {f"{signal}{AT}{number}": value for signal, value in scores.values.items()}
            valid |= {f"{signal}{AT}{number}": value for signal, value in scores.valid.items()}
        return Scores(values, valid)


def prompt_at(windows: tuple[Window, ...], frame: int) -> str:
    """The prompt of the last window that starts at or before a frame; of the first one where none does."""
    return [windows[0].prompt, *(window.prompt for window in windows if window.start <= frame)][-1]


def judge_blocks(evaluation: HeldOut, generator: StreamingGenerator) -> tuple[dict[str, Tensor], VideoBatch]:
    """(per signal [scenes, members, blocks], the first clip of each scene) of the policy in force.

    The clips are those of `HeldOut.judge`: same scenes, same noise.
    """
    blocks = generator.recipe.clip_blocks if evaluation.blocks is None else evaluation.blocks
    spans = block_spans(generator.recipe, evaluation.first_block, blocks)
    per_block = PerBlock(evaluation.reward, spans, evaluation.first_block)
    result = replace(evaluation, reward=per_block).judge(generator, description="reward per block")
    return stack_blocks(result.scores), result.videos


def stack_blocks(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{"VQ@0": [scenes, members], "VQ@1": …} → {"VQ": [scenes, members, blocks]}, blocks in ascending order."""
    columns: dict[str, dict[int, Tensor]] = {}
    for name, value in scores.items():
        signal, _, number = name.rpartition(AT)
        columns.setdefault(signal, {})[int(number)] = value
    return {signal: torch.stack([found[b] for b in sorted(found)], dim=-1) for signal, found in columns.items()}
