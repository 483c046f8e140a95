"""The history is an immutable list addressed by frame id, and a policy is one rule on integers."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backbones.history import FullHistory, HistoryPolicy, KVHistory, SinkWindow
from tests.backbones.micro import noise
from tests.backbones.oracle import lowest_recent


@st.composite
def sink_windows(draw) -> SinkWindow:
    sink = draw(st.integers(0, 5))
    return SinkWindow(sink, sink + draw(st.integers(1, 9)), draw(st.booleans()))


def room(policy: SinkWindow) -> int:
    """The longest block a window leaves room for."""
    return policy.window - policy.sink


def kv(frames: int, seed: int, batch: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Two layers of K/V."""
    return [(noise(seed + i, batch, frames, 2, 2, 3), noise(seed + 50 + i, batch, frames, 2, 2, 3)) for i in range(2)]


@settings(deadline=None)
@given(sink_windows(), st.integers(0, 30), st.data())
def test_a_block_sees_the_sink_and_the_end_of_the_past(policy: SinkWindow, start: int, data):
    length = data.draw(st.integers(1, room(policy)))
    low = lowest_recent(start + length, policy.sink, policy.window)
    assert policy.visible(start, length) == tuple(f for f in range(start) if f < policy.sink or f >= low)
    assert len(policy.visible(start, length)) + length <= policy.window or policy.window < policy.sink + length


@settings(deadline=None)
@given(sink_windows(), st.integers(0, 30), st.data())
def test_positions_are_ids_or_ranks(policy: SinkWindow, start: int, data):
    length = data.draw(st.integers(1, room(policy)))
    visible = policy.visible(start, length)
    ids = (*visible, *range(start, start + length))
    keys, queries = policy.positions(visible, start, length)
    assert (*keys, *queries) == (tuple(sorted(ids).index(i) for i in ids) if policy.relative else ids)


def retained_too_little(policy: HistoryPolicy, frames: int = 24, longest: int = 4) -> list[tuple[int, int]]:
    """(frame, start) pairs where a block at or after ``start`` sees a frame that the policy does not retain."""
    return [
        (frame, start)
        for start in range(frames)
        for later in range(start, frames)
        for length in range(1, longest + 1)
        for frame in policy.visible(later, length)
        if frame < start and not policy.retains(frame, start)
    ]


@settings(deadline=None, max_examples=30)
@given(sink_windows())
def test_retains_never_drops_a_frame_that_a_later_block_sees(policy: SinkWindow):
    assert retained_too_little(policy, longest=min(4, room(policy))) == []
    assert retained_too_little(FullHistory()) == []


@dataclass(frozen=True)
class Forgetful(SinkWindow):
    """A planted error: one frame too few is retained."""

    def retains(self, frame: int, start: int) -> bool:
        return frame < self.sink or frame > start - (self.window - self.sink) + 1


def test_the_retention_check_sees_a_policy_that_forgets_one_frame():
    assert retained_too_little(Forgetful(2, 8)) != []


@settings(deadline=None, max_examples=30)
@given(sink_windows(), st.data())
def test_a_policy_history_can_always_show_what_its_policy_sees(policy: SinkWindow, data):
    history = KVHistory()
    for seed in range(8):
        length = data.draw(st.integers(1, min(3, room(policy))))
        history.view(policy.visible(history.next_frame, length))  # raises KeyError for a dropped frame
        history = history.commit(kv(length, seed), policy)


def test_a_forgetful_policy_is_caught_by_the_missing_frame():
    history = KVHistory()
    policy = Forgetful(1, 4)
    with pytest.raises(KeyError, match=r"frames \[\d+\] are not in the history"):
        for seed in range(8):
            history.view(policy.visible(history.next_frame, 1))
            history = history.commit(kv(1, seed), policy)


def test_dropped_and_future_frames_raise_key_error():
    history = KVHistory()
    for seed in range(6):
        history = history.commit(kv(1, seed), SinkWindow(1, 3))
    assert 0 in history.frame_ids and 1 not in history.frame_ids
    for frame in (1, 6):
        with pytest.raises(KeyError, match=rf"frames \[{frame}\] are not in the history"):
            history.view([frame])


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.data())
def test_a_view_reads_the_asked_frames_in_the_asked_order(lengths: list[int], data):
    history, whole = KVHistory(), []
    for seed, length in enumerate(lengths):
        pieces = kv(length, 7 * seed)
        whole.append(pieces)
        history = history.commit(pieces)
    frames = data.draw(st.lists(st.integers(0, sum(lengths) - 1), min_size=1, unique=True))
    for layer in range(2):
        for part in range(2):
            expected = torch.cat([pieces[layer][part] for pieces in whole], 1)[:, frames]
            assert torch.equal(history.view(frames).read(layer)[part], expected)


def test_committing_never_changes_an_older_history():
    first = KVHistory().commit(kv(2, 1))
    kept = replace(first)
    tensors = [t.clone() for pair in first.chunks[0].kv for t in pair]
    second = first.commit(kv(2, 2), SinkWindow(0, 2))
    first.fork(3).commit(kv(1, 3, batch=3))
    assert first == kept and first.next_frame == 2 and second.next_frame == 4
    now = [t for pair in first.chunks[0].kv for t in pair]
    assert all(torch.equal(a, b) for a, b in zip(now, tensors, strict=True))


def test_a_fork_copies_nothing_and_reads_as_repeated_rows():
    trunk = KVHistory().commit(kv(2, 1, batch=2))
    branch = trunk.fork(2).commit(kv(1, 2, batch=4)).fork(3)
    assert branch.chunks[0].kv[0][0].data_ptr() == trunk.chunks[0].kv[0][0].data_ptr()
    k, _ = branch.view([0, 2]).read(0)
    old, new = trunk.chunks[0].kv[0][0][:, :1], branch.chunks[1].kv[0][0]
    assert torch.equal(k, torch.cat([old.repeat_interleave(6, 0), new.repeat_interleave(3, 0)], 1))
    assert not torch.equal(k[:, :1], old.repeat(6, 1, 1, 1, 1))  # another order of branches is seen


@pytest.mark.parametrize(("sink", "window"), [(-1, 3), (3, 3), (4, 2)])
def test_a_window_that_holds_no_block_is_refused(sink: int, window: int):
    with pytest.raises(ValueError, match=r"SinkWindow\.window"):
        SinkWindow(sink, window)


def test_a_block_longer_than_the_window_is_refused():
    with pytest.raises(ValueError, match="too few for a block of 3"):
        SinkWindow(3, 5).visible(0, 3)
