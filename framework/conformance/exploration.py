"""The promises of an `ExplorationStrategy`: plans are data that depend on (seed, step, group) alone."""

from collections.abc import Sequence

from framework.compatibility import missing_records
from framework.conformance.running import FIRST_GROUP, SCENES, described, names_of, repeatable, require
from framework.interfaces import ExplorationStrategy, StreamingGenerator
from framework.records import Anchors, Endpoints, Transitions
from framework.rng import Streams
from framework.rollout import roll_out
from framework.types import GroupPlan, Scene


def check_exploration(
    exploration: ExplorationStrategy, generator: StreamingGenerator, scenes: Sequence[Scene] = SCENES, seed: int = 0
) -> None:
    """Plans have the promised shape and randomness, and a rollout of them leaves the records that `writes` names.

    scenes: at least two, of one prompt each. Raises Nonconforming.
    """
    name = described(exploration)
    ids = [FIRST_GROUP + 5 * i for i in range(len(scenes))]

    def plan(first: int, stop: int, step: int) -> tuple[GroupPlan, ...]:
        streams = Streams(seed).at("conformance", step)
        return exploration.plan(scenes[first:stop], ids[first:stop], generator.recipe, streams)

    plans = repeatable(f"{name}.plan", lambda: plan(0, len(scenes), 0))
    require(
        isinstance(plans, tuple) and len(plans) == len(scenes), f"{name}.plan must give a tuple of one plan per scene"
    )
    for p, scene, group in zip(plans, scenes, ids, strict=True):
        require(p.scene == scene and p.group == group, f"{name}.plan must keep scenes and group ids in their order")
        _check_branches(name, exploration.group_size, p)
    layouts = {(p.first_block, p.blocks, len(p.branches)) for p in plans}
    require(
        len(layouts) == 1,
        f"{name}.plan must give all groups of a step one window and one size, got (first_block, blocks, branches) "
        f"{sorted(layouts)}",
    )
    first, blocks, _ = layouts.pop()
    require(first >= 0 and blocks >= 1, f"{name}.plan has a window of {blocks} blocks from block {first}")
    seeds = [{p.prefix_seed, *(branch.noise_seed for branch in p.branches)} for p in plans]
    require(
        len(set[int]().union(*seeds)) == sum(map(len, seeds)),
        f"{name}.plan gives two groups the same noise; derive their seeds with streams.derive(…, group)",
    )
    require(plan(1, 2, 0) == plans[1:2], f"{name}.plan of a group depends on the other groups of its step")
    require(plan(0, len(scenes), 1) != plans, f"{name}.plan does not depend on the step; draw from `streams`")
    _check_records(name, exploration, generator, plans)


def _check_branches(name: str, group_size: int, plan: GroupPlan) -> None:
    """Enough branches, not all the same, and an anchor that explores nothing."""
    branches = [branch for branch in plan.branches if not branch.anchor]
    require(
        len(branches) == group_size >= 2,
        f"{name}.group_size={group_size}, and a plan has {len(branches)} branches beside its anchors; both must be the "
        f"same number, at least 2",
    )
    require(
        len({(branch.noise_seed, branch.route) for branch in branches}) > 1,
        f"{name}.plan makes all branches of a group the same clip: give them other seeds or other routes",
    )
    routed = any(branch.anchor and branch.route is not None for branch in plan.branches)
    require(not routed, f"{name}.plan gives an anchor a route; an anchor explores nothing")


def _check_records(
    name: str, exploration: ExplorationStrategy, generator: StreamingGenerator, plans: Sequence[GroupPlan]
) -> None:
    """`writes` names what a rollout leaves, neither more nor less than can be relied on."""
    said = exploration.writes()
    left = frozenset(roll_out(generator, plans, exploration.kernel, said).records)
    if not exploration.kernel.stochastic:
        left = frozenset(kind for kind in left if not issubclass(kind, Transitions))  # steps without a density
    missing = missing_records(said, left)
    require(
        not missing,
        f"{name}.writes names {names_of(missing)}, but a rollout with {type(exploration.kernel).__name__} leaves only "
        f"{names_of(left)}",
    )
    require(Endpoints in said, f"{name}.writes must name Endpoints, which every rollout leaves")
    anchored = any(branch.anchor for plan in plans for branch in plan.branches)
    require(anchored == (Anchors in said), f"{name}.writes must name Anchors exactly if its plans have one")
