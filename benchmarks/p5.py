"""P5: what it costs that the candidates of a group share their prefix instead of owning it.

a: G candidates from a shared prefix, i.e. `roll_out` of a group: the prefix once, a fork, and G clips whose past K/V
are stored once and expanded when they are read.
b: the prefix once, alone, plus the G clips computed alone: one batch of G independent streams, in which every clip has
already got a copy of the prefix's K/V and text K/V of its own. Making those copies is not timed, so b is what the same
clips would cost if nothing had to be shared.

Both make the same network calls on the same numbers of frames; the ratio is the price of the fork.
"""

from collections.abc import Mapping
from typing import Any

import torch

from backbones.embedded.generator import CONFIG
from backbones.history import Chunk, KVHistory
from backbones.streaming import WanStream
from benchmarks.measure import Row, Work, alternate
from benchmarks.scenarios import draw_blocks, group_plan, random_generator, roll_prefix
from framework.kernels import Consistency
from framework.rollout import generate_blocks, roll_out


def independent_streams(stream: WanStream, fresh: WanStream) -> WanStream:
    """The fresh streams, each with a copy of its own of the past of a stream of one clip."""
    count = fresh.batch
    chunks = tuple(
        Chunk(
            chunk.start,
            tuple((k.repeat_interleave(count, 0), v.repeat_interleave(count, 0)) for k, v in chunk.kv),
        )
        for chunk in stream.history.chunks
    )
    return WanStream(KVHistory(chunks, (1,) * len(chunks)), fresh.text, count)


def sides(config: Mapping[str, Any], prefix: int, window: int, group: int) -> tuple[Work, Work]:
    """(a, b): the same clips from a shared prefix and from prefixes of their own."""
    generator, kernel = random_generator(config), Consistency()
    plan = group_plan(prefix, window, group)
    with torch.no_grad():
        prompts = [plan.scene.prompt] * group
        owned = independent_streams(roll_prefix(generator, plan, kernel), generator.open(prompts))

    @torch.no_grad()
    def alone() -> None:
        roll_prefix(generator, plan, kernel)
        noise = draw_blocks(generator, [branch.noise_seed for branch in plan.branches], window, kernel)
        object.__setattr__(owned, "view", None)  # the memo of a finished run would save the gathering
        for _ in generate_blocks(generator, owned, noise, kernel):
            pass

    return lambda: roll_out(generator, [plan], kernel), alone


def measure(
    config: Mapping[str, Any] = CONFIG, prefix: int = 3, window: int = 4, group: int = 8, pairs: int = 15
) -> list[Row]:
    """Row P5."""
    ratio = alternate(*sides(config, prefix, window, group), pairs)
    measure = f"G = {group} candidates from a shared prefix / prefix + G clips alone"
    return [Row("P5", measure, ratio.median, 1.05, ratio.spread, note=ratio.note)]
