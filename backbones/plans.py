"""Who attends to whom, as data: an attention plan is a list of segments, built from a history policy.

A segment says: these frames of the sequence (queries) attend to these frames of [past | sequence] (keys), at these
temporal positions. Plain attention per segment replaces dense masks: it works with every attention backend, costs
only what is visible, and is what a KV-cached rollout computes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from backbones.history import HistoryPolicy


@dataclass(frozen=True)
class Segment:
    """Frames of the sequence that attend together.

    queries: indices into the sequence. keys: indices into [past | sequence], past first.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    query_positions: tuple[int, ...]
    key_positions: tuple[int, ...]


@dataclass(frozen=True)
class SegmentBatch:
    """``count`` segments of equal shape, one after another: one batched attention call."""

    count: int
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    query_positions: tuple[int, ...]
    key_positions: tuple[int, ...]


@dataclass(frozen=True)
class AttentionPlan:
    """A sequence of ``frames`` frames behind ``past`` frames of history; the segments' queries partition it."""

    past: int
    frames: int
    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        covered = sorted(i for segment in self.segments for i in segment.queries)
        assert covered == list(range(self.frames)), "the segments of a plan must cover every frame exactly once"

    @cached_property
    def whole(self) -> bool:
        """One segment that reads everything in order: the streaming and the bidirectional case."""
        if len(self.segments) != 1:
            return False
        (only,) = self.segments
        return only.queries == tuple(range(self.frames)) and only.keys == tuple(range(self.past + self.frames))

    @cached_property
    def batches(self) -> tuple[SegmentBatch, ...]:
        """The segments by shape; every layer of every pass reads the same ones."""
        shapes: dict[tuple[int, int], list[Segment]] = {}
        for segment in self.segments:
            shapes.setdefault((len(segment.queries), len(segment.keys)), []).append(segment)
        return tuple(
            SegmentBatch(
                len(group),
                tuple(i for s in group for i in s.queries),
                tuple(i for s in group for i in s.keys),
                tuple(p for s in group for p in s.query_positions),
                tuple(p for s in group for p in s.key_positions),
            )
            for group in shapes.values()
        )

    @cached_property
    def places(self) -> tuple[int, ...]:
        """Where each frame of the sequence stands in the concatenated queries of the batches."""
        order = [frame for batch in self.batches for frame in batch.queries]
        return tuple(sorted(range(self.frames), key=order.__getitem__))


def bidirectional_plan(frames: int) -> AttentionPlan:
    """All frames see all frames at positions 0 … frames − 1: a stock video transformer."""
    everything = tuple(range(frames))
    return AttentionPlan(0, frames, (Segment(everything, everything, everything, everything),))


@lru_cache(maxsize=4096)
def streaming_plan(policy: HistoryPolicy, start: int, length: int) -> tuple[tuple[int, ...], AttentionPlan]:
    """The next block of a stream: (ids of the visible frames, the plan of the block behind exactly those frames)."""
    visible = policy.visible(start, length)
    return visible, block_plan(*policy.positions(visible, start, length))


def block_plan(key_positions: tuple[int, ...], query_positions: tuple[int, ...]) -> AttentionPlan:
    """One block behind frames at ``key_positions``, itself at ``query_positions``."""
    seen, length = len(key_positions), len(query_positions)
    segment = Segment(
        queries=tuple(range(length)),
        keys=tuple(range(seen + length)),
        query_positions=query_positions,
        key_positions=(*key_positions, *query_positions),
    )
    return AttentionPlan(seen, length, (segment,))


@lru_cache(maxsize=4096)
def causal_plan(positions: tuple[int, ...], block: int) -> AttentionPlan:
    """Frames at ``positions`` in blocks of ``block``, the last one perhaps shorter, that see themselves and the blocks
    before."""
    frames = len(positions)
    segments = []
    for first in range(0, frames, block):
        stop = min(first + block, frames)
        own, seen = tuple(range(first, stop)), tuple(range(stop))
        segments.append(Segment(own, seen, positions[first:stop], positions[:stop]))
    return AttentionPlan(0, frames, tuple(segments))


@dataclass(frozen=True)
class PackedBlock:
    """One block of a packed sequence: absolute frames [start, start + length), standing at ``offset`` in it."""

    start: int
    length: int
    offset: int


def packed_plan(
    policy: HistoryPolicy, past: Sequence[int], blocks: Sequence[PackedBlock], *, causal: bool
) -> AttentionPlan:
    """A plan for many blocks at once behind the committed frames ``past`` (ids, in order).

    causal = True: the blocks are consecutive clean ones and later blocks see earlier ones (the clean half of a packed
    sequence, N_i C_i N_{i+1} …). causal = False: each block sees the past that the policy shows it and itself, never
    another block of the sequence (the noisy half; several noisy versions of one block may stand side by side).
    """
    index = {frame: i for i, frame in enumerate(past)}
    if causal:
        index |= {b.start + j: len(past) + b.offset + j for b in blocks for j in range(b.length)}
    segments = []
    for block in blocks:
        visible = policy.visible(block.start, block.length)
        missing = [frame for frame in visible if frame not in index]
        if missing:
            raise KeyError(f"the block at frame {block.start} sees frames {missing}, which are not in the sequence")
        key_positions, query_positions = policy.positions(visible, block.start, block.length)
        own = tuple(range(block.offset, block.offset + block.length))
        segments.append(
            Segment(
                queries=own,
                keys=(*(index[frame] for frame in visible), *(len(past) + i for i in own)),
                query_positions=query_positions,
                key_positions=(*key_positions, *query_positions),
            )
        )
    return AttentionPlan(len(past), sum(b.length for b in blocks), tuple(segments))
