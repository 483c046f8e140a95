"""The past encoded anew for every block: what a dense forward over [shown frames | block] gives, and nothing older."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from backbones.history import HistoryPolicy, SinkWindow
from backbones.plans import bidirectional_plan
from backbones.recache import BlockwiseRecache, NoRecache
from backbones.recompute import RecomputedWindow
from backbones.streaming import WanStream
from backbones.wan.transformer import attend
from framework.types import Probes
from tests.backbones.micro import (
    LATENT,
    PROMPTS,
    MicroGenerator,
    Setting,
    fresh_network,
    micro_generator,
    micro_network,
    noise,
    settings_strategy,
)
from tests.backbones.oracle import Frame, dense_forward
from tests.backbones.ways import ATOL, SEEN, gap, replayed_tail, streamed
from tests.support import close, holds


@st.composite
def rules(draw, min_blocks: int = 1) -> tuple[RecomputedWindow, Setting]:
    rule = RecomputedWindow(draw(st.integers(1, 6)), draw(st.sampled_from([1.0, 0.5])))
    return rule, draw(settings_strategy(min_blocks=min_blocks))


BIASED = RecomputedWindow(4, 0.5), Setting(0, None, False, 2, 10, 2, 1, 2, 2, 3)


def written_out(frames: int, start: int) -> list[int]:
    """Frames that the block at ``start`` is shown."""
    return list(range(start)) if start <= frames else [0, *range(start - frames + 1, start)]


def dense_block(rule: RecomputedWindow, setting: Setting, probes: Probes, s: int, span: tuple[int, int]) -> Tensor:
    """The velocities of one block by the oracle: a key that is listed twice has a logit that is higher by log 2."""
    generator = setting.generator(policy=rule)
    shown, (start, stop) = written_out(rule.frames, span[0]), span
    count, length = len(shown), stop - start
    groups = [(g, min(g + setting.block, count)) for g in range(0, count, setting.block)]
    frames = [Frame(slot, first, last, True) for first, last in groups for slot in range(first, last)]
    frames += [Frame(count + i, count, count + length, False) for i in range(length)]
    sight = [list(range(frame.stop)) for frame in frames[:count]]
    again = [0] * (count > 0) + list(range(count, count + length)) if rule.bias == 0.5 else []
    sight += [[*range(count + length), *again]] * length
    x = torch.cat([probes.clean[:, :, shown], probes.noisy[:, s, :, start:stop]], 2)
    sigma = torch.cat([torch.zeros(len(x), count), probes.sigma[:, s, start:stop]], 1).double()
    text = generator.encode_text(probes.prompts).repeat_interleave(setting.branches, 0)
    weights = dict(generator.network.named_parameters())
    return dense_forward(weights, setting.heads, x, 1000 * sigma, text, frames, sight=sight)[:, :, count:]


def check_dense(drawn: tuple[RecomputedWindow, Setting]) -> None:
    rule, setting = drawn
    probes, generator = setting.probes(), setting.generator(policy=rule)
    with torch.no_grad():
        found = streamed(setting, generator, probes)
        for span in setting.spans:
            for s in range(setting.streams):
                expected = dense_block(rule, setting, probes, s, span)
                assert gap(found[:, s, :, slice(*span)], expected) < ATOL[torch.float64]


def test_a_block_sees_what_one_dense_forward_over_the_shown_frames_and_itself_sees() -> None:
    holds(check_dense, rules(), examples=40)
    check_dense(BIASED)


class AtTheirIds(RecomputedWindow):
    """A planted error: absolute positions."""

    def positions(self, visible: Sequence[int], start: int, length: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return tuple(visible), tuple(range(start, start + length))


class Unbiased(RecomputedWindow):
    """A planted error: the past counts as much as the block."""

    def logit_offsets(self, visible: int) -> None:
        return None


class Everything(RecomputedWindow):
    """A planted error: no frame leaves the window."""

    def visible(self, start: int, length: int) -> tuple[int, ...]:
        return tuple(range(start))

    def retains(self, frame: int, start: int) -> bool:
        return True


class Cached(RecomputedWindow):
    """A planted error: the same frames at the same positions, with the keys of the blocks that they were made in."""

    recomputes = property(lambda self: False)  # pyright: ignore[reportAssignmentType]


@pytest.mark.parametrize("wrong", [AtTheirIds, Unbiased, Everything, Cached])
def test_the_dense_check_sees_another_past(wrong: type[RecomputedWindow]) -> None:
    with pytest.raises(AssertionError):
        check_dense((wrong(4, 0.5), BIASED[1]))


def test_the_dense_check_sees_a_past_whose_frames_all_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backbones.streaming.causal_plan", lambda positions, block: bidirectional_plan(len(positions)))
    with pytest.raises(AssertionError):
        check_dense(BIASED)


def check_replay(dtype: torch.dtype, drawn: tuple[RecomputedWindow, Setting]) -> None:
    rule, setting = drawn
    generator, probes = setting.generator(dtype, rule), setting.probes(dtype=dtype)
    with torch.no_grad():
        assert gap(generator.replay(probes), streamed(setting, generator, probes)) < ATOL[dtype]


def test_replay_equals_the_stream() -> None:
    holds(lambda drawn: check_replay(torch.float64, drawn), rules(), examples=30)
    check_replay(torch.float32, BIASED)


def check_tail(drawn: tuple[RecomputedWindow, Setting]) -> None:
    """Behind a prefix, and where the branches of a group share it."""
    rule, setting = drawn
    generator = setting.generator(policy=rule)
    with torch.no_grad():
        whole, blocks, found, expected = replayed_tail(setting, generator)
        assert gap(found, expected) < ATOL[torch.float64]
        trunk = generator.open(whole.prompts)
        for start, stop in setting.spans[:blocks]:
            trunk = generator.commit(whole.clean[:: setting.branches, :, start:stop], trunk)
        forked = generator.fork(trunk, setting.branches)
        start, stop = setting.spans[blocks]
        sigma = float(whole.sigma[0, 0, start])
        velocity = generator.predict(whole.noisy[:, 0, :, start:stop], sigma, forked)
        assert gap(velocity[0], expected[0, 0, :, : stop - start]) < ATOL[torch.float64]


def test_a_replay_behind_a_prefix_and_a_fork_are_the_tail_of_a_whole_stream() -> None:
    holds(check_tail, rules(min_blocks=2), examples=25)


def answer(rule: HistoryPolicy, x: Tensor) -> tuple[Tensor, WanStream]:
    """(velocity of the last of the blocks of two frames of x, the stream before it)."""
    generator = micro_generator(rule, 2)
    *past, last = x.split(2, dim=2)
    with torch.no_grad():
        stream = generator.open(PROMPTS[:1])
        for block in past:
            stream = generator.commit(block, stream)
        return generator.predict(last, 0.5, stream), stream


@pytest.mark.parametrize("frame", range(1, 9))
def test_nothing_is_left_of_a_frame_that_is_no_longer_shown(frame: int) -> None:
    """Cached keys of later frames still hold something of it."""
    x, other = (noise(seed, 1, LATENT[0], 12, *LATENT[1:]) for seed in (1, 2))
    changed = torch.cat([x[:, :, :frame], other[:, :, frame : frame + 1], x[:, :, frame + 1 :]], 2)
    seen = frame >= 10 - 3
    assert (gap(answer(RecomputedWindow(4), x)[0], answer(RecomputedWindow(4), changed)[0]) > SEEN) == seen
    cached = SinkWindow(1, 6, relative=True)
    assert cached.visible(10, 2) == RecomputedWindow(4).visible(10, 2)
    assert (gap(answer(cached, x)[0], answer(cached, changed)[0]) > 0) == (frame != 2), "through two layers"


def test_a_stream_keeps_the_latents_that_it_can_still_be_shown_and_no_keys() -> None:
    sizes = []
    for frames in (10, 20, 28):
        _, stream = answer(RecomputedWindow(4), noise(1, 1, LATENT[0], frames, *LATENT[1:]).clone())
        sizes.append(sum(pair[0].numel() for chunk in stream.history.chunks for pair in chunk.kv))
        assert stream.history.frame_ids == (0, 1, *range(frames - 6, frames - 2))
    assert len(set(sizes)) == 1


def test_the_past_is_encoded_once_a_block_and_a_commit_asks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator, asked = micro_generator(RecomputedWindow(4), 2), []
    forward = type(generator.network).forward

    def counted(self, x: Tensor, *arguments, **options):
        asked.append(x.shape[2])
        return forward(self, x, *arguments, **options)

    monkeypatch.setattr(type(generator.network), "forward", counted)
    x = noise(1, 1, LATENT[0], 8, *LATENT[1:])
    with torch.no_grad():
        stream = generator.open(PROMPTS[:1])
        for block in x.split(2, dim=2):
            for sigma in (1.0, 0.5):
                generator.predict(block, sigma, stream)
            stream = generator.commit(block, stream)
    assert asked == [2, 2, 2, 2, 2, 4, 2, 2, 4, 2, 2]


def test_what_the_branches_of_a_fork_share_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until they commit blocks of their own; after that, each its own."""
    generator, asked = micro_generator(RecomputedWindow(4), 2), []
    forward = type(generator.network).forward

    def counted(self, x: Tensor, timestep: Tensor, *arguments, **options):
        asked.append(len(x)) if not timestep.any() else None
        return forward(self, x, timestep, *arguments, **options)

    monkeypatch.setattr(type(generator.network), "forward", counted)
    x = noise(1, 6, LATENT[0], 6, *LATENT[1:])
    with torch.no_grad():
        stream = generator.fork(generator.commit(x[::3, :, :2], generator.open(PROMPTS[:2])), 3)
        found = generator.predict(x[:, :, 2:4], 0.5, stream)
        alone = generator.predict(x[4:5, :, 2:4], 0.5, generator.commit(x[3:4, :, :2], generator.open(PROMPTS[1:2])))
        generator.predict(x[:, :, 4:], 0.5, generator.commit(x[:, :, 2:4], stream))
    assert asked == [2, 1, 6] and gap(found[4:5], alone) < ATOL[torch.float64]


def test_after_a_switch_the_stream_is_one_that_always_had_the_new_prompt() -> None:
    generator = micro_generator(RecomputedWindow(4), 2)
    x = noise(1, 2, LATENT[0], 8, *LATENT[1:])
    with torch.no_grad():
        streams = [generator.open(prompts, switches=True) for prompts in (PROMPTS[:2], (PROMPTS[0], PROMPTS[2]))]
        for block in x[:, :, :6].split(2, dim=2):
            streams = [generator.commit(block, stream) for stream in streams]
        switched = generator.switch(streams[0], (None, PROMPTS[2]))
        found, expected, before = (generator.predict(x[:, :, 6:], 0.5, s) for s in (switched, streams[1], streams[0]))
    assert max(gap(found, expected), gap(found[0], before[0])) < ATOL[torch.float64] and gap(found[1], before[1]) > SEEN


def test_branches_are_routed_to_frames_of_their_own() -> None:
    """Each row is the stream whose shown frames are those of its route, in its order."""
    generator = micro_generator(RecomputedWindow(3), 2)
    x, last = noise(1, 1, LATENT[0], 8, *LATENT[1:]), noise(2, 3, LATENT[0], 2, *LATENT[1:])
    routes = [(0, 3, 7), None, (0, 1, 2, 7)]
    with torch.no_grad():
        trunk = generator.open(PROMPTS[:1], resident=8)
        for block in x.split(2, dim=2):
            trunk = generator.commit(block, trunk)
        found = generator.predict(last, 0.5, generator.fork(trunk, 3), routes)
        for row, route in enumerate(routes):
            shown = list((0, 6, 7) if route is None else route)
            wide = micro_generator(RecomputedWindow(9), 2)
            stream = wide.commit(x[:, :, shown], wide.open(PROMPTS[:1]))
            expected = wide.predict(last[[row]], 0.5, stream)
            assert gap(found[[row]], expected) < ATOL[torch.float64]


@pytest.mark.parametrize("attached", [True, False])
def test_gradient_reaches_the_past_if_it_is_asked_for(attached: bool) -> None:
    """The last block is shown the first frame alone; what it says of the weights of the past is all there is."""
    setting = replace(BIASED[1], branches=1, streams=1)
    probes = setting.probes(history_grad=attached)
    probes = replace(probes, clean=probes.clean.requires_grad_())
    network = fresh_network()
    generator = micro_generator(BIASED[0], setting.block, network)
    velocity = generator.replay(probes)
    (gradient,) = torch.autograd.grad(
        velocity[:, :, :, -2:].square().sum(), probes.clean, allow_unused=True, retain_graph=True
    )
    reached = [] if gradient is None else [f for f in range(10) if gradient[:, :, f].abs().max() > 0]
    assert reached == ([0, 5, 6, 7] if attached else [])


def test_checkpointing_changes_no_gradient() -> None:
    found = []
    for checkpointing in (False, True):
        network = fresh_network()
        if checkpointing:
            network.enable_gradient_checkpointing()
        velocity = micro_generator(BIASED[0], 2, network).replay(BIASED[1].probes(history_grad=True))
        velocity.square().mean().backward()
        found.append([p.grad for p in network.parameters() if p.grad is not None])
    for one, other in zip(*found, strict=True):
        close(one, other, atol=1e-12)


def test_an_offset_is_a_key_that_counts_for_more() -> None:
    q, k, v = (noise(seed, 1, length, 2, 4) for seed, length in ((1, 3), (2, 5), (3, 5)))
    twice = [0, 1, 2, 2, 3, 3, 4]
    offsets = torch.tensor([0.0, 0.0, math.log(2), math.log(2), 0.0], dtype=torch.float64)
    close(attend(q, k, v, offsets=offsets), attend(q, k[:, twice], v[:, twice]), atol=1e-12)
    close(attend(q, k, v, "math", offsets), attend(q, k[:, twice], v[:, twice]), atol=1e-12)
    with pytest.raises(ValueError, match="behind a mask"):
        attend(q.float(), k.float(), v.float(), "cudnn", offsets)


def test_what_cannot_be_meant_is_refused() -> None:
    for arguments, said in (((0,), "frames must be at least 1"), ((3, 0.0), "bias must lie in"), ((3, 2.0), "bias")):
        with pytest.raises(ValueError, match=rf"RecomputedWindow\.{said}"):
            RecomputedWindow(*arguments)
    recipe = micro_generator(RecomputedWindow(), 2).recipe
    with pytest.raises(ValueError, match="nothing to recache"):
        MicroGenerator(micro_network(), recipe, RecomputedWindow(), BlockwiseRecache())
    assert MicroGenerator(micro_network(), recipe, RecomputedWindow(), NoRecache()).recache == NoRecache()
