"""P2: what it saves to generate the branches of a group as one batch.

a: `roll_out` of a group, the prefix once and its G branches as one batch. b: the same prefix once, then the same
branches one after another behind it. Both share the prefix, so the ratio shows batching alone; branches that also
generated the prefix again would make b larger.

With routing on, G routed branches and the anchor are one batch whose rows read different frames: 3 + 3 behind the sink
are as many as the anchor sees, the paper's 6 + 3 are more, which makes two calls of each routed step.
"""

from collections.abc import Mapping
from typing import Any

import torch

from backbones.embedded.generator import CONFIG
from benchmarks.measure import Row, Work, alternate
from benchmarks.scenarios import draw_blocks, group_plan, random_generator, roll_prefix, routed_plan
from framework.kernels import Consistency
from framework.rollout import generate_blocks, roll_out
from framework.types import GroupPlan


def sides(
    config: Mapping[str, Any], prefix: int, window: int, group: int, routed_frames: int | None = None
) -> tuple[Work, Work]:
    """(a, b): the same network passes for the same clips, batched and one by one. routed_frames: None for noise."""
    generator, kernel = random_generator(config), Consistency()
    plan = plan_of(prefix, window, group, routed_frames)

    @torch.no_grad()
    def one_by_one() -> None:
        stream = roll_prefix(generator, plan, kernel)
        for branch in plan.branches:
            stream.memo.clear()  # what another branch gathered would save this one the gathering
            noise = draw_blocks(generator, [branch.noise_seed], window, kernel)
            for _ in generate_blocks(generator, stream, noise, kernel, [branch.route] if branch.route else ()):
                pass

    return lambda: roll_out(generator, [plan], kernel), one_by_one


def plan_of(prefix: int, window: int, group: int, routed_frames: int | None) -> GroupPlan:
    """A group of branches that differ in their noise, or in their routes."""
    return group_plan(prefix, window, group) if routed_frames is None else routed_plan(
        prefix, window, group, routed_frames
    )  # fmt: skip


def measure(
    config: Mapping[str, Any] = CONFIG, prefix: int = 3, window: int = 4, group: int = 8, pairs: int = 9,
    routed: tuple[int, ...] = (3, 6), routed_prefix: int = 7,
) -> list[Row]:  # fmt: skip
    """Rows P2. routed: frames of a route, a row each."""
    behind = "as one batch / one by one, both behind a shared prefix"
    ratio = alternate(*sides(config, prefix, window, group), pairs)
    rows = [Row("P2", f"G = {group} branches {behind}", ratio.median, 0.5, ratio.spread, note=ratio.note)]
    for frames in routed:
        ratio = alternate(*sides(config, routed_prefix, window, group, frames), pairs)
        what = f"G = {group} routed branches (3 + {frames} + 3 frames) and the anchor {behind}"
        rows.append(Row("P2", what, ratio.median, 0.5, ratio.spread, note=ratio.note))
    return rows
