"""What the tests of routed rollouts share: a tiny routing, plans at a chosen pivot, and their rollout."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from backbones.history import HistoryPolicy, SinkWindow
from framework.kernels import Consistency
from framework.records import Anchors, Displacements, Endpoints, Record, Transitions
from framework.rng import Streams
from framework.rollout import roll_out
from framework.types import GroupPlan, Scene, Tape
from strategies.exploration.causal_history_routing import CausalHistoryRouting
from tests.support import PROMPTS, tiny_generator

ROUTING = CausalHistoryRouting(
    group_size=3, routed_frames=2, recent=2, sink=1, routed_blocks=2, tail_blocks=1, stream_blocks=8
)
WINDOW = SinkWindow(sink=1, window=7)
"""Of the canonical history: sink, three recent frames, the block. It rolls from the third block on."""
PIVOTS = {"before the window rolls": 2, "after it has rolled": 5}
KEPT = frozenset({Displacements, Anchors, Transitions, Endpoints})


def plans_at(pivot: int, routing: CausalHistoryRouting = ROUTING, groups: int = 2, seed: int = 1) -> list[GroupPlan]:
    """Plans whose window starts at this block and ends the stream."""
    recipe = tiny_generator().recipe
    short = replace(routing, stream_blocks=pivot + routing.routed_blocks + routing.tail_blocks)
    scenes = [Scene.single(prompt) for prompt in PROMPTS[:groups]]
    drawn = (short.plan(scenes, list(range(3, 3 + groups)), recipe, Streams(s)) for s in range(seed, seed + 200))
    return list(next(plans for plans in drawn if plans[0].first_block == pivot))


def rerouted(plans: Sequence[GroupPlan], **changed) -> list[GroupPlan]:
    """The same plans with something changed in every route."""
    return [
        replace(
            plan,
            branches=tuple(replace(b, route=b.route and replace(b.route, **changed)) for b in plan.branches),
        )
        for plan in plans
    ]


def rolled(
    plans: Sequence[GroupPlan],
    policy: HistoryPolicy = WINDOW,
    keep: frozenset[type[Record]] = KEPT,
    dtype: torch.dtype = torch.float64,
) -> Tape:
    return roll_out(tiny_generator(dtype, policy=policy), plans, Consistency(), keep)
