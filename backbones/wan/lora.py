"""Released LoRA files (PEFT layouts) read strictly, and merged: W + (alpha / rank) B A, in float32.

A bare PEFT dict carries no alpha and a file does not say what it should hold: rank, alpha and targets come from the
recipe, and what the file holds must be exactly that.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backbones.wan.checkpoints import Naming, listed, plain_name, read_names
from framework.adapters import WAN_LINEARS

EMBEDDING_LINEARS = (
    "condition_embedder.text_embedder.linear_1",
    "condition_embedder.text_embedder.linear_2",
    "condition_embedder.time_embedder.linear_1",
    "condition_embedder.time_embedder.linear_2",
    "condition_embedder.time_proj",
    "proj_out",
)
"""The linear layers outside of the blocks, 6 beside the 300 of the 1.3B network; RAVEN adapts them as well."""

_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])(\.(?P<adapter>\w+))?\.weight")


@dataclass(frozen=True)
class LowRank:
    """(alpha / rank) B A of one linear layer. a: [rank, in], b: [out, rank]."""

    a: Tensor
    b: Tensor
    scale: float

    def added_to(self, weight: Tensor) -> Tensor:
        """weight [out, in] plus the update, in float32 or wider; the sum is not rounded back."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        return weight.to(wide) + self.scale * (self.b.to(weight.device, wide) @ self.a.to(weight.device, wide))


def read_lora(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str, *,
    rank: int, alpha: float, targets: Sequence[str] = WAN_LINEARS,
) -> dict[str, LowRank]:  # fmt: skip
    """The update of every targeted weight, by the network's names.

    expected: the network's state dict, of which shapes count. targets: ends of module names in diffusers naming.
    Raises ValueError in one line for a key that is no half of a LoRA, a module that is missing or too many, and for
    shapes that do not belong to this network and rank.
    """
    halves, naming = read_halves(state, source)
    wanted = targeted(expected, targets)
    for half in "AB":
        there = {name for name, which in halves if which == half}
        missing = [_as_key(naming, name, half) for name in sorted(wanted - there)]
        extra = [_as_key(naming, name, half) for name in sorted(there - wanted)]
        if missing or extra:
            parts = [f"{len(missing)} keys are missing: {listed(missing)}"] if missing else []
            parts += [f"{len(extra)} are of no target: {listed(extra)}"] if extra else []
            raise ValueError(f"{source} is not the LoRA of the recipe, {' and '.join(parts)}; check its targets")
    wrong = []
    for (name, half), tensor in sorted(halves.items(), key=lambda item: item[0]):
        out, into = expected[name].shape
        needed = (rank, into) if half == "A" else (out, rank)
        if tuple(tensor.shape) != needed or not tensor.is_floating_point():
            key = _as_key(naming, name, half)
            wrong.append(f"{key} is {list(tensor.shape)} {tensor.dtype}, needed {list(needed)}")
    if wrong:
        raise ValueError(f"{source} does not fit rank {rank} on this network, {len(wrong)} tensors differ: "
                         f"{listed(wrong)}")  # fmt: skip
    return {name: LowRank(halves[name, "A"], halves[name, "B"], alpha / rank) for name in wanted}


def read_halves(state: Mapping[str, Tensor], source: str) -> tuple[dict[tuple[str, str], Tensor], Naming]:
    """{(weight in the network's names, "A" | "B"): tensor} of a PEFT state dict in whichever names it has."""
    found = {key: _KEY.fullmatch(plain_name(key)) for key in state}
    strange = sorted(key for key, match in found.items() if match is None)
    if strange:
        raise ValueError(f"{source} holds {len(strange)} keys that are no lora_A or lora_B weights: {listed(strange)}")
    matches = {key: match for key, match in found.items() if match is not None}
    naming = read_names({match["module"]: f"{match['module']}.weight" for match in matches.values()}, source)
    halves: dict[tuple[str, str], Tensor] = {}
    keys: dict[tuple[str, str], str] = {}
    for key, match in matches.items():
        place = naming.names[match["module"]], match["half"]
        if place in halves:
            raise ValueError(f"{source} holds one half of a LoRA under two keys: {keys[place]} and {key}")
        halves[place], keys[place] = state[key], key
    return halves, naming


def targeted(expected: Mapping[str, Tensor], targets: Sequence[str]) -> set[str]:
    """Weights of the targeted linear layers. Raises ValueError for a target that names none."""
    matrices = [name for name, tensor in expected.items() if name.endswith(".weight") and tensor.ndim == 2]
    found = {target: {n for n in matrices if f".{n}".endswith(f".{target}.weight")} for target in targets}
    idle = [target for target in targets if not found[target]]
    if idle or not targets:
        raise ValueError(f"LoRA targets {listed(idle) or 'are missing'}: no linear layer of the network is named so")
    return set().union(*found.values())


def _as_key(naming: Naming, name: str, half: str) -> str:
    return f"{naming.shown(name).removesuffix('.weight')}.lora_{half}"
