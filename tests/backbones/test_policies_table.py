"""What each family of streaming generators shows to each of its blocks, and where: written out, not derived."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import strategies as st

from backbones.history import AnchorWindow, FullHistory, HistoryPolicy, SinkWindow
from backbones.memory_bank import MemoryBank
from backbones.recache import MovedSinkRecache
from backbones.recompute import RecomputedWindow
from framework.types import Route
from tests.backbones.micro import LATENT, PROMPTS, Setting, micro_generator, noise, settings_strategy
from tests.backbones.ways import ATOL, SEEN, gap, streamed
from tests.support import holds, refuted

Shown = tuple[list[int], list[int], list[int]]
"""(visible frames, their positions, positions of the block)."""


def span(first: int, stop: int) -> list[int]:
    return list(range(first, stop))


def absolute(frames: list[int], first: int, length: int = 3) -> Shown:
    return frames, frames, span(first, first + length)


@dataclass(frozen=True)
class Family:
    """A family and what its first blocks of ``length`` frames see; None for blocks that are not looked at."""

    policy: HistoryPolicy
    length: int
    blocks: list[Shown | None]


LONGLIVE = [
    absolute([], 0),
    absolute([0, 1, 2], 3),
    absolute([0, 1, 2, 3, 4, 5], 6),
    absolute([0, 1, 2, 3, 4, 5, 6, 7, 8], 9),
    absolute([0, 1, 2, 6, 7, 8, 9, 10, 11], 12),
    absolute([0, 1, 2, 9, 10, 11, 12, 13, 14], 15),
    absolute([0, 1, 2, 12, 13, 14, 15, 16, 17], 18),
]

FAMILIES = {
    "Self-Forcing, Causal-Forcing chunk-wise, RAVEN: everything": Family(
        FullHistory(),
        3,
        [absolute([], 0), absolute(span(0, 3), 3), absolute(span(0, 6), 6), absolute(span(0, 9), 9)],
    ),
    "Causal-Forcing frame-wise: blocks of one frame": Family(
        FullHistory(),
        1,
        [absolute([], 0, 1), absolute([0], 1, 1), absolute([0, 1], 2, 1), absolute([0, 1, 2], 3, 1)],
    ),
    "LongLive: sink 3, window 12": Family(SinkWindow(3, 12), 3, LONGLIVE),
    "a window without a sink": Family(
        SinkWindow(0, 9),
        3,
        [
            absolute([], 0),
            absolute([0, 1, 2], 3),
            absolute([0, 1, 2, 3, 4, 5], 6),
            absolute([3, 4, 5, 6, 7, 8], 9),
            absolute([6, 7, 8, 9, 10, 11], 12),
        ],
    ),
    "frame-wise behind a sink of 1 and a window of 4": Family(
        SinkWindow(1, 4),
        1,
        [
            absolute([], 0, 1),
            absolute([0], 1, 1),
            absolute([0, 1], 2, 1),
            absolute([0, 1, 2], 3, 1),
            absolute([0, 2, 3], 4, 1),
            absolute([0, 3, 4], 5, 1),
        ],
    ),
    "LongLive infinity, Infinity-RoPE: positions are slots": Family(
        SinkWindow(3, 12, relative=True),
        3,
        [
            ([], [], [0, 1, 2]),
            ([0, 1, 2], [0, 1, 2], [3, 4, 5]),
            ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], [6, 7, 8]),
            ([0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 11]),
            ([0, 1, 2, 6, 7, 8, 9, 10, 11], [0, 1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 11]),
            ([0, 1, 2, 9, 10, 11, 12, 13, 14], [0, 1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 11]),
        ],
    ),
    "Rolling Forcing: an anchor that starts at most 12 positions back": Family(
        AnchorWindow(3, 12, 12),
        3,
        [
            *LONGLIVE[:5],
            ([0, 1, 2, 9, 10, 11, 12, 13, 14], [3, 4, 5, 9, 10, 11, 12, 13, 14], [15, 16, 17]),
            ([0, 1, 2, 12, 13, 14, 15, 16, 17], [6, 7, 8, 12, 13, 14, 15, 16, 17], [18, 19, 20]),
        ],
    ),
    "MemFlow: beside its bank, LongLive": Family(MemoryBank(3, 12), 3, LONGLIVE),
    "Krea realtime: the first frame and the last two, encoded anew, positions are slots": Family(
        RecomputedWindow(3),
        3,
        [
            ([], [], [0, 1, 2]),
            ([0, 1, 2], [0, 1, 2], [3, 4, 5]),
            ([0, 4, 5], [0, 1, 2], [3, 4, 5]),
            ([0, 7, 8], [0, 1, 2], [3, 4, 5]),
        ],
    ),
    "the same with six frames": Family(
        RecomputedWindow(6),
        3,
        [
            ([], [], [0, 1, 2]),
            ([0, 1, 2], [0, 1, 2], [3, 4, 5]),
            ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], [6, 7, 8]),
            ([0, 4, 5, 6, 7, 8], [0, 1, 2, 3, 4, 5], [6, 7, 8]),
            ([0, 7, 8, 9, 10, 11], [0, 1, 2, 3, 4, 5], [6, 7, 8]),
        ],
    ),
    "LongLive after a switch that moved the sink to frames 3 … 5": Family(
        SinkWindow(3, 12, sink_start=3),
        3,
        [*[None] * 5, absolute([3, 4, 5, 9, 10, 11, 12, 13, 14], 15)],
    ),
}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_family_shows_what_its_table_says(family: Family):
    for i, expected in enumerate(family.blocks):
        if expected is None:
            continue
        start = i * family.length
        visible = family.policy.visible(start, family.length)
        keys, queries = family.policy.positions(visible, start, family.length)
        assert (list(visible), list(keys), list(queries)) == expected


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_what_a_family_shows_is_what_its_stream_reads(family: Family):
    generator = micro_generator(replace_bank(family.policy), family.length)
    x = noise(1, 1, LATENT[0], len(family.blocks) * family.length, *LATENT[1:])
    with torch.no_grad():
        stream = generator.open(PROMPTS[:1])
        for expected, block in zip(family.blocks, x.split(family.length, dim=2), strict=True):
            stream = replace(stream, policy=family.policy) if expected is not None else stream
            if expected is not None:
                (visit,) = generator._visits(stream, block, None)
                (only,) = visit.plan.segments
                assert list(visit.past.frames) == expected[0]
                assert list(only.key_positions) == expected[1] + expected[2]
                assert list(only.query_positions) == expected[2]
            keeping = family.policy if family.policy.recomputes else FullHistory()
            stream = generator.commit(block, replace(stream, policy=keeping))


def replace_bank(policy: HistoryPolicy) -> HistoryPolicy:
    """A bank's own frames are the subject of other tests."""
    return policy.beside if isinstance(policy, MemoryBank) else policy


# Routed: some of the frames that a policy shows are others


def test_a_route_shows_its_sink_its_own_frames_and_the_recent_ones():
    route = Route((5, 7, 8, 11, 13, 17), sink=3, recent=3, blocks=2, steps=(True,))
    assert list(route.visible(21)) == [0, 1, 2, 5, 7, 8, 11, 13, 17, 18, 19, 20]
    assert list(route.visible(24)) == [0, 1, 2, 5, 7, 8, 11, 13, 17, 21, 22, 23]
    for policy, expected in (
        (SinkWindow(3, 12), [0, 1, 2, 5, 7, 8, 11, 13, 17, 18, 19, 20]),
        (SinkWindow(3, 12, relative=True), span(0, 12)),
        (MemoryBank(3, 12), [0, 1, 2, 5, 7, 8, 11, 13, 17, 18, 19, 20]),
    ):
        keys, queries = policy.positions(route.visible(21), 21, 3)
        assert list(keys) == expected
        assert list(queries) == ([12, 13, 14] if expected == span(0, 12) else [21, 22, 23])


def test_the_contiguous_route_is_a_plain_window():
    for start in range(12, 40, 3):
        route = Route(tuple(range(start - 9, start - 3)), sink=3, recent=3, blocks=1, steps=(True,))
        assert route.visible(start) == SinkWindow(3, 15).visible(start, 3)


# Equivalences


def in_chunks(start: int, size: int, sink: int, window: int) -> list[int]:
    """RAVEN's rule: chunks j < i with j < sink or i − j ≤ window, the current chunk excluded."""
    i = start // size
    return [f for j in range(i) if j < sink or i - j <= window for f in range(size * j, size * (j + 1))]


def test_ravens_window_in_chunks_is_longlives_window_in_frames():
    for size in (1, 2, 3, 5):
        for sink, window in ((0, 1), (1, 2), (2, 3)):
            policy = SinkWindow(sink * size, (sink + window + 1) * size)
            for start in range(0, 12 * size, size):
                assert list(policy.visible(start, size)) == in_chunks(start, size, sink, window)
    assert SinkWindow(3, 12).visible(21, 3) == tuple(in_chunks(21, 3, 1, 2))
    assert SinkWindow(3, 15).visible(21, 3) != tuple(in_chunks(21, 3, 1, 2))


def test_slots_are_absolute_positions_until_something_between_sink_and_window_is_gone():
    near, far = SinkWindow(3, 12), SinkWindow(3, 12, relative=True)
    for start in range(0, 30, 3):
        seen = near.visible(start, 3)
        assert (near.positions(seen, start, 3) == far.positions(seen, start, 3)) == (start + 3 <= 12)


def distances(policy: HistoryPolicy, visible: Sequence[int], start: int, length: int) -> set[tuple[int, int, int]]:
    """(query frame, key frame, distance): all that a rotation tells."""
    keys, queries = policy.positions(visible, start, length)
    ids = (*visible, *range(start, start + length))
    return {
        (start + i, frame, q - k)
        for i, q in enumerate(queries)
        for frame, k in zip(ids, (*keys, *queries), strict=True)
    }


def check_relative_is_absolute(sink: int, setting: Setting) -> None:
    recent = 6 if setting.window is None else setting.window - setting.sink
    setting = replace(setting, sink=sink, window=sink + recent, streams=1)
    policy = SinkWindow(sink, sink + recent)
    slots = replace(policy, relative=True)
    for start, stop in setting.spans:
        seen = policy.visible(start, stop - start)
        assert distances(policy, seen, start, stop - start) == distances(slots, seen, start, stop - start)
    probes = setting.probes()
    with torch.no_grad():
        out = [streamed(setting, setting.generator(policy=p), probes) for p in (policy, slots)]
    assert gap(*out) < ATOL[torch.float64]


LONG = settings_strategy(min_blocks=4)


def test_without_a_sink_slots_and_absolute_positions_are_the_same_attention():
    holds(lambda setting: check_relative_is_absolute(0, setting), LONG, examples=10)


def test_with_a_sink_slots_clamp_its_distance():
    refuted(lambda setting: check_relative_is_absolute(1, setting), LONG)
    slots = SinkWindow(3, 12, relative=True)
    farthest = [max(d for _, f, d in distances(slots, slots.visible(s, 3), s, 3) if f == 0) for s in range(0, 60, 3)]
    assert farthest == [2, 5, 8, *[11] * 17]


def test_an_anchor_right_before_the_recent_frames_is_a_sink_at_its_slot():
    for start in range(0, 60, 3):
        seen = SinkWindow(3, 12).visible(start, 3)
        slots = distances(SinkWindow(3, 12, relative=True), seen, start, 3)
        assert distances(AnchorWindow(3, 12, 9), seen, start, 3) == slots
        assert (distances(AnchorWindow(3, 12, 12), seen, start, 3) == slots) == (start < 12)
    with pytest.raises(ValueError, match=r"AnchorWindow\.offset=8 .* at least window − block = 9"):
        AnchorWindow(3, 12, 8).positions((), 3, 3)


def test_a_window_that_nothing_leaves_is_the_full_history():
    for start in range(0, 30, 3):
        assert SinkWindow(0, 33).visible(start, 3) == FullHistory().visible(start, 3)
        assert MemoryBank(3, 33).visible(start, 3) == FullHistory().visible(start, 3)


def check_an_empty_bank_is_no_bank(seed: int) -> None:
    """The first block after which a frame is banked sees it twice: until then MemFlow is LongLive."""
    x = noise(seed, 1, LATENT[0], 3, *LATENT[1:])
    found = []
    for policy in (MemoryBank(1, 4, 2, 2), SinkWindow(1, 4)):
        generator = micro_generator(policy, 1)
        stream = generator.open(PROMPTS[:1])
        found.append([generator.predict(x[:, :, :1], 0.5, stream)])
        for frame in range(2):
            stream = generator.commit(x[:, :, [frame]], stream)
            found[-1].append(generator.predict(x[:, :, [frame + 1]], 0.5, stream))
    assert gap(found[0][0], found[1][0]) == 0 and gap(found[0][2], found[1][2]) > SEEN


def test_a_bank_is_seen_beside_the_window():
    with torch.no_grad():
        holds(check_an_empty_bank_is_no_bank, st.integers(0, 100), examples=3)


def test_a_moved_sink_is_the_first_frames_of_the_recached_window():
    for start in (9, 15, 24):
        moved = MovedSinkRecache().moved(SinkWindow(3, 12), start)
        assert moved == SinkWindow(3, 12, sink_start=max(0, start - 12))
