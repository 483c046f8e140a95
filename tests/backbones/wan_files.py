"""Files as released checkpoints have them, of the micro network: original names, wrappers, containers, adapters."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from backbones.wan.checkpoints import PREFIXES, WRAPPERS, original_name
from backbones.wan.transformer import CausalWanTransformer3DModel
from tests.backbones.micro import fresh_network, micro_config
from tests.support import normal

RANK, ALPHA = 4, 8.0
BLOCK_ENDS = [f"{a}.{p}" for a in ("self_attn", "cross_attn") for p in "qkvo"] + ["ffn.0", "ffn.2"]
OUTSIDE = ["text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2", "time_projection.1",
           "head.head"]  # fmt: skip


def network(seed: int = 0) -> CausalWanTransformer3DModel:
    """A micro network in float32, other weights for other seeds."""
    made = fresh_network(dtype=torch.float32)
    with torch.no_grad():
        for i, parameter in enumerate(made.parameters()):
            parameter += 0.1 * normal(1000 * seed + i, *parameter.shape).to(parameter)
    return made


def ours(seed: int = 0) -> dict[str, Tensor]:
    """The state dict of a network in diffusers names."""
    return {name: tensor.clone() for name, tensor in network(seed).state_dict().items()}


def originals(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same under original names."""
    return {str(original_name(name)): tensor for name, tensor in state.items()}


def lora(ends: Iterable[str] = BLOCK_ENDS, outside: Iterable[str] = (), seed: int = 0, rank: int = RANK,
         form: str = "base_model.model.{}.lora_{}.weight") -> dict[str, Tensor]:  # fmt: skip
    """A PEFT dict in original names for the micro network."""
    weights = originals(ours())
    modules = [f"blocks.{n}.{end}" for n in range(micro_config()["num_layers"]) for end in ends] + list(outside)
    made = {}
    for i, module in enumerate(modules):
        out, into = weights[f"{module}.weight"].shape
        made[form.format(module, "A")] = normal(seed + 2 * i, rank, into, dtype=torch.float32) / into**0.5
        made[form.format(module, "B")] = 0.1 * normal(seed + 2 * i + 1, out, rank, dtype=torch.float32)
    return made


def outputs(network: torch.nn.Module) -> Tensor:
    """What a network says about one fixed question."""
    dtype = next(network.parameters()).dtype
    x, text = normal(1, 2, 16, 3, 4, 4).to(dtype), normal(2, 2, 5, 16).to(dtype)
    with torch.no_grad():
        return network(x, torch.tensor([937.5, 250.0]), text)[0]


def wrapped(draw: st.DrawFn, key: str) -> str:
    """A key as FSDP, checkpointing and compiling leave it, behind trainers' prefixes."""
    parts = key.split(".")
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(parts) - 1))
        parts.insert(place, draw(st.sampled_from(WRAPPERS)).removesuffix("."))
    return "".join(draw(st.lists(st.sampled_from(PREFIXES), max_size=3))) + ".".join(parts)


@st.composite
def wrappings(draw: st.DrawFn) -> dict[str, str]:
    """bare key → wrapped key for all of a micro checkpoint; prefixes and wrappers are drawn for some, as for all."""
    keys = list(originals(ours())) if draw(st.booleans()) else list(ours())
    some = set(draw(st.lists(st.sampled_from(keys), max_size=6)))
    shared = draw(st.sampled_from(("", "model.", "module.model.", "_orig_mod.", "model._fsdp_wrapped_module.")))
    return {key: wrapped(draw, key) if key in some else shared + key for key in keys}


def save_torch(path: Path, content: object, legacy: bool = False) -> Path:
    """A torch file, in the older format if asked."""
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def save_safetensors(path: Path, state: Mapping[str, Tensor]) -> Path:
    save_file({key: tensor.contiguous().clone() for key, tensor in state.items()}, path)
    return path
