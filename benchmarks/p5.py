"""P5: what it costs that the candidates of a group share their prefix instead of owning it.

a: G candidates from a shared prefix, i.e. `roll_out` of a group: the prefix once, a fork, and G clips whose past K/V
are stored once and expanded when they are read.
b: the prefix once, alone, plus the G clips computed alone: one batch of G independent streams, in which every clip has
already got a copy of the prefix's K/V and text K/V of its own. Making those copies is not timed, so b is what the same
clips would cost if nothing had to be shared.

Both make the same network calls on the same numbers of frames; the ratio is the price of the fork. With routing on,
a's branches are shown 3 + 3 + 3 frames, each its own, and b's clips as many that nobody had to gather: the price of the
fork and of the routes.

Bytes: how many copies of the history that routes can reach are alive in a routed rollout. The history is made longer by
some blocks; the peak of live bytes may grow by the K/V of those blocks once, not once per branch. A fork that copies is
the planted leak.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from backbones.embedded.generator import CONFIG, ShapesGenerator
from backbones.history import KVHistory
from backbones.streaming import WanStream
from backbones.visible import Chunk
from benchmarks.measure import LiveBytes, Row, Work, alternate, storage_bytes
from benchmarks.p2 import plan_of
from benchmarks.scenarios import draw_blocks, random_generator, roll_prefix, routed_plan
from framework.kernels import Consistency
from framework.records import Endpoints
from framework.rollout import generate_blocks, generate_prefix, roll_out


def copied(history: KVHistory, count: int) -> KVHistory:
    """The history of ``count`` streams per row, each with K/V of its own."""
    chunks = tuple(
        Chunk(c.start, tuple((k.repeat_interleave(count, 0), v.repeat_interleave(count, 0)) for k, v in c.kv))
        for c in history.chunks
    )
    return KVHistory(chunks, history.branches)


def sides(
    config: Mapping[str, Any], prefix: int, window: int, group: int, routed_frames: int | None = None
) -> tuple[Work, Work]:
    """(a, b): the same clips from a shared prefix and from prefixes of their own."""
    generator, kernel = random_generator(config), Consistency()
    plan = plan_of(prefix, window, group, routed_frames)
    clips = len(plan.branches)
    with torch.no_grad():
        fresh = generator.open([plan.scene.prompt] * clips)
        owned = replace(fresh, history=copied(roll_prefix(generator, plan, kernel).history, clips))

    @torch.no_grad()
    def alone() -> None:
        roll_prefix(generator, plan, kernel)
        noise = draw_blocks(generator, [branch.noise_seed for branch in plan.branches], window, kernel)
        owned.memo.clear()  # what a finished run gathered would save this one the gathering
        for _ in generate_blocks(generator, owned, noise, kernel):
            pass

    return lambda: roll_out(generator, [plan], kernel), alone


class CopyingFork(ShapesGenerator):
    """The planted leak: every branch gets a cache of its own."""

    def fork(self, stream: WanStream, branches: int) -> WanStream:
        forked = super().fork(stream, branches)
        return replace(forked, history=copied(stream.history, branches))


@torch.no_grad()
def alive_copies(
    config: Mapping[str, Any], prefix: int, longer: int, group: int, kind: type[ShapesGenerator] = ShapesGenerator
) -> tuple[float, str]:
    """(extra bytes of a routed rollout behind a longer prefix, in K/V of the blocks that it is longer by; a note)."""
    generator = kind(random_generator(config).network)
    peaks, stored = [], []
    for blocks in (prefix, longer):
        plan = routed_plan(blocks, 2, group, routed_frames=3)
        trunk, _ = generate_prefix(generator, [plan], Consistency())
        assert isinstance(trunk, WanStream), "a generator continues the kind of stream that it opened"
        stored.append(storage_bytes(t for chunk in trunk.history.chunks for pair in chunk.kv for t in pair))
        with LiveBytes() as counter:
            ends = roll_out(generator, [plan], Consistency())[Endpoints]
        peaks.append(counter.peak - storage_bytes(t for t in (ends.latents, ends.prefix) if t is not None))
    extra, once = peaks[1] - peaks[0], stored[1] - stored[0]
    note = f"{prefix} → {longer} blocks: {extra / 2**20:.2f} MiB more for {once / 2**20:.2f} MiB of K/V"
    return extra / once, note


def measure(
    config: Mapping[str, Any] = CONFIG, prefix: int = 3, window: int = 4, group: int = 8, pairs: int = 15,
    routed_prefix: int = 7, longer: int = 40,
) -> list[Row]:  # fmt: skip
    """Rows P5."""
    ratio = alternate(*sides(config, prefix, window, group), pairs)
    measure = f"G = {group} candidates from a shared prefix / prefix + G clips alone"
    rows = [Row("P5", measure, ratio.median, 1.05, ratio.spread, note=ratio.note)]
    ratio = alternate(*sides(config, routed_prefix, window, group, 3), pairs)
    measure = f"G = {group} routed candidates and their anchor / prefix + {group + 1} clips alone, no route to gather"
    rows.append(Row("P5", measure, ratio.median, 1.10, ratio.spread, note=ratio.note))
    for kind, planted in ((ShapesGenerator, False), (CopyingFork, True)):
        value, note = alive_copies(config, routed_prefix, longer, group, kind)
        what = "copies of the routable history alive at once" + (", planted: a cache per branch" if planted else "")
        rows.append(Row("P5", f"G = {group}, {what}", value, 1.2, note=note, planted=planted))
    return rows
