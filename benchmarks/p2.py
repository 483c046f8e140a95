"""P2: what it saves to generate the branches of a group as one batch.

a: `roll_out` of a group, the prefix once and its G branches as one batch. b: the same prefix once, then the same
branches one after another behind it. Both share the prefix, so the ratio shows batching alone; branches that also
generated the prefix again would make b larger.
"""

from collections.abc import Mapping
from typing import Any

import torch

from backbones.embedded.generator import CONFIG
from benchmarks.measure import Row, Work, alternate
from benchmarks.scenarios import draw_blocks, group_plan, random_generator, roll_prefix
from framework.kernels import Consistency
from framework.rollout import generate_blocks, roll_out


def sides(config: Mapping[str, Any], prefix: int, window: int, group: int) -> tuple[Work, Work]:
    """(a, b): the same network passes for the same clips, batched and one by one."""
    generator, kernel = random_generator(config), Consistency()
    plan = group_plan(prefix, window, group)

    @torch.no_grad()
    def one_by_one() -> None:
        stream = roll_prefix(generator, plan, kernel)
        for branch in plan.branches:
            noise = draw_blocks(generator, [branch.noise_seed], window, kernel)
            for _ in generate_blocks(generator, stream, noise, kernel):
                pass

    return lambda: roll_out(generator, [plan], kernel), one_by_one


def measure(
    config: Mapping[str, Any] = CONFIG, prefix: int = 3, window: int = 4, group: int = 8, pairs: int = 9
) -> list[Row]:
    """Row P2."""
    ratio = alternate(*sides(config, prefix, window, group), pairs)
    measure = f"G = {group} branches as one batch / one by one, both behind a shared prefix"
    return [Row("P2", measure, ratio.median, 0.5, ratio.spread, note=ratio.note)]
