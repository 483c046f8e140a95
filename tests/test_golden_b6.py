"""The golden case of the memory bank can fail: every rule of the bank that is read otherwise misses."""

from dataclasses import replace

import pytest
import torch

import backbones.memory_bank as memory_bank
from backbones.memory_bank import Bank, frame_scores
from tests.golden import b6
from tests.golden.__main__ import FOLDER
from tests.golden.case import Case, read_case
from tests.golden.runner import run_case

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
