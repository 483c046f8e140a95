"""Streaming behind a cache, packed replay and one dense masked forward agree in values and in gradients."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings

from backbones.history import HistoryPolicy, SinkWindow
from tests.backbones.micro import (
    EVICTING,
    LATENT,
    PROMPTS,
    Setting,
    micro_generator,
    noise,
    settings_strategy,
)
from tests.backbones.ways import ATOL, SEEN, after_prefix, dense, gap, replayed_tail, streamed, with_shared_prefix


@settings(deadline=None, max_examples=40)
@given(settings_strategy())
def test_streaming_packed_replay_and_a_dense_mask_agree(setting: Setting):
    generator, probes = setting.generator(), setting.probes()
    with torch.no_grad():
        packed = generator.replay(probes)
        assert gap(streamed(setting, generator, probes), packed) < ATOL[torch.float64]
        assert gap(dense(setting, generator, probes), packed) < ATOL[torch.float64]


@settings(deadline=None, max_examples=10)
@given(settings_strategy())
def test_streaming_and_packed_replay_agree_in_float32(setting: Setting):
    generator, probes = setting.generator(torch.float32), setting.probes(dtype=torch.float32)
    with torch.no_grad():
        assert gap(streamed(setting, generator, probes), generator.replay(probes)) < ATOL[torch.float32]


@dataclass(frozen=True)
class CurrentBlockNotCounted(SinkWindow):
    """A planted error: the window is taken to exclude the current block."""

    def visible(self, start: int, length: int) -> tuple[int, ...]:
        recent = max(self.sink, start - (self.window - self.sink))
        return (*range(min(self.sink, start)), *range(recent, start))


@dataclass(frozen=True)
class SinkForgotten(SinkWindow):
    """A planted error: sink frames roll out of the window."""

    def visible(self, start: int, length: int) -> tuple[int, ...]:
        return tuple(range(max(0, start + length - self.window), start))


@pytest.mark.parametrize(
    "wrong",
    [
        CurrentBlockNotCounted(2, 6),
        SinkForgotten(2, 6),
        SinkWindow(2, 5),
        SinkWindow(1, 6),
        SinkWindow(2, 6, relative=True),
    ],
    ids=lambda policy: f"{type(policy).__name__}-{policy.sink}-{policy.window}-{policy.relative}",
)
def test_the_comparison_sees_a_wrong_policy(wrong: HistoryPolicy):
    probes = EVICTING.probes()
    generator = EVICTING.generator(policy=wrong)
    with torch.no_grad():
        expected = dense(EVICTING, generator, probes)
        assert gap(generator.replay(probes), expected) > SEEN
        assert gap(streamed(EVICTING, generator, probes), expected) > SEEN


def test_the_comparison_sees_a_history_committed_from_noisy_blocks():
    probes, generator = EVICTING.probes(), EVICTING.generator()
    noisy_history = replace(probes, clean=probes.noisy[:, 0])
    with torch.no_grad():
        assert gap(streamed(EVICTING, generator, noisy_history), dense(EVICTING, generator, probes)) > SEEN


def test_the_comparison_sees_positions_of_another_kind():
    setting = replace(EVICTING, relative=True)
    probes = setting.probes()
    with torch.no_grad():
        relative = setting.generator().replay(probes)
        assert gap(relative, dense(setting, setting.generator(), probes)) < ATOL[torch.float64]
        assert gap(relative, EVICTING.generator().replay(probes)) > SEEN


# Prefix and forks


@settings(deadline=None, max_examples=25)
@given(settings_strategy(min_blocks=2))
def test_replay_behind_a_prefix_is_the_tail_of_a_whole_stream(setting: Setting):
    with torch.no_grad():
        _, _, found, expected = replayed_tail(setting, setting.generator())
        assert gap(found, expected) < ATOL[torch.float64]


def test_the_comparison_sees_a_prefix_that_is_encoded_from_its_visible_frames_only():
    """From the second layer on, K/V depend on frames that have left the window."""
    setting = replace(EVICTING, sink=0, window=4, frames=8)  # each block sees one earlier block
    generator = setting.generator()
    whole = with_shared_prefix(setting, setting.probes(), 3)
    tail = after_prefix(setting, whole, 3)
    assert tail.prefix is not None
    with torch.no_grad():
        visible_only = micro_generator(setting.policy, setting.block)
        shortened = replace(tail, prefix=tail.prefix[:, :, -2:], start=2)  # with sink 0 a shift of all ids is nothing
        assert gap(visible_only.replay(shortened), generator.replay(tail)) > SEEN


def test_a_prefix_that_does_not_end_where_the_window_starts_is_refused():
    tail = after_prefix(EVICTING, with_shared_prefix(EVICTING, EVICTING.probes(), 2), 2)
    for wrong in (replace(tail, prefix=None), replace(tail, start=tail.start + 2)):
        with pytest.raises(ValueError, match=r"Probes\.prefix holds"):
            EVICTING.generator().replay(wrong)


@settings(deadline=None, max_examples=25)
@given(settings_strategy(min_blocks=2))
def test_a_fork_shares_storage_and_equals_an_unforked_rollout(setting: Setting):
    generator = setting.generator()
    blocks = 1 + setting.seed % (len(setting.spans) - 1)
    probes = with_shared_prefix(setting, setting.probes(), blocks)
    with torch.no_grad():
        trunk = generator.open(probes.prompts)
        for start, stop in setting.spans[:blocks]:
            trunk = generator.commit(probes.clean[:: setting.branches, :, start:stop], trunk)
        forked = generator.fork(trunk, setting.branches)
        assert forked.batch == setting.clips
        for old, new in zip(trunk.history.chunks, forked.history.chunks, strict=True):
            for pair, kept in zip(old.kv, new.kv, strict=True):
                assert [t.data_ptr() for t in pair] == [t.data_ptr() for t in kept]
        velocities = []
        for start, stop in setting.spans[blocks:]:
            velocities.append(generator.predict(probes.noisy[:, 0, :, start:stop], 0.6, forked))
            forked = generator.commit(probes.clean[:, :, start:stop], forked)
        everyone = replace(
            probes,
            noisy=probes.noisy[:, :1],
            sigma=torch.full_like(probes.sigma[:, :1], 0.6),
            scenes=tuple(scene for scene in probes.scenes for _ in range(setting.branches)),
        )
        whole = generator.replay(everyone)[:, 0, :, setting.spans[blocks - 1][1] :]
        assert gap(torch.cat(velocities, 2), whole) < ATOL[torch.float64]


def test_the_fork_comparison_sees_branches_in_the_wrong_order():
    generator = EVICTING.generator()
    prompts = PROMPTS[:2]
    with torch.no_grad():
        stream = generator.open(prompts)
        stream = generator.commit(noise(1, 2, LATENT[0], 2, *LATENT[1:]), stream)
        x = noise(2, 1, LATENT[0], 2, *LATENT[1:]).expand(4, -1, -1, -1, -1)
        forked = generator.predict(x, 0.5, generator.fork(stream, 2))
        alone = generator.predict(x[:2], 0.5, stream)
    assert gap(forked, alone[[0, 0, 1, 1]]) < ATOL[torch.float64]
    assert gap(forked, alone[[0, 1, 0, 1]]) > SEEN


# Streams are values


def test_asking_and_committing_change_no_stream():
    generator = EVICTING.generator()
    x = noise(5, 1, LATENT[0], 6, *LATENT[1:])
    with torch.no_grad():
        stream = generator.commit(x[:, :, :2], generator.open(PROMPTS[:1]))
        kept = [t.clone() for chunk in stream.history.chunks for pair in chunk.kv for t in pair]
        before = generator.predict(x[:, :, 2:4], 0.5, stream)
        later = generator.commit(x[:, :, 2:4], stream)
        generator.predict(x[:, :, 4:], 0.5, later)
        generator.commit(x[:, :, 4:], later)
        assert torch.equal(generator.predict(x[:, :, 2:4], 0.5, stream), before)
        assert stream.next_frame == 2 and later.next_frame == 4
        tensors = [t for chunk in stream.history.chunks for pair in chunk.kv for t in pair]
        assert all(torch.equal(a, b) for a, b in zip(tensors, kept, strict=True))


@settings(deadline=None, max_examples=15)
@given(settings_strategy(min_blocks=3))
def test_a_stream_keeps_no_more_frames_than_its_policy_can_show(setting: Setting):
    generator = setting.generator()
    x = noise(1, 1, LATENT[0], 3 * setting.frames, *LATENT[1:])
    with torch.no_grad():
        stream = generator.open(PROMPTS[:1])
        for block in x.split(setting.block, dim=2):
            stream = generator.commit(block, stream)
    if setting.window is not None:
        # whole chunks are dropped: the last one always stays, the sink and the oldest visible one may be cut
        assert len(stream.history.frame_ids) <= setting.window + 3 * setting.block


def test_asking_for_a_block_of_another_length_does_not_change_what_is_committed():
    generator = micro_generator(SinkWindow(0, 4), 2)
    x = noise(5, 1, LATENT[0], 8, *LATENT[1:])
    with torch.no_grad():
        stream = generator.open(PROMPTS[:1])
        for block in x[:, :, :4].split(2, dim=2):
            stream = generator.commit(block, stream)
        fresh = generator.commit(x[:, :, 4:6], stream)
        generator.predict(x[:, :, 4:5], 0.5, stream)  # sees frames 1 … 3, a block of two sees 2 and 3
        after = generator.commit(x[:, :, 4:6], stream)
        expected, found = (generator.predict(x[:, :, 6:], 0.5, s) for s in (fresh, after))
    assert torch.equal(found, expected)
