"""A bank in a stream: a replay makes the same bank again, through forks, gradients, prompt switches and training."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from backbones.history import KVHistory, SinkWindow, kv_frame_bytes
from backbones.memory_bank import Bank, MemoryBank
from backbones.recache import BlockwiseRecache, JointRecache, MovedSinkRecache, NoRecache
from backbones.streaming import WanStream, WanStreamingGenerator
from benchmarks import p1
from benchmarks.measure import storage_bytes
from framework.kernels import Consistency
from framework.records import Predictions
from framework.rollout import roll_out
from framework.selfchecks import replay_deviation
from framework.types import BranchPlan, GroupPlan, Probes, Route, Scene, Segment
from tests.backbones.micro import (
    LATENT,
    PROMPTS,
    MicroGenerator,
    Setting,
    fresh_network,
    micro_generator,
    noise,
)
from tests.backbones.oracle import Frame, dense_forward
from tests.backbones.test_gradients import gradients, relative_gap
from tests.backbones.ways import ATOL, SEEN, gap, replayed_tail, streamed
from tests.support import PROMPTS as CAPTIONS
from tests.support import holds, refuted, tiny_generator

LAYERS = 2
"""Of the micro network."""

# Streams


@st.composite
def bank_settings(draw) -> tuple[MemoryBank, Setting]:
    block = draw(st.integers(1, 2))
    sink = draw(st.integers(0, 2))
    window = draw(st.integers(sink + block, sink + block + 3))
    rule = MemoryBank(sink, window, draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.booleans()))
    setting = Setting(
        sink, window, False, block, block * draw(st.integers(2, 6)), draw(st.sampled_from((1, 2))),
        draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(0, 1000)),
    )  # fmt: skip
    return rule, setting


FULL = (
    MemoryBank(1, 4, 2, 1),
    Setting(1, 4, False, 1, 8, 2, 1, 2, 2, 5),
)
"""A bank that is full from the third block on, behind a sink and a window that roll."""


def check_replay_equals_stream(dtype: torch.dtype, drawn: tuple[MemoryBank, Setting]) -> None:
    rule, setting = drawn
    generator, probes = setting.generator(dtype, rule), setting.probes(dtype=dtype)
    with torch.no_grad():
        assert gap(generator.replay(probes), streamed(setting, generator, probes)) < ATOL[dtype]


def test_replay_equals_the_stream_block_by_block():
    holds(lambda drawn: check_replay_equals_stream(torch.float64, drawn), bank_settings(), examples=25)
    check_replay_equals_stream(torch.float32, FULL)


class Packed(MicroGenerator):
    """A planted error: the window in one packed pass, which cannot know what the bank will hold."""

    def _replay_in_turn(self, probes: Probes, stream: WanStream) -> Tensor:
        history = self._encode_clean(probes, replace(stream, memory=None))
        return self._predict_noisy(probes, replace(stream, history=history, memory=None))


def test_the_replay_check_sees_a_window_that_is_replayed_without_its_bank():
    rule, setting = FULL
    plain, probes = setting.generator(policy=rule), setting.probes()
    packed = Packed(plain.network, plain.recipe, rule)
    with torch.no_grad():
        assert gap(packed.replay(probes), streamed(setting, plain, probes)) > SEEN


def check_prefix(drawn: tuple[MemoryBank, Setting]) -> None:
    rule, setting = drawn
    with torch.no_grad():
        _, _, found, expected = replayed_tail(setting, setting.generator(policy=rule))
        assert gap(found, expected) < ATOL[torch.float64]


def test_a_replay_behind_a_prefix_makes_the_bank_of_the_prefix_again():
    holds(check_prefix, bank_settings(), examples=20)


def test_the_prefix_check_sees_a_stream_that_starts_with_an_empty_bank(monkeypatch: pytest.MonkeyPatch):
    original = WanStreamingGenerator._replay_prefix

    def forgetful(self, probes: Probes) -> WanStream:
        stream = original(self, probes)
        return replace(stream, memory=self.policy.memory(), memo={})

    monkeypatch.setattr(WanStreamingGenerator, "_replay_prefix", forgetful)
    refuted(check_prefix, bank_settings())


def sight_of(rule: MemoryBank, setting: Setting) -> tuple[list[Frame], list[list[int]]]:
    """The frames of [clean | noisy] and what each sees, while no bank is full: the same in all layers."""
    frames = [Frame(f, a, b, clean) for clean in (True, False) for a, b in setting.spans for f in range(a, b)]
    sight = []
    for frame in frames:
        block = frame.start // setting.block
        banked = range(0, block, rule.interval) if rule.interactive else ends_of(block, rule.interval)
        past = SinkWindow(rule.sink, rule.window).visible(frame.start, setting.block)
        own = [i for i, other in enumerate(frames) if (other.start, other.clean) == (frame.start, frame.clean)]
        sight.append([*past, *(b * setting.block for b in banked), *own])
    return frames, sight


def ends_of(block: int, interval: int) -> list[int]:
    """Blocks in the bank of the pipeline for one prompt: the last one of every interval so far."""
    return [min(first + interval, block) - 1 for first in range(0, block, interval)]


def check_dense(drawn: tuple[MemoryBank, Setting]) -> None:
    rule, setting = drawn
    rule = replace(rule, size=-(-len(setting.spans) // rule.interval))  # never full
    setting = replace(setting, prompts=1, branches=1, streams=1)
    generator, probes = setting.generator(policy=rule), setting.probes()
    frames, sight = sight_of(rule, setting)
    x = torch.cat([probes.clean, probes.noisy[:, 0]], 2)
    timestep = torch.cat([torch.zeros_like(probes.sigma[:, 0]), 1000 * probes.sigma[:, 0]], 1)
    weights = dict(generator.network.named_parameters())
    with torch.no_grad():
        text = generator.encode_text(probes.prompts)
        out = dense_forward(weights, setting.heads, x, timestep, text, frames, sight=sight)[:, :, setting.frames :]
        assert gap(streamed(setting, generator, probes)[:, 0], out) < ATOL[torch.float64]


def test_a_block_sees_sink_bank_and_window_as_one_dense_forward_does():
    holds(check_dense, bank_settings(), examples=20)


def test_the_dense_check_sees_a_bank_at_other_positions(monkeypatch: pytest.MonkeyPatch):
    original = Bank.record

    def shifted(self, kv, start, rotate):
        return original(self, kv, start, lambda k, frame: rotate(k, frame + 1))

    monkeypatch.setattr(Bank, "record", shifted)
    refuted(check_dense, bank_settings())


def test_a_fork_shares_the_bank_and_a_clip_is_the_same_in_any_batch():
    rule, setting = FULL
    generator, x = setting.generator(policy=rule), noise(3, 1, LATENT[0], 8, *LATENT[1:])
    with torch.no_grad():
        trunk = generator.open(PROMPTS[:1])
        for block in x[:, :, :5].split(1, dim=2):
            trunk = generator.commit(block, trunk)
        forked = generator.fork(trunk, 3)
        assert forked.memory is trunk.memory
        clips = noise(4, 3, LATENT[0], 4, *LATENT[1:])
        alone = [generator.fork(trunk, 1)] * 3
        for block in clips.split(1, dim=2):
            together = generator.predict(block, 0.6, forked)
            apart = torch.cat([generator.predict(block[[i]], 0.6, stream) for i, stream in enumerate(alone)])
            assert gap(together, apart) < ATOL[torch.float64]
            forked = generator.commit(block, forked)
            alone = [generator.commit(block[[i]], stream) for i, stream in enumerate(alone)]
        frames = forked.recalled().frames  # pyright: ignore[reportOptionalMemberAccess]
        assert frames.shape == (2, 3, 2)


def test_asking_and_committing_change_no_bank():
    rule, setting = FULL
    generator, x = setting.generator(policy=rule), noise(3, 1, LATENT[0], 8, *LATENT[1:])
    with torch.no_grad():
        stream = generator.open(PROMPTS[:1])
        for block in x[:, :, :6].split(1, dim=2):
            stream = generator.commit(block, stream)
        assert stream.memory is not None
        kept, first = (
            [t.clone() for pair in stream.memory.kv for t in pair],
            generator.predict(x[:, :, 6:7], 0.5, stream),
        )
        generator.commit(x[:, :, 7:], generator.commit(x[:, :, 6:7], stream))
        assert all(torch.equal(a, b) for a, b in zip(kept, [t for p in stream.memory.kv for t in p], strict=True))
        assert torch.equal(generator.predict(x[:, :, 6:7], 0.5, replace(stream, memo={})), first)


def test_a_stream_with_a_bank_needs_constant_memory_and_a_slot_keeps_one_frame_alive():
    rule = MemoryBank(2, 8, 3, 2)
    generator = micro_generator(rule, 2)
    sizes, frame = [], kv_frame_bytes(LAYERS, 4, 24, 8)
    with torch.no_grad():
        stream = generator.open(PROMPTS[:1])
        for block in noise(1, 1, LATENT[0], 48, *LATENT[1:]).split(2, dim=2):
            stream = generator.commit(block, stream)
            assert isinstance(stream.memory, Bank) and stream.memory.candidate is not None
            slots = (*stream.memory.slots, stream.memory.candidate)
            bank = storage_bytes(t for slot in slots for pair in slot.kv for t in pair)
            assert bank <= frame * (rule.size + 1)
            sizes.append(stream.history.nbytes + bank)
    assert max(sizes[8:]) <= sizes[8] == frame * (8 + rule.size + 1)


# Gradients


@pytest.mark.parametrize("attached", [True, False])
def test_checkpointing_changes_no_gradient_through_a_bank(attached: bool):
    rule, setting = FULL
    found = []
    for checkpointing in (False, True):
        network = fresh_network()
        if checkpointing:
            network.enable_gradient_checkpointing()
        generator = micro_generator(rule, setting.block, network)
        velocity = generator.replay(setting.probes(history_grad=attached))
        found.append(gradients(setting, network, velocity))
    assert relative_gap(*found) < 1e-12


def test_the_gradient_reaches_the_weights_through_a_banked_frame():
    """Nothing but the bank shows block 2 the first block: no sink, a window of the block itself."""
    setting = replace(FULL[1], sink=0, window=1, frames=2, branches=1, streams=1)
    cut = {}
    for attached in (True, False):
        network = fresh_network()
        generator = micro_generator(MemoryBank(0, 1, 1, 1), 1, network)
        cut[attached] = gradients(setting, network, generator.replay(setting.probes(history_grad=attached)))
    assert relative_gap(cut[True], cut[False]) > 0.01


def test_a_bank_that_was_chosen_without_gradients_is_chosen_again_with_them():
    network = fresh_network()
    generator = micro_generator(FULL[0], 1, network)
    stream = generator.open(PROMPTS[:1])
    for block in noise(1, 1, LATENT[0], 6, *LATENT[1:]).split(1, dim=2):
        stream = generator.commit(block, stream)
    x = noise(2, 1, LATENT[0], 1, *LATENT[1:])
    expected = gradients(FULL[1], network, generator.predict(x, 0.5, replace(stream, memo={})))
    with torch.no_grad():
        generator.predict(x, 0.5, stream)
    # the graph of the commits is gone with the gradients: a fresh one
    stream = generator.open(PROMPTS[:1])
    for block in noise(1, 1, LATENT[0], 6, *LATENT[1:]).split(1, dim=2):
        stream = generator.commit(block, stream)
    with torch.no_grad():
        generator.predict(x, 0.5, stream)
    assert relative_gap(gradients(FULL[1], network, generator.predict(x, 0.5, stream)), expected) < 1e-12


# Prompt switches


class Watched(MicroGenerator):
    """A generator that writes down how many remembered frames each recache pass saw."""

    seen: list[int]

    def _reencode(self, part, history: KVHistory, clean, text, rows, memory=()):
        self.seen.append(memory[0][0].shape[1] if memory else 0)
        return super()._reencode(part, history, clean, text, rows, memory)


def watched(rule: MemoryBank) -> Watched:
    plain = micro_generator(rule, 1)
    generator = Watched(plain.network, plain.recipe, rule)
    generator.recache, generator.seen = JointRecache(), []
    return generator


def check_recache_sees_the_bank(rule: MemoryBank, blocks: int) -> None:
    generator = watched(rule)
    with torch.no_grad():
        stream = generator.open(PROMPTS[:1], switches=True)
        for block in noise(1, 1, LATENT[0], blocks, *LATENT[1:]).split(1, dim=2):
            stream = generator.commit(block, stream)
        before = stream.memory
        stream = generator.switch(stream, PROMPTS[1:2])
        assert generator.seen == [min((blocks - 1) // rule.interval + 1, rule.size)]
        assert isinstance(before, Bank) and isinstance(stream.memory, Bank)
        assert stream.memory.slots is before.slots and stream.memory.candidate is before.candidate
        if before.pointer > rule.size and rule.size > 1:  # the text keys are empty: the oldest slots stay
            after = stream.recalled()
            assert after is not None and torch.equal(after.frames[..., :-1], before.frames[..., : rule.size - 1])


def test_a_recache_pass_sees_the_bank_of_the_next_block_and_leaves_it_as_it_is():
    rules = st.builds(
        MemoryBank, sink=st.just(1), window=st.just(4), size=st.integers(1, 3), interval=st.integers(1, 3),
        interactive=st.booleans(),
    )  # fmt: skip
    holds(check_recache_sees_the_bank, rules, st.integers(1, 9), examples=25)


def test_a_recache_pass_sees_the_bank_as_one_dense_forward_does():
    """Two blocks, a switch, a third: clean 0, clean 1 under the old prompt; 0 and 1 again together; then the block."""
    generator = micro_generator(MemoryBank(0, 4, 1, 2), 1)
    x = noise(1, 1, LATENT[0], 3, *LATENT[1:])
    with torch.no_grad():
        stream = generator.open(PROMPTS[:1], switches=True)
        for frame in range(2):
            stream = generator.commit(x[:, :, [frame]], stream)
        found = generator.predict(x[:, :, 2:], 0.5, generator.switch(stream, PROMPTS[1:2]))
        frames = [Frame(i, i, i + 1, True) for i in (0, 1, 0, 1)] + [Frame(2, 2, 3, False)]
        old, new = generator.encode_text(PROMPTS[:2])
        text = torch.stack([old, old, new, new, new])[None]
        times = torch.tensor([[0.0, 0, 0, 0, 500]]).double()

        def dense(sight: list[list[int]]) -> Tensor:
            weights = dict(generator.network.named_parameters())
            clips = x[:, :, [0, 1, 0, 1, 2]]
            return dense_forward(weights, 2, clips, times, text, frames, sight=sight)[:, :, 4:]

        again = [2, 3, 1]  # both frames under the new prompt, and the bank's one under the old prompt
        assert gap(found, dense([[0], [0, 0, 1], again, again, [2, 3, 1, 4]])) < ATOL[torch.float64]
        assert gap(found, dense([[0], [0, 0, 1], [2, 3], [2, 3], [2, 3, 1, 4]])) > SEEN / 10
        assert gap(found, dense([[0], [0, 0, 1], again, again, [2, 3, 3, 4]])) > SEEN / 10


def test_a_switch_of_some_prompts_leaves_the_others_bit_for_bit():
    generator, x = watched(MemoryBank(1, 4, 2, 1)), noise(1, 2, LATENT[0], 8, *LATENT[1:])
    with torch.no_grad():
        stream = generator.open(PROMPTS[:2], switches=True)
        for block in x[:, :, :6].split(1, dim=2):
            stream = generator.commit(block, stream)
        one = generator.switch(stream, [None, PROMPTS[2]])
        both = generator.switch(stream, [PROMPTS[2], PROMPTS[2]])
        for frame in (6, 7):
            block = x[:, :, [frame]]
            plain, changed, all_new = (generator.predict(block, 0.5, s) for s in (stream, one, both))
            assert gap(changed[:1], plain[:1]) < ATOL[torch.float64] and gap(changed[1:], plain[1:]) > SEEN
            assert gap(changed[1:], all_new[1:]) < ATOL[torch.float64]
            stream, one, both = (generator.commit(block, s) for s in (stream, one, both))


@pytest.mark.parametrize("recache", [JointRecache(), BlockwiseRecache(), NoRecache()])
def test_every_recache_but_the_one_that_moves_the_sink_takes_a_bank(recache):
    generator, x = watched(MemoryBank(1, 4, 2, 1)), noise(1, 1, LATENT[0], 6, *LATENT[1:])
    generator.recache = recache
    with torch.no_grad():
        stream = generator.open(PROMPTS[:1], switches=True)
        for block in x.split(1, dim=2):
            stream = generator.commit(block, stream)
        assert generator.switch(stream, PROMPTS[1:2]).next_frame == 6


def test_a_recache_that_moves_the_sink_refuses_a_bank_in_one_line():
    generator = micro_generator(MemoryBank(1, 4), 1)
    generator.recache = MovedSinkRecache()
    with torch.no_grad(), pytest.raises(ValueError, match=r"MovedSinkRecache knows .* not of MemoryBank"):
        stream = generator.open(PROMPTS[:1], switches=True)
        generator.commit(noise(1, 1, LATENT[0], 1, *LATENT[1:]), stream)


# Rollouts

RULE = MemoryBank(sink=3, window=9, size=2, interval=1)


def group(first_block: int, scene: Scene, routes: Sequence[Route | None] = (None, None)) -> GroupPlan:
    branches = tuple(BranchPlan(10 + i, route) for i, route in enumerate(routes))
    return GroupPlan(0, scene, first_block, 2, 77, branches)


@pytest.mark.parametrize("interactive", [False, True])
def test_a_replay_of_a_rollout_with_branches_and_a_switch_finds_its_velocities(interactive: bool):
    generator = tiny_generator(policy=replace(RULE, interactive=interactive))
    switching = Scene("s", (Segment(CAPTIONS[0]), Segment(CAPTIONS[1], 9)))
    for first, scene in ((0, Scene.single(CAPTIONS[0])), (5, Scene.single(CAPTIONS[1])), (5, switching)):
        tape = roll_out(generator, [group(first, scene)], Consistency(), frozenset({Predictions}))
        assert replay_deviation(generator, tape) < 1e-5


def test_the_rollout_check_sees_a_bank_under_another_rule():
    generator = tiny_generator(policy=RULE)
    tape = roll_out(generator, [group(5, Scene.single(CAPTIONS[0]))], Consistency(), frozenset({Predictions}))
    generator.policy = replace(RULE, size=1)
    assert replay_deviation(generator, tape) > 1e-3


def test_routed_branches_see_their_own_frames_and_the_bank():
    generator = micro_generator(MemoryBank(1, 3, 2, 1), 1)
    x = noise(1, 1, LATENT[0], 6, *LATENT[1:])
    with torch.no_grad():
        stream = generator.open(PROMPTS[:1], resident=6)
        for block in x.split(1, dim=2):
            stream = generator.commit(block, stream)
        forked = generator.fork(stream, 3)
        block = noise(2, 1, LATENT[0], 1, *LATENT[1:]).expand(3, -1, -1, -1, -1)
        canonical = generator.policy.visible(6, 1)
        routed = generator.predict(block, 0.5, forked, [None, (0, 2, 3, 5), canonical])
        plain = generator.predict(block[:1], 0.5, stream)
        assert gap(routed[[0]], plain) < ATOL[torch.float64] and gap(routed[[2]], plain) < ATOL[torch.float64]
        assert gap(routed[[1]], plain) > SEEN
        bare = replace(forked, memory=MemoryBank(1, 3, 2, 1).memory(), memo={})
        assert gap(generator.predict(block, 0.5, bare, [None, (0, 2, 3, 5), canonical])[[1]], routed[[1]]) > SEEN


def test_the_memory_estimate_counts_the_bank():
    plain, banked = (micro_generator(p, 1).dimensions("x").window for p in (SinkWindow(1, 4), MemoryBank(1, 4, 2)))
    assert (plain, banked) == (4, 6)


@pytest.mark.parametrize("method", p1.METHODS)
def test_every_method_trains_on_a_stream_with_a_bank(method: str):
    """The update asks what the rollout saw: velocities of all views are finite, and the policy moves."""
    generator = tiny_generator(policy=RULE, clip_blocks=4)
    trainer = p1.build_trainer(generator, 1, 2, 4, method=p1.METHODS[method])
    before = {name: p.detach().clone() for name, p in trainer.policies.parameters.items()}
    metrics = trainer.step()
    assert all(torch.isfinite(torch.as_tensor(value)).all() for value in metrics.values())
    assert any(not torch.equal(p, before[name]) for name, p in trainer.policies.parameters.items())
