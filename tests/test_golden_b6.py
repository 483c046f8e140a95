"""The golden case of the memory bank can fail: every rule of the bank that is read otherwise misses."""

from dataclasses import replace

import pytest
import torch

import backbones.memory_bank as memory_bank
from backbones.memory_bank import Bank, frame_scores
from tests.golden import b6
from tests.golden.__main__ import FOLDER
from tests.golden.backbone import GoldenGenerator
from tests.golden.case import Case, read_case
from tests.golden.runner import run_case
from tests.synthetic_bank import bank_case

PACKAGED = FOLDER / "b6_memflow_bank.safetensors"


def missed(case: Case) -> set[str]:
    return {row.tensor for row in run_case(case, b6).misses}


@pytest.fixture(scope="module")
def case() -> Case:
    """The packaged case without what the schedule already says."""
    return read_case(PACKAGED)


def with_hparams(case: Case, **changed) -> Case:
    return replace(case, hparams={**case.hparams, **changed})


@pytest.mark.parametrize(
    ("changed", "seen"),
    [
        ({"record_interval": 3}, {"bank_frames.single", "bank_frames.interactive"}),
        ({"sink_frames": 0}, {"latents.single", "velocity.interactive"}),
        ({"window_frames_including_current_block": 9}, {"latents.single", "velocity.interactive"}),
    ],
)
def test_another_rule_misses(case: Case, changed: dict, seen: set[str]):
    assert seen <= missed(with_hparams(case, **changed))


def test_the_pipelines_for_one_prompt_and_for_several_are_told_apart(case: Case):
    swapped = {
        name: case[name.replace("single", "x").replace("interactive", "single").replace("x", "interactive")]
        for name in case.tensors
        if name.endswith((".single", ".interactive"))
    }
    assert {"bank_frames.single", "latents.interactive"} <= missed(replace(case, tensors={**case.tensors, **swapped}))


def test_a_bank_that_keeps_the_worst_frames_misses(case: Case, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory_bank, "frame_scores", lambda text, k: -frame_scores(text, k))
    assert {"bank_frames.single", "latents.single"} <= missed(case)


def test_keys_that_are_scored_without_their_rotation_miss(case: Case, monkeypatch: pytest.MonkeyPatch):
    original = Bank.record
    monkeypatch.setattr(Bank, "record", lambda self, kv, start, rotate: original(self, kv, start, lambda k, frame: k))
    assert {"bank_frames.single", "latents.single"} <= missed(case)


def test_a_case_with_a_switch_is_run_to_its_end(case: Case):
    """No expected numbers of one are packaged: the blocks before the switch are those of the case."""
    second = torch.cat([case["prompt_embeds"], case["prompt_embeds"].roll(1, dims=-1)])
    switching = replace(
        case,
        tensors={**case.tensors, "prompt_embeds": second},
        hparams={**case.hparams, "switch_frames_interactive": [15]},
    )
    spans = b6.block_spans(switching, 27)
    generator = b6.bank_generator(switching, "interactive", spans, torch.float64)
    found = b6.roll_out(switching, generator, torch.float64).latents
    expected = case["latents.interactive"].double()
    assert (found[:, :, :15] - expected[:, :, :15]).abs().max() < 5e-6
    assert (found[:, :, 15:] - expected[:, :, 15:]).abs().max() > 0.1
    assert len(generator.recached) == 1 and generator.recached[0].shape[2] == 12
    single = b6.bank_generator(switching, "single", spans, torch.float64)
    latents = b6.roll_out(switching, single, torch.float64).latents
    assert (latents - case["latents.single"].double()).abs().max() < 5e-6


# Cases of other sizes, and with switches, hold by an oracle that shares no code with the backbones


@pytest.mark.parametrize(
    ("lengths", "sink", "window", "size", "interval", "switches"),
    [
        ((1, 1, 1, 1, 1, 1), 1, 3, 1, 1, (4,)),
        ((2, 2, 2, 2, 2, 2), 2, 4, 2, 2, (6,)),  # the window is sink and block
        ((1, 1, 1, 1, 1, 1, 1), 1, 3, 2, 1, (3, 5)),
        ((1, 2, 2, 2, 2), 0, 4, 2, 2, (4,)),
        ((1, 1, 1, 1, 1, 1), 3, 5, 3, 1, ()),  # a sink longer than a block
    ],
)
def test_a_bank_of_another_size_holds_through_switches(lengths, sink, window, size, interval, switches):
    made = bank_case(lengths, (1000, 500), sink, window, size, interval, switches)
    assert missed(made) == set()
    assert {f"recache_velocity.interactive.{i}" for i in range(len(switches))} <= set(made.tensors)


def test_a_recache_pass_that_does_not_see_the_bank_misses(monkeypatch: pytest.MonkeyPatch):
    made = bank_case((1,) * 6, (1000,), 1, 3, 2, 1, (4,), ("interactive",))
    assert missed(made) == set()
    original = GoldenGenerator._reencode
    monkeypatch.setattr(GoldenGenerator, "_reencode", lambda self, *given: original(self, *given[:5]))
    assert {"latents.interactive", "recache_velocity.interactive.0"} <= missed(made)


def test_frames_scored_by_the_new_prompt_before_a_block_has_read_it_miss(monkeypatch: pytest.MonkeyPatch):
    made = bank_case((1,) * 8, (1000,), 1, 3, 3, 1, (5,), ("interactive",))
    assert missed(made) == set()
    monkeypatch.setattr(Bank, "switched", lambda self, rows, batch: self)
    assert {"latents.interactive", "bank_frames.interactive"} <= missed(made)
