"""A switch brings what the next block sees under the new prompt, and touches nothing else."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from backbones.history import HistoryPolicy, KVHistory, SinkWindow
from backbones.recache import BlockwiseRecache, JointRecache, MovedSinkRecache, NoRecache, Recache
from backbones.streaming import WanStream
from tests.backbones.micro import LATENT, PROMPTS, MicroGenerator, Setting, noise, settings_strategy
from tests.backbones.oracle import Frame, dense_forward
from tests.backbones.ways import gap
from tests.support import holds, refuted

OLD, NEW, OTHER = PROMPTS
ATOL = 1e-10


def generator_of(setting: Setting, recache: Recache) -> MicroGenerator:
    generator = setting.generator()
    generator.recache = recache
    return generator


def latents(setting: Setting, clips: int = 1, seed: int = 0) -> Tensor:
    return noise(setting.seed + seed, clips, LATENT[0], setting.frames, *LATENT[1:])


def committed(generator: MicroGenerator, x: Tensor, prompts: list[str], block: int) -> WanStream:
    stream = generator.open(prompts, switches=True)
    for part in x.split(block, dim=2):
        stream = generator.commit(part, stream)
    return stream


def asked(generator: MicroGenerator, stream: WanStream, block: int, clips: int = 1) -> Tensor:
    return generator.predict(noise(99, clips, LATENT[0], block, *LATENT[1:]), 0.7, stream)


def whole_blocks(setting: Setting) -> Setting:
    return replace(setting, frames=setting.block * len(setting.spans))


SETTINGS = settings_strategy(min_blocks=2).map(whole_blocks)


TORN = Setting(1, 8, False, 3, 6, 1, 1, 1, 1, 0)
"""The first block is shown without its middle frame: one end is the sink, the other still in the window."""


# Blockwise: clean passes over the visible frames, under the new prompt


def replayed(setting: Setting, x: Tensor) -> Tensor:
    """The next block behind the visible frames as if they alone had ever been, by one dense forward."""
    start, stop = setting.frames, setting.frames + setting.block
    seen = setting.policy.visible(start, setting.block)
    spans = {f: next(s for s in setting.spans if s[0] <= f < s[1]) for f in seen}
    frames = [Frame(f, *spans[f], True) for f in seen] + [Frame(f, start, stop, False) for f in range(start, stop)]
    block = noise(99, 1, LATENT[0], setting.block, *LATENT[1:])
    times = torch.tensor([0.0] * len(seen) + [700.0] * setting.block).double()[None]
    generator = setting.generator()
    out = dense_forward(
        dict(generator.network.named_parameters()), setting.heads, torch.cat([x[:, :, list(seen)], block], 2), times,
        generator.encode_text([NEW]), frames, setting.sink, setting.window, setting.relative,
    )  # fmt: skip
    return out[:, :, len(seen) :]


def check_blockwise(recache: Recache, setting: Setting) -> None:
    x = latents(setting)
    generator = generator_of(setting, recache)
    with torch.no_grad():
        stream = generator.switch(committed(generator, x, [OLD], setting.block), [NEW])
        assert gap(asked(generator, stream, setting.block), replayed(setting, x)) < ATOL


def test_a_blockwise_recache_is_the_replay_of_the_visible_frames_under_the_new_prompt():
    holds(lambda setting: check_blockwise(BlockwiseRecache(), setting), SETTINGS, examples=25)
    check_blockwise(BlockwiseRecache(), TORN)


@pytest.mark.parametrize("wrong", [NoRecache(), JointRecache()], ids=["text only", "joint"])
def test_the_replay_check_sees_another_recache(wrong: Recache):
    refuted(lambda setting: check_blockwise(wrong, setting), SETTINGS)


def check_fresh(recache: Recache, setting: Setting) -> None:
    """While everything is visible: bit for bit the stream that was opened with the new prompt."""
    setting = replace(setting, window=None)
    x, generator = latents(setting), generator_of(setting, recache)
    with torch.no_grad():
        switched = generator.switch(committed(generator, x, [OLD], setting.block), [NEW])
        fresh = committed(generator, x, [NEW], setting.block)
    assert same_history(switched.history, fresh.history)


def same_history(left: KVHistory, right: KVHistory) -> bool:
    if [c.start for c in left.chunks] != [c.start for c in right.chunks] or left.branches != right.branches:
        return False
    pairs = zip(tensors(left), tensors(right), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def tensors(history: KVHistory) -> list[Tensor]:
    return [t for chunk in history.chunks for pair in chunk.kv for t in pair]


def test_a_blockwise_recache_of_a_whole_stream_is_a_stream_opened_with_the_new_prompt():
    holds(lambda setting: check_fresh(BlockwiseRecache(), setting), SETTINGS, examples=15)


def test_the_fresh_stream_check_sees_a_joint_pass():
    refuted(lambda setting: check_fresh(JointRecache(), setting), SETTINGS)


def test_a_switch_to_the_same_prompt_changes_nothing_blockwise_and_much_jointly():
    setting = Setting(2, None, False, 2, 6, 2, 1, 1, 1, 5)
    for recache, unchanged in ((BlockwiseRecache(), True), (NoRecache(), True), (JointRecache(), False)):
        generator = generator_of(setting, recache)
        with torch.no_grad():
            stream = committed(generator, latents(setting), [OLD], 2)
            again = generator.switch(stream, [OLD])
        assert same_history(stream.history, again.history) == unchanged


# What is stored under which prompt


def changed_frames(before: KVHistory, after: KVHistory) -> set[int]:
    """Resident frames whose keys or values moved."""
    common = [f for f in after.frame_ids if f in before.frame_ids]
    (old, _), (new, _) = before.view(common).read(1), after.view(common).read(1)
    return {frame for i, frame in enumerate(common) if not torch.equal(old[:, i], new[:, i])}


STORED = [  # recache, window, sink, frames so far, frames that are encoded again
    (JointRecache(), 6, 2, 8, {5, 6, 7}),  # frame 4 = start − (window − sink) is never seen again
    (JointRecache(), 6, 2, 6, {0, 1, 3, 4, 5}),  # and frame 2 neither
    (JointRecache(), 6, 0, 8, {3, 4, 5, 6, 7}),
    (JointRecache(), 2, 0, 8, {7}),
    (JointRecache(), None, 0, 8, set(range(8))),
    (BlockwiseRecache(), 6, 2, 8, {0, 1, 6, 7}),
    (BlockwiseRecache(), None, 0, 8, set(range(8))),
    (NoRecache(), 6, 2, 8, set()),
]


@pytest.mark.parametrize(("recache", "window", "sink", "frames", "again"), STORED)
def test_the_frames_that_come_under_the_new_prompt(recache, window, sink, frames, again):
    setting = Setting(sink, window, False, 2, frames, 2, 1, 1, 1, 3)
    generator = generator_of(setting, recache)
    with torch.no_grad():
        stream = committed(generator, latents(setting), [OLD], 2)
        assert changed_frames(stream.history, generator.switch(stream, [NEW]).history) == again


def test_a_moved_sink_is_the_first_of_the_last_window_of_frames():
    setting = Setting(2, 6, False, 2, 10, 2, 1, 1, 1, 3)
    generator = generator_of(setting, MovedSinkRecache())
    with torch.no_grad():
        stream = generator.switch(committed(generator, latents(setting), [OLD], 2), [NEW])
        assert stream.policy == SinkWindow(2, 6, sink_start=4)
        assert stream.policy.visible(10, 2) == (4, 5, 8, 9)
        later = generator.commit(latents(setting)[:, :, :2], stream)
    assert set(later.history.frame_ids) & {0, 1, 2, 3} == set()


# Rows that do not switch


Switch = Callable[[MicroGenerator, WanStream, list[str | None]], WanStream]


def check_other_rows(switch: Switch, recache: Recache, setting: Setting, forked: bool) -> None:
    """Of three prompts the middle one switches: the others are unchanged bit for bit, it is what it is alone."""
    x, generator = latents(setting, 3), generator_of(setting, recache)
    branches = 2 if forked else 1
    with torch.no_grad():
        stream = generator.fork(committed(generator, x, [OLD, OLD, OTHER], setting.block), branches)
        after = switch(generator, stream, [None, NEW, None])
        alone = generator.fork(committed(generator, x[1:2], [OLD], setting.block), branches)
        alone = generator.switch(alone, [NEW])
        mine = slice(branches, 2 * branches)
        others = [0, *range(2 * branches, 3 * branches)] if not forked else [0, 1, 4, 5]
        before, now = (asked(generator, s, setting.block, 3 * branches) for s in (stream, after))
        expected = asked(generator, alone, setting.block, branches)
    frames = stream.history.frame_ids
    for layer in (0, 1):
        for old, new in zip(
            stream.history.view(frames).read(layer), after.history.view(frames).read(layer), strict=True
        ):
            assert torch.equal(old[others], new[others])
    assert torch.equal(before[others], now[others])
    again = noise(99, 3 * branches, LATENT[0], setting.block, *LATENT[1:])[mine]
    with torch.no_grad():
        expected = generator.predict(again, 0.7, alone)
    assert gap(now[mine], expected) < 1e-9


def everyone(generator: MicroGenerator, stream: WanStream, prompts: list[str | None]) -> WanStream:
    """A planted error: all rows are encoded again as soon as one switches."""
    return generator.switch(stream, [prompt or old for prompt, old in zip(prompts, [OLD, OLD, OTHER], strict=True)])


def shifted(generator: MicroGenerator, stream: WanStream, prompts: list[str | None]) -> WanStream:
    """A planted error: the neighbour switches."""
    return generator.switch(stream, [*prompts[1:], prompts[0]])


def right(generator: MicroGenerator, stream: WanStream, prompts: list[str | None]) -> WanStream:
    return generator.switch(stream, prompts)


RECACHES = (JointRecache(), BlockwiseRecache(), NoRecache())


@pytest.mark.parametrize("recache", RECACHES, ids=lambda r: type(r).__name__)
def test_rows_that_do_not_switch_are_unchanged_bit_for_bit(recache: Recache):
    holds(lambda s, f: check_other_rows(right, recache, s, f), SETTINGS, st.booleans(), examples=25)


@pytest.mark.parametrize("wrong", [everyone, shifted])
def test_the_row_check_sees_rows_that_were_touched(wrong: Switch):
    refuted(lambda s, f: check_other_rows(wrong, JointRecache(), s, f), SETTINGS, st.booleans())


# Refusals


def test_a_stream_that_was_opened_without_switches_refuses_one():
    setting = Setting(2, 6, False, 2, 4, 2, 1, 1, 1, 3)
    generator = setting.generator()
    with torch.no_grad(), pytest.raises(ValueError, match="switches=True"):
        generator.switch(generator.open([OLD]), [NEW])
    with torch.no_grad(), pytest.raises(ValueError, match="for each of the 1"):
        generator.switch(generator.open([OLD], switches=True), [NEW, NEW])


def test_a_sink_moves_for_all_prompts_or_for_none():
    setting = Setting(2, 6, False, 2, 8, 2, 2, 1, 1, 3)
    generator = generator_of(setting, MovedSinkRecache())
    with torch.no_grad():
        stream = committed(generator, latents(setting, 2), [OLD, OLD], 2)
        with pytest.raises(ValueError, match=r"only 1 of 2 prompts switch at frame 8.*JointRecache"):
            generator.switch(stream, [NEW, None])


class Older(HistoryPolicy):
    """A policy that nobody has heard of: only the frame before the block is visible."""

    def visible(self, start: int, length: int) -> tuple[int, ...]:
        return (start - 1,) if start else ()

    def positions(self, visible: Sequence[int], start: int, length: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return tuple(visible), tuple(range(start, start + length))

    def retains(self, frame: int, start: int) -> bool:
        return frame == start - 1


def test_a_joint_recache_refuses_a_policy_whose_window_it_does_not_know_and_a_blockwise_one_serves_it():
    for recache in (JointRecache(), MovedSinkRecache()):
        with pytest.raises(ValueError, match="not of Older; set recache of the generator to BlockwiseRecache"):
            recache.passes(Older(), 4, 2)
    (only,) = BlockwiseRecache().passes(Older(), 4, 2)
    assert (only.frames, only.stored, only.past) == ((3,), (3,), ())


# Memory


def storage(stream: WanStream) -> int:
    """Bytes that the K/V and the clean latents of a stream keep alive."""
    kept = [*tensors(stream.history), *(x for _, x in stream.clean.blocks)] if stream.clean else tensors(stream.history)
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}.values())


def sizes(recache: Recache, blocks: int, every: int) -> list[int]:
    setting = Setting(2, 6, False, 2, 2, 2, 1, 1, 1, 3)
    generator = generator_of(setting, recache)
    found = []
    with torch.no_grad():
        stream = generator.open([OLD], switches=True)
        for block in range(blocks):
            if block and block % every == 0:
                stream = generator.switch(stream, [NEW if block // every % 2 else OLD])
            stream = generator.commit(noise(block, 1, *LATENT[:1], 2, *LATENT[1:]), stream)
            found.append(storage(stream))
    return found


@pytest.mark.parametrize("recache", [*RECACHES, MovedSinkRecache()], ids=lambda r: type(r).__name__)
def test_memory_does_not_grow_with_the_length_or_the_number_of_switches(recache: Recache):
    found = sizes(recache, 40, 5)
    assert max(found[20:]) <= max(found[:20])


class Hoarding(JointRecache):
    """A planted error: every latent is kept."""

    def reads(self, policy, frame: int, start: int) -> bool:
        return True


def test_the_memory_check_sees_latents_that_are_never_dropped():
    found = sizes(Hoarding(), 40, 5)
    assert max(found[20:]) > max(found[:20])


def test_a_stream_that_never_switches_keeps_no_latents():
    setting = Setting(2, 6, False, 2, 8, 2, 1, 1, 1, 3)
    generator = setting.generator()
    with torch.no_grad():
        stream = generator.commit(latents(setting)[:, :, :2], generator.open([OLD]))
    assert stream.clean is None and generator.fork(stream, 2).clean is None


# The history underneath


Rewrite = Callable[[KVHistory, int, list[tuple[Tensor, Tensor]], list[int] | None], KVHistory]


@st.composite
def rewrites(draw) -> tuple[list[int], int, int, int, int, list[int] | None]:
    """(chunk lengths, rows of the trunk, branches, first frame, frames, rows that are rewritten or None)."""
    lengths = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    total = sum(lengths)
    trunk, branches = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    start = draw(st.integers(0, total - 1))
    count = draw(st.integers(1, total - start))
    rows = draw(st.none() | st.lists(st.integers(0, trunk * branches - 1), min_size=1, unique=True).map(sorted))
    return lengths, trunk, branches, start, count, rows


def check_rewrite(rewrite: Rewrite, made: tuple[list[int], int, int, int, int, list[int] | None]) -> None:
    lengths, trunk, branches, start, count, rows = made
    history = KVHistory()
    for i, length in enumerate(lengths):
        history = history.commit([(noise(i, trunk, length, 1, 1, 2), noise(50 + i, trunk, length, 1, 1, 2))])
    history = history.fork(branches)
    everything = range(sum(lengths))
    before = [t.clone() for t in history.view(everything).read(0)]
    batch = trunk * branches if rows is None else len(rows)
    kv = [(noise(7, batch, count, 1, 1, 2), noise(8, batch, count, 1, 1, 2))]
    after = rewrite(history, start, kv, rows).view(everything).read(0)
    for old, new, put, now in zip(before, after, kv[0], history.view(everything).read(0), strict=True):
        assert torch.equal(old, now)  # the older history is a value
        expected = old.clone()
        for i, row in enumerate(range(trunk * branches) if rows is None else rows):
            for j in range(count):
                expected[row, start + j] = put[i, j]
        assert torch.equal(new, expected)


def in_place(history: KVHistory, start: int, kv: list[tuple[Tensor, Tensor]], rows: list[int] | None) -> KVHistory:
    """A planted error: the stored tensors are written to."""
    for chunk, branches in zip(history.chunks, history.branches, strict=True):
        for layer, new in zip(chunk.kv, kv, strict=True):
            for kept, put in zip(layer, new, strict=True):
                low, high = max(chunk.start, start), min(chunk.stop, start + put.shape[1])
                if low < high and branches == 1:
                    which = slice(None) if rows is None else rows
                    kept[which, low - chunk.start : high - chunk.start] = put[:, low - start : high - start]
    return history


def test_a_rewrite_replaces_these_frames_of_these_rows_and_no_other():
    holds(lambda made: check_rewrite(KVHistory.rewrite, made), rewrites(), examples=60)


def test_the_rewrite_check_sees_a_write_in_place():
    refuted(lambda made: check_rewrite(in_place, made), rewrites())


def test_frames_are_added_for_all_rows_only():
    history = KVHistory().commit([(noise(1, 2, 2, 1, 1, 2), noise(2, 2, 2, 1, 1, 2))])
    kv = [(noise(3, 2, 2, 1, 1, 2), noise(4, 2, 2, 1, 1, 2))]
    assert history.rewrite(1, kv).frame_ids == (0, 1, 2)
    with pytest.raises(KeyError, match="some rows only"):
        history.rewrite(1, [(k[:1], v[:1]) for k, v in kv], [0])
