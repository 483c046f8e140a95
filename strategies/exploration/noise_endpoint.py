"""Exploration by noise: the branches of a group share the prompt and a frozen prefix and differ in their noise alone.

Astrolabe (2603.17051, sec. 3.2): the history is rolled once under the behaviour policy and frozen, then G candidates
for the window are decoded from the same cache, x^(i) ~ π_old(· | C, c). With a stochastic kernel every sampler step has
a density too, which is what CM-GRPO reads; the two methods share this class and differ in what they keep.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from framework.interfaces import ExplorationStrategy, GeneratorRecipe
from framework.kernels import Consistency, TransitionKernel
from framework.records import Endpoints, OnPolicyTransitions, Predictions, Record
from framework.rng import Streams
from framework.types import BranchPlan, GroupPlan, Scene


@dataclass(frozen=True)
class NoiseEndpoint(ExplorationStrategy):
    """Independent noise per branch behind a shared, frozen prefix.

    group_size: branches G of a prompt. prefix_blocks: blocks generated once and shared before the window (0: the
    window starts the stream). window_blocks: blocks of the window; None takes the clip length of the generator's
    recipe, less the prefix. kernel: the sampler's step.
    """

    group_size: int = 8
    prefix_blocks: int = 0
    window_blocks: int | None = None
    kernel: TransitionKernel = field(default_factory=Consistency)

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ValueError(
                f"NoiseEndpoint.group_size={self.group_size}: an advantage compares siblings, so it needs at least 2"
            )
        if self.prefix_blocks < 0:
            raise ValueError(f"NoiseEndpoint.prefix_blocks must be 0 or more, got {self.prefix_blocks}")
        if self.window_blocks is not None and self.window_blocks < 1:
            raise ValueError(f"NoiseEndpoint.window_blocks must be at least 1 or None, got {self.window_blocks}")

    def writes(self) -> frozenset[type[Record]]:
        always: frozenset[type[Record]] = frozenset({Endpoints, Predictions})
        return always | {OnPolicyTransitions} if self.kernel.stochastic else always

    def plan(
        self, scenes: Sequence[Scene], groups: Sequence[int], recipe: GeneratorRecipe, streams: Streams
    ) -> tuple[GroupPlan, ...]:
        blocks = recipe.clip_blocks - self.prefix_blocks if self.window_blocks is None else self.window_blocks
        if blocks < 1:
            raise ValueError(
                f"NoiseEndpoint.prefix_blocks={self.prefix_blocks} leaves no window in a clip of "
                f"{recipe.clip_blocks} blocks; set NoiseEndpoint.window_blocks"
            )
        return tuple(
            GroupPlan(
                group=group,
                scene=scene,
                first_block=self.prefix_blocks,
                blocks=blocks,
                prefix_seed=streams.derive("prefix", group),
                branches=tuple(BranchPlan(streams.derive("branch", group, b)) for b in range(self.group_size)),
            )
            for scene, group in zip(scenes, groups, strict=True)
        )
