"""Kind b7: a LoRA in the layout of the released adapters, merged into the weights and unmerged beside them."""

from collections.abc import Iterator

import torch

from backbones.wan.checkpoints import original_name
from backbones.wan.lora import LowRank, read_lora
from framework.schedules import FewStepSchedule
from tests.golden.backbone import (
    TOLERANCE,
    GoldenGenerator,
    block_spans,
    build_generator,
    frame_policy,
    packed_probe,
    precision,
    streamed_probe,
)
from tests.golden.case import Case, Row, compare

INPUTS: tuple[str, ...] = ("weights.*", "lora.*", "prompt_embeds", "probe_x", "probe_history", "probe_timesteps")
NOT_TAKEN_UP: tuple[str, ...] = ()


def check(case: Case) -> list[Row]:
    """The network without its adapter and with it, asked through the cache and packed, in both precisions."""
    return [row for dtype in TOLERANCE for row in check_precision(case, dtype)]


def check_precision(case: Case, dtype: torch.dtype) -> Iterator[Row]:
    """The adapter merged as a released one is, and injected as a trained one is."""
    yield from probed(case, "probe_velocity_base", generator_of(case, dtype), dtype, "")
    for how, put in (("merged", merge), ("unmerged", inject)):
        generator = generator_of(case, dtype)
        put(case, generator, updates_of(case, generator))
        yield from probed(case, "probe_velocity_lora", generator, dtype, f" {how}")


def probed(case: Case, tensor: str, generator: GoldenGenerator, dtype: torch.dtype, how: str) -> Iterator[Row]:
    """One expected tensor, streamed and packed."""
    for way, probe in (("streamed", streamed_probe), ("packed", packed_probe)):
        actual = probe(case, generator, dtype)
        yield compare(case, tensor, actual, TOLERANCE[dtype], f"{precision(dtype)}{how} {way}")


def generator_of(case: Case, dtype: torch.dtype) -> GoldenGenerator:
    """The case's network without the adapter."""
    policy = frame_policy(case.hparam("sink"), case.hparam("window"))
    return build_generator(case, policy, block_spans(case, case["probe_x"].shape[2]), FewStepSchedule(), dtype)


def updates_of(case: Case, generator: GoldenGenerator) -> dict[str, LowRank]:
    """The case's adapter, read as released files are. Raises ValueError where it is not what the case says it is."""
    state = {name.removeprefix("lora."): t for name, t in case.tensors.items() if name.startswith("lora.")}
    return read_lora(
        state, dict(generator.network.state_dict()), case.name,
        rank=case.hparam("lora_rank"), alpha=case.hparam("lora_alpha"), targets=targets_of(case, generator),
    )  # fmt: skip


def targets_of(case: Case, generator: GoldenGenerator) -> tuple[str, ...]:
    """Modules of the network; the case gives the ends of their original names.

    Raises ValueError for an end that no linear layer has.
    """
    matrices = [name for name, tensor in generator.network.state_dict().items() if tensor.ndim == 2]
    linears = {str(original_name(name)).removesuffix(".weight"): name for name in matrices if name.endswith(".weight")}
    found: dict[str, None] = {}
    for target in case.hparam("lora_targets"):
        named = [ours for original, ours in linears.items() if f".{original}".endswith(f".{target}")]
        if not named:
            raise ValueError(f"{case.name}: lora_targets names {target!r}, which no linear layer of the network is")
        found |= dict.fromkeys(name.removesuffix(".weight") for name in named)
    return tuple(found)


def merge(case: Case, generator: GoldenGenerator, updates: dict[str, LowRank]) -> None:
    """W + (alpha / rank) B A."""
    parameters = dict(generator.network.named_parameters())
    with torch.no_grad():
        for name, update in updates.items():
            parameters[name].copy_(update.added_to(parameters[name]))


def inject(case: Case, generator: GoldenGenerator, updates: dict[str, LowRank]) -> None:
    """Through diffusers' own loader, which an exported adapter goes through too."""
    modules = {name.removesuffix(".weight"): update for name, update in updates.items()}
    state = {f"{module}.lora_A.weight": update.a for module, update in modules.items()}
    state |= {f"{module}.lora_B.weight": update.b for module, update in modules.items()}
    metadata = {"r": case.hparam("lora_rank"), "lora_alpha": case.hparam("lora_alpha"), "target_modules": [*modules]}
    generator.network.load_lora_adapter(state, prefix=None, metadata=metadata)
    for name, parameter in generator.network.named_parameters():
        if ".lora_" in name:  # float32 as loaded; the values are those of the file
            parameter.data = parameter.data.to(generator.network.proj_out.bias.dtype)
