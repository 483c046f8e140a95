"""Exploration by history: branches of a group share all noise and differ in which older frames they are shown.

KVPO's causal history routing (2605.14278, sec. 3.1). From a random pivot block on, for a few blocks, a branch sees

    [ sink frames | frames of its own, drawn from older history | most recent frames ]   and the current block,

in the first half of the sampler's steps; what it commits carries the difference on, and after the window every branch
sees the canonical history again. Blocks before the pivot are generated once. An anchor, the last branch of every group,
is shown the canonical history throughout: rewards are compared with it.

Deviations from the release: frames are addressed by id (its slot arithmetic is one block off once the cache rolls),
``recent`` counts history only (its count includes the current block), the sink is never routed away, the pivot is the
same for all groups of a step, and a branch's frames are drawn independently of its siblings'.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import comb

import torch

from framework.interfaces import ExplorationStrategy, GeneratorRecipe
from framework.kernels import Consistency, TransitionKernel
from framework.records import Anchors, Displacements, Endpoints, Record, Transitions
from framework.rng import Streams
from framework.types import BranchPlan, GroupPlan, Route, Scene


def routable(start: int, sink: int, recent: int, resident: int | None = None, since: int = 0) -> tuple[int, ...]:
    """Ids of the frames that a block at ``start`` may be routed to: older than the recent ones, after the sink.

    resident: only the last so many frames are still stored, None for all. since: first frame of the prompt in force.
    """
    oldest = max(sink, since, 0 if resident is None else start - resident)
    return tuple(range(oldest, max(oldest, start - recent)))


def is_route(frames: Sequence[int], pool: Sequence[int], count: int) -> bool:
    """Whether these are ``count`` different ids of the pool: nothing of the sink, the recent frames or the block."""
    return len(frames) == len(set(frames)) == count and set(frames) <= set(pool)


def inclusion_probability(pool: int, frames: int) -> float:
    """How often a frame of a pool of that size is on a uniform route of ``frames`` frames: frames / pool."""
    return frames / pool


class RouteDraw(ABC):
    """How the branches of a group draw their frames from the pool."""

    @abstractmethod
    def draw(self, pool: Sequence[int], frames: int, branches: int, streams: Streams) -> list[tuple[int, ...]]:
        """``frames`` different ids of the pool per branch, ascending."""


@dataclass(frozen=True)
class IndependentDraws(RouteDraw):
    """Uniform without replacement, each branch for itself: the paper's draw."""

    def draw(self, pool: Sequence[int], frames: int, branches: int, streams: Streams) -> list[tuple[int, ...]]:
        return [uniform_route(pool, frames, streams(b)) for b in range(branches)]


@dataclass(frozen=True)
class DistinctDraws(RouteDraw):
    """`IndependentDraws` without twins: siblings share all noise, so equal routes are one clip that counts twice."""

    def draw(self, pool: Sequence[int], frames: int, branches: int, streams: Streams) -> list[tuple[int, ...]]:
        if comb(len(pool), frames) < branches:
            raise ValueError(
                f"a pool of {len(pool)} frames has fewer than {branches} routes of {frames} frames; give it a longer "
                f"history, lower group_size or routed_frames, or set CausalHistoryRouting.draw = IndependentDraws()"
            )
        routes: list[tuple[int, ...]] = []
        for branch in range(branches):
            random = streams(branch)
            route = uniform_route(pool, frames, random)
            while route in routes:
                route = uniform_route(pool, frames, random)
            routes.append(route)
        return routes


def uniform_route(pool: Sequence[int], frames: int, random: torch.Generator) -> tuple[int, ...]:
    """``frames`` different ids of the pool, every choice alike, ascending."""
    return tuple(sorted(pool[i] for i in torch.randperm(len(pool), generator=random)[:frames].tolist()))


@dataclass(frozen=True)
class CyclicWindows(RouteDraw):
    """Windows of one random permutation, shifted by pool // branches: the release's draw. Neighbours overlap."""

    def draw(self, pool: Sequence[int], frames: int, branches: int, streams: Streams) -> list[tuple[int, ...]]:
        order = [pool[i] for i in torch.randperm(len(pool), generator=streams("order")).tolist()]
        return cyclic_windows(order, frames, branches)


def cyclic_windows(order: Sequence[int], frames: int, branches: int) -> list[tuple[int, ...]]:
    """Branch b takes ``frames`` ids of ``order`` from position b · max(1, len // branches) on, wrapping, sorted."""
    shift = max(1, len(order) // branches)
    return [tuple(sorted(order[(b * shift + i) % len(order)] for i in range(frames))) for b in range(branches)]


def refuse_stray_routes(routes: Sequence[Sequence[int]], pool: Sequence[int], count: int, draw: str) -> None:
    """Raises ValueError for a route that repeats a frame or leaves the pool."""
    for frames in routes:
        if not is_route(frames, pool, count):
            raise ValueError(
                f"{draw}.draw gave a branch the frames {list(frames)}; a route is {count} different frames of "
                f"{pool[0]} … {pool[-1]}; correct CausalHistoryRouting.draw"
            )


@dataclass(frozen=True)
class CausalHistoryRouting(ExplorationStrategy):
    """Branches that remember different frames, and an anchor that remembers what it should.

    group_size: routed branches G; the anchor comes on top. routed_frames, recent, sink: a branch's memory in frames.
    The paper's 6 + 3 behind a sink of 3 is a context three frames longer than LongLive's window of 12; 5 + 1 or 3 + 3
    fit it. routed_blocks, tail_blocks: blocks of the window under the route, and after it. stream_blocks: length of the
    stream that the pivot is drawn from, None for the recipe's clip. steps: which sampler steps are routed, None for the
    first half. clean_write: whether committing a routed block sees the route. resident: stored history in frames, None
    for all of it. across_prompts: whether frames from before a prompt switch may be routed to. draw: how branches draw.
    kernel: the sampler's step.
    """

    group_size: int = 8
    routed_frames: int = 6
    recent: int = 3
    sink: int = 3
    routed_blocks: int = 5
    tail_blocks: int = 0
    stream_blocks: int | None = None
    steps: Sequence[bool] | None = None
    clean_write: bool = False
    resident: int | None = None
    across_prompts: bool = False
    draw: RouteDraw = field(default_factory=IndependentDraws)
    kernel: TransitionKernel = field(default_factory=Consistency)

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ValueError(
                f"CausalHistoryRouting.group_size={self.group_size}: a policy over branches needs at least 2"
            )
        for name, low in (("routed_frames", 1), ("recent", 0), ("sink", 0), ("routed_blocks", 1), ("tail_blocks", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"CausalHistoryRouting.{name} must be at least {low}, got {getattr(self, name)}")
        if self.resident is not None and self.resident <= self.routed_frames + self.recent:
            raise ValueError(
                f"CausalHistoryRouting.resident={self.resident} must exceed routed_frames + recent = "
                f"{self.routed_frames + self.recent}, or all branches are routed to the same frames"
            )

    def writes(self) -> frozenset[type[Record]]:
        always: frozenset[type[Record]] = frozenset({Endpoints, Displacements, Anchors})
        return always | {Transitions} if self.kernel.stochastic else always

    def routed_steps(self, recipe: GeneratorRecipe) -> tuple[bool, ...]:
        """The step mask; the first half where none was given. Raises ValueError for a mask of another length."""
        count = len(recipe.schedule.sigmas)
        if self.steps is None:
            return tuple(k < count / 2 for k in range(count))
        if len(self.steps) != count or not any(self.steps):
            raise ValueError(
                f"CausalHistoryRouting.steps needs one flag for each of the sampler's {count} steps, not all False; "
                f"got {tuple(self.steps)}"
            )
        return tuple(bool(s) for s in self.steps)

    def pool(self, scene: Scene, start: int) -> tuple[int, ...]:
        """Frames that the window at ``start`` may be routed to, for a scene whose prompts switch where blocks start."""
        since = 0 if self.across_prompts else scene.segment_at(start).start
        return routable(start, self.sink, self.recent, self.resident, since)

    def pivots(self, scene: Scene, recipe: GeneratorRecipe) -> list[int]:
        """Blocks that the window can start at: a pool larger than a route, and no prompt switch inside the window.

        Raises ValueError when there is none.
        """
        total = recipe.clip_blocks if self.stream_blocks is None else self.stream_blocks
        window, size = self.routed_blocks + self.tail_blocks, recipe.block_frames
        scene = scene.on_blocks(size)
        found = [
            block
            for block in range(total - window + 1)
            if len(self.pool(scene, block * size)) > self.routed_frames
            and scene.segment_at(block * size) == scene.segment_at((block + window) * size - 1)
        ]
        if not found:
            raise ValueError(
                f"CausalHistoryRouting finds no pivot in a stream of {total} blocks of {size} frames: a window of "
                f"{window} blocks needs more than sink + routed_frames + recent = "
                f"{self.sink + self.routed_frames + self.recent} frames before it, of one prompt; raise stream_blocks "
                f"or lower routed_frames, routed_blocks or tail_blocks"
            )
        return found

    def plan(
        self, scenes: Sequence[Scene], groups: Sequence[int], recipe: GeneratorRecipe, streams: Streams
    ) -> tuple[GroupPlan, ...]:
        """One pivot for all groups of the step, so that no rank waits for another's longer prefix."""
        common = set.intersection(*(set(self.pivots(scene, recipe)) for scene in scenes))
        if not common:
            raise ValueError(
                "CausalHistoryRouting finds no pivot that suits all prompts of the step: their switches lie too close; "
                "lower train.prompts_per_step or routed_blocks, or set across_prompts=True"
            )
        eligible = sorted(common)
        pivot = eligible[int(torch.randint(len(eligible), (), generator=streams("pivot")))]
        steps = self.routed_steps(recipe)
        plans = []
        for scene, group in zip(scenes, groups, strict=True):
            pool = self.pool(scene.on_blocks(recipe.block_frames), pivot * recipe.block_frames)
            seed = streams.derive("branch", group)
            routes = self.draw.draw(pool, self.routed_frames, self.group_size, streams.at("route", group))
            refuse_stray_routes(routes, pool, self.routed_frames, type(self.draw).__name__)
            branches = [
                BranchPlan(seed, Route(frames, self.sink, self.recent, self.routed_blocks, steps, self.clean_write))
                for frames in routes
            ]
            plans.append(
                GroupPlan(
                    group=group,
                    scene=scene,
                    first_block=pivot,
                    blocks=self.routed_blocks + self.tail_blocks,
                    prefix_seed=streams.derive("prefix", group),
                    branches=(*branches, BranchPlan(seed, anchor=True)),
                )
            )
        return tuple(plans)
