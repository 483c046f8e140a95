"""Kind b6: MemFlow's memory bank under the pipeline for one prompt and the one for several, its contents included."""

import re
from dataclasses import replace

import torch
from torch import Tensor

from backbones.memory_bank import MemoryBank
from backbones.recache import JointRecache
from backbones.streaming import WanStream
from framework.types import Visible
from tests.golden.b3 import SwitchingGenerator, scenes_of
from tests.golden.backbone import (
    ROLLOUT_INPUTS,
    TOLERANCE,
    AsTabulated,
    Spans,
    block_spans,
    build_generator,
    check_schedule,
    few_step_schedule,
    precision,
    roll_out,
)
from tests.golden.case import Case, Row, compare

INPUTS: tuple[str, ...] = ROLLOUT_INPUTS
NOT_TAKEN_UP: tuple[str, ...] = ()
MODES = ("single", "interactive")
FIELDS = ("velocity", "x0", "latents", "clean_velocity")


class BankGenerator(SwitchingGenerator):
    """A generator that writes down what its bank shows to each block."""

    banks: list[Tensor]
    """[layers, slots] per block, of the first clip."""

    def commit(self, x0: Tensor, stream: WanStream, visible: Visible | None = None) -> WanStream:
        memory = stream.recalled()
        assert memory is not None, "a b6 stream without a bank"
        self.banks.append(memory.frames[:, 0].cpu())
        return super().commit(x0, stream, visible)


def bank_policy(case: Case, mode: str) -> MemoryBank:
    """The policy of a mode."""
    return MemoryBank(
        case.hparam("sink_frames"),
        case.hparam("window_frames_including_current_block"),
        case.hparam("bank_size"),
        case.hparam("record_interval"),
        mode == "interactive",
    )


def bank_generator(case: Case, mode: str, spans: Spans, dtype: torch.dtype) -> BankGenerator:
    """The case's network behind the policy of a mode; ``single`` keeps the first prompt.

    Raises ValueError where prompts and switches do not match.
    """
    policy, embeds = bank_policy(case, mode), case["prompt_embeds"]
    embeds = embeds[None] if embeds.ndim == 3 else embeds  # [prompts, rows, L, D]
    frames = case.hparams.get("switch_frames_interactive", []) if mode == "interactive" else []
    shown = embeds if mode == "interactive" else embeds[:1]
    tensors = {**case.tensors, "prompt_embeds": shown}
    switching = replace(case, tensors=tensors, hparams={**case.hparams, "switch_frames": frames})
    flat = replace(case, tensors={**tensors, "prompt_embeds": shown.flatten(0, 1)})
    schedule = AsTabulated(**vars(few_step_schedule(case)), table=float32_levels(case))
    plain = build_generator(flat, policy, spans, schedule, dtype)
    generator = BankGenerator(plain.network, plain.recipe, policy, plain.prompt_embeds, spans)
    generator.recache, generator.scenes = JointRecache(), scenes_of(switching, spans)
    generator.recached, generator.banks = [], []
    return generator


def float32_levels(case: Case) -> tuple[float, ...]:
    """The levels of the float32 table of timesteps that the case was computed with; the file has more digits."""
    return tuple((case["timesteps"].float().double() / 1000).tolist())


def as_table(banks: list[Tensor], layers: int, size: int) -> Tensor:
    """[blocks, layers, size]; −1 for a slot that is empty or not visible."""
    table = torch.full((len(banks), layers, size), -1)
    for block, bank in enumerate(banks):
        table[block, : bank.shape[0], : bank.shape[1]] = bank
    return table


def check(case: Case) -> list[Row]:
    """Every tensor of every mode: the rollout, the outputs of recache passes, and the bank of each block and layer."""
    rows = check_schedule(case, few_step_schedule(case))
    spans = block_spans(case, case["noise"].shape[2])
    names = re.compile(rf"({'|'.join(FIELDS)}|bank_frames|recache_velocity)\.({'|'.join(MODES)})(?:\.(\d+))?")
    asked = [match for match in map(names.fullmatch, case.tensors) if match]
    layers, size = case.hparam("model")["num_layers"], case.hparam("bank_size")
    for mode in MODES:
        wanted = [match for match in asked if match[2] == mode]
        for dtype, tolerance in TOLERANCE.items() if wanted else ():
            generator = bank_generator(case, mode, spans, dtype)
            rollout = roll_out(case, generator, dtype)
            for match in wanted:
                if match[1] == "bank_frames":
                    found, allowed = as_table(generator.banks, layers, size), 0.0
                elif match[1] == "recache_velocity":
                    found, allowed = generator.recached[int(match[3])], tolerance
                else:
                    found, allowed = getattr(rollout, match[1]), tolerance
                rows.append(compare(case, match[0], found, allowed, precision(dtype)))
    return rows
