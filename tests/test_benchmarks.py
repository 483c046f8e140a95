"""The benchmarks measure what they say: bytes are counted, both sides of a ratio do the same work, every row runs."""

from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from backbones.embedded.generator import CONFIG
from backbones.history import FullHistory
from benchmarks import __main__ as command
from benchmarks import p1, p2, p3, p4, p5, p6, p7, p8, streaming
from benchmarks.measure import LiveBytes, Ratio, Row, Seconds, storage_bytes, table
from benchmarks.scenarios import MINIATURE, random_generator

KILO = 1000
"""Elements of a test tensor: 4000 bytes in float32."""


def stream_of_blocks(blocks: int, keep: bool) -> None:
    """A reader of blocks that may keep them."""
    kept = []
    for _ in range(blocks):
        block = torch.zeros(KILO) + 1
        if keep:
            kept.append(block)


def peak_of(work: Callable[[], object]) -> int:
    with LiveBytes() as counter:
        work()
    return counter.peak


def test_a_reader_that_keeps_every_block_is_seen_and_one_that_does_not_is_constant():
    short, long = (peak_of(lambda n=n: stream_of_blocks(n, keep=False)) for n in (2, 20))
    assert short == long
    short, long = (peak_of(lambda n=n: stream_of_blocks(n, keep=True)) for n in (2, 20))
    assert long - short == 18 * 4 * KILO


def test_bytes_live_as_long_as_anybody_holds_the_storage():
    with LiveBytes() as counter:
        whole = torch.zeros(KILO)
        view = whole[10:20]
        del whole
        assert counter.live == 4 * KILO
        del view
        assert counter.live == 0
    assert counter.peak == 4 * KILO


def test_bytes_that_only_the_graph_holds_are_counted_until_backward():
    weight = torch.ones(KILO, requires_grad=True)
    with LiveBytes() as counter:
        loss = (weight * 2).square().sum()
        scalar = 4
        assert counter.live == 4 * KILO + scalar
        loss.backward()
        assert weight.grad is not None
        weight.grad = None
        assert counter.live == scalar


def test_what_existed_before_is_not_counted_even_when_it_is_viewed_or_changed():
    weight = torch.zeros(KILO)
    with LiveBytes() as counter:
        weight.view(10, -1).t().add_(1)
        weight.mul_(2)
        assert counter.live == 0


def test_storages_count_once():
    x = torch.zeros(KILO)
    assert storage_bytes([x, x[3:], x.view(2, -1), torch.zeros(1)]) == 4 * KILO + 4


def test_a_ratio_is_the_median_of_pairs_and_not_the_ratio_of_medians():
    ratio = Ratio(tuple((Seconds(a, 9.0), Seconds(b, 9.0)) for a, b in ((1, 1), (2, 4), (30, 10))))
    assert ratio.median == 1.0 and ratio.spread == (0.5, 3.0)


def test_a_planted_fault_has_to_miss_the_goal():
    met, missed = Row("R", "", 1.0, goal=1.02), Row("R", "", 1.1, goal=1.02)
    seen, unseen = Row("R", "", 1.1, goal=1.02, planted=True), Row("R", "", 1.0, goal=1.02, planted=True)
    assert [row.verdict for row in (met, missed, seen, unseen)] == ["met", "MISSED", "seen", "NOT SEEN"]
    assert [row.as_wanted for row in (met, missed, seen, unseen)] == [True, False, True, False]
    assert Row("R", "", 5.0).verdict == "reported"


def flops(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def recorded() -> tuple[p1.Trainer, p1.Recording]:
    generator = random_generator(MINIATURE)
    trainer = p1.build_trainer(generator, prompts=1, group=2, blocks=2)
    return trainer, p1.record_step(trainer, generator.network)


def test_the_bare_passes_of_a_step_have_its_flops(recorded):
    trainer, recording = recorded
    network = trainer.generator.network
    calls = recording.calls
    rollout = 2 * 4 + 1  # four sampler steps a block, and the first block is committed
    assert len(calls) == rollout + 3 * 2  # a clean and a noisy pass for each of three views
    assert [call.graph for call in calls] == [False] * (rollout + 5) + [True]
    step = flops(trainer.step)
    assert step > 0
    assert flops(lambda: recording.repeat(network)) == step
    fewer = p1.Recording(calls[:3] + calls[4:], recording.texts)  # the planted error: a call is forgotten
    assert flops(lambda: fewer.repeat(network)) < step


def test_the_bare_passes_leave_no_gradient_and_the_network_as_it_was(recorded):
    trainer, recording = recorded
    network = trainer.generator.network
    recording.repeat(network)
    assert all(parameter.grad is None for parameter in network.parameters())
    assert "text_kv" not in vars(network) and not network._forward_hooks and not network._forward_pre_hooks
    assert 0 < p1.network_share(trainer, network) < 1
    assert "forward" not in vars(network)


@pytest.mark.parametrize(("row", "routed"), [(p2, None), (p2, 3), (p2, 6), (p5, None), (p5, 3)])
def test_both_sides_of_a_group_row_have_the_same_flops(row, routed: int | None):
    prefix = 2 if routed is None else 7
    a, b = row.sides(MINIATURE, prefix, 2, 3, routed)
    assert flops(a) == flops(b) > 0
    fewer, _ = row.sides(MINIATURE, prefix, 2, 2, routed)  # the planted error: a clip less
    assert flops(fewer) < flops(b)


def test_packed_and_block_by_block_give_one_gradient_and_a_forgotten_block_another():
    generator = random_generator(MINIATURE)
    probes, cotangent = p3.make_probes(generator, clips=2, blocks=4)
    expected = p3.gradients(generator, lambda: p3.block_by_block(generator, probes, cotangent))
    assert p3.relative_gap(p3.gradients(generator, lambda: p3.packed(generator, probes, cotangent)), expected) < 1e-4
    wrong = p3.gradients(generator, lambda: p3.block_by_block(generator, probes, cotangent, forgetful=True))
    assert p3.relative_gap(wrong, expected) > 1e-2


def test_one_clip_at_a_time_needs_the_memory_of_one_clip():
    few, many = (p3.chunked_bytes(MINIATURE, group, 1) for group in (2, 6))
    assert many <= 1.05 * few
    assert p3.chunked_bytes(MINIATURE, 6, 7) > 1.5 * p3.chunked_bytes(MINIATURE, 2, 7)


def test_a_routed_history_is_alive_once_and_a_cache_per_branch_is_seen():
    wider = {**CONFIG, "ffn_dim": 16, "num_layers": 3}  # K/V outweigh pixels, as in every real generator
    value, _ = p5.alive_copies(wider, 7, 16, 4)
    leaking, _ = p5.alive_copies(wider, 7, 16, 4, p5.CopyingFork)
    assert value < 1.3 and leaking > 4


def test_every_row_runs_in_miniature_and_prints_a_table():
    rows = [
        *p1.measure(MINIATURE, prompts=1, group=2, blocks=2, pairs=1),
        *p2.measure(MINIATURE, prefix=1, window=1, group=2, pairs=1),
        *p3.measure(MINIATURE, lengths=(3,), clips=2, pairs=1, groups=(2, 3)),
        *p5.measure(MINIATURE, prefix=1, window=1, group=2, pairs=1, longer=9),
        *p6.measure(MINIATURE, MINIATURE),
        *p8.measure(MINIATURE, group=2, blocks=1, pairs=1, steps=1),
        *streaming.measure(MINIATURE, clips=(1, 2), blocks=1, repeats=1),
    ]
    assert all(row.value > 0 for row in rows)
    printed = table(rows)
    assert printed.count("\n") == len(rows) + 1
    assert {"P1", "P2", "P3", "P5", "P6", "P8", "FPS"} == {row.name for row in rows}


SMALL = {**p7.TINY, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32}


def test_the_streaming_row_of_a_wan_network_runs_and_says_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    *rows, missing = p7.measure(SMALL, (16, 4, 4), blocks=1, repeats=1)
    assert all(row.value > 0 and row.as_wanted for row in rows)
    assert missing.verdict == "not measured" and "no GPU: not measured" in table([missing])


def test_a_replay_is_counted_with_the_products_of_its_attention():
    plain = p7.replay_operations(SMALL, (16, 4, 4))
    generator = p7.wan_generator(SMALL, (16, 4, 4))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        generator.replay(p7.clip_probes(generator))
    assert plain > counter.get_total_flops()  # this processor's own kernel is not seen by the counter


def test_the_memory_row_sees_its_planted_leaks_and_finds_the_stream_constant():
    short, long = (p4.generation_bytes(MINIATURE, p4.WINDOW, blocks) for blocks in (5, 10))
    assert short == long
    assert p4.generation_bytes(MINIATURE, FullHistory(), 10) > 1.02 * p4.generation_bytes(MINIATURE, FullHistory(), 5)
    assert p4.hoarding_bytes(MINIATURE, p4.WINDOW, 10) > 1.02 * p4.hoarding_bytes(MINIATURE, p4.WINDOW, 5)
    wider = {**CONFIG, "ffn_dim": 16, "num_layers": 3}  # K/V outweigh pixels, as in every real generator
    short, long = (p4.rollout_bytes(wider, p4.WINDOW, prefix, group=2, window=1) for prefix in (5, 10))
    assert long <= 1.02 * short


def test_the_command_refuses_a_row_it_does_not_have(capsys):
    with pytest.raises(SystemExit):
        command.main(["p9"])
    assert "no row is called 'p9'; the rows are p1, p2, p3, p4, p5, p6, p7, p8, streaming" in capsys.readouterr().err


def test_the_command_fails_when_a_goal_is_missed(monkeypatch, capsys):
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # the other tests keep theirs
    for value, status in ((0.4, 0), (0.6, 1)):
        monkeypatch.setitem(command.ROWS, "p2", lambda value=value: [Row("P2", "m", value, goal=0.5)])
        assert command.main(["p2"]) == status
    assert "| P2 | m | 0.600 |" in capsys.readouterr().out
