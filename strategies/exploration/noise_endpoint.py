"""Exploration by noise: the branches of a group share the prompt and a frozen prefix and differ in their noise alone.

Astrolabe (2603.17051, sec. 3.2): the history is rolled once under the behaviour policy and frozen, then G candidates
for the window are decoded from the same cache, x^(i) ~ π_old(· | C, c). With a stochastic kernel every sampler step has
a density too, which is what CM-GRPO reads; the two methods share this class and differ in what they keep.

Streaming long tuning (its Algorithm 2) is this strategy on a stream longer than a clip: each step draws where the
window starts, the same for all groups and ranks, rolls the history up to it once per prompt, and only the window is
decoded, scored and trained on. What is live does not grow with the position but for the prefix's latents.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from framework.arguments import check_counts
from framework.interfaces import ExplorationStrategy, GeneratorRecipe
from framework.kernels import Consistency, TransitionKernel
from framework.records import Endpoints, OnPolicyTransitions, Predictions, Record
from framework.rng import Streams
from framework.types import BranchPlan, GroupPlan, Scene


class WindowLayout(ABC):
    """Where in a stream the window starts."""

    @abstractmethod
    def first_block(self, last: int, random: torch.Generator) -> int:
        """First block of the window, 0 … ``last``, the latest start at which the window still fits."""


@dataclass(frozen=True)
class First(WindowLayout):
    """The window starts the stream: the usual clip."""

    def first_block(self, last: int, random: torch.Generator) -> int:
        return 0


@dataclass(frozen=True)
class Last(WindowLayout):
    """The end of the stream, where drift is largest."""

    def first_block(self, last: int, random: torch.Generator) -> int:
        return last


@dataclass(frozen=True)
class Anywhere(WindowLayout):
    """Any start, uniformly, from block ``earliest`` on."""

    earliest: int = 0

    def first_block(self, last: int, random: torch.Generator) -> int:
        if not 0 <= self.earliest <= last:
            raise ValueError(f"Anywhere.earliest={self.earliest} must lie in 0 … {last}, the latest start that fits")
        return self.earliest + int(torch.randint(last - self.earliest + 1, (), generator=random))


@dataclass(frozen=True)
class OneOf(WindowLayout):
    """One of some starts, uniformly. blocks: first blocks, e.g. those where a released recipe cuts its stream."""

    blocks: Sequence[int]

    def __post_init__(self) -> None:
        if not self.blocks:
            raise ValueError("OneOf.blocks must name at least one start")

    def first_block(self, last: int, random: torch.Generator) -> int:
        outside = [block for block in self.blocks if not 0 <= block <= last]
        if outside:
            raise ValueError(f"OneOf.blocks names {outside}, outside 0 … {last}, the latest start that fits")
        return self.blocks[int(torch.randint(len(self.blocks), (), generator=random))]


@dataclass(frozen=True)
class NoiseEndpoint(ExplorationStrategy):
    """Independent noise per branch behind a shared, frozen prefix.

    group_size: branches G of a prompt. stream_blocks: length of the stream that the window lies in, None for the clip
    length of the generator's recipe. window_blocks: blocks of the window, None for the whole stream. layout: where the
    window starts; the blocks before it are generated once per prompt. kernel: the sampler's step.
    """

    group_size: int = 8
    stream_blocks: int | None = None
    window_blocks: int | None = None
    layout: WindowLayout = field(default_factory=First)
    kernel: TransitionKernel = field(default_factory=Consistency)

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ValueError(
                f"NoiseEndpoint.group_size={self.group_size}: an advantage compares siblings, so it needs at least 2"
            )
        check_counts("NoiseEndpoint.", stream_blocks=self.stream_blocks, window_blocks=self.window_blocks)

    def writes(self) -> frozenset[type[Record]]:
        always: frozenset[type[Record]] = frozenset({Endpoints, Predictions})
        return always | {OnPolicyTransitions} if self.kernel.stochastic else always

    def plan(
        self, scenes: Sequence[Scene], groups: Sequence[int], recipe: GeneratorRecipe, streams: Streams
    ) -> tuple[GroupPlan, ...]:
        total = recipe.clip_blocks if self.stream_blocks is None else self.stream_blocks
        blocks = total if self.window_blocks is None else self.window_blocks
        if blocks > total:
            raise ValueError(
                f"NoiseEndpoint.window_blocks={blocks} does not fit into a stream of {total} blocks; set "
                f"NoiseEndpoint.stream_blocks"
            )
        # one start for all groups of the step: no rank waits for another's longer prefix
        first = self.layout.first_block(total - blocks, streams("window"))
        return tuple(
            GroupPlan(
                group=group,
                scene=scene,
                first_block=first,
                blocks=blocks,
                prefix_seed=streams.derive("prefix", group),
                branches=tuple(BranchPlan(streams.derive("branch", group, b)) for b in range(self.group_size)),
            )
            for scene, group in zip(scenes, groups, strict=True)
        )
