"""Names of a Wan checkpoint: the original parameter names mapped to those of diffusers, wrappers and prefixes removed.

The map goes by exact module path, so a name it does not know is an error and never a silently dropped tensor.
Text-to-video only: image-conditioning tensors are unknown here, as they are to `CausalWanTransformer3DModel`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

MODULES = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
}
"""Modules outside the blocks, original → diffusers; each has a weight and a bias."""

BLOCK_MODULES = {
    "norm3": "norm2",  # the affine norm before the cross-attention; the other two norms have no parameters
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    **{
        f"{original}.{part}": f"{ours}.{path}"
        for original, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for part, path in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))
    },
}
"""Modules below ``blocks.N.``; each has a weight and a bias."""

BLOCK_NORMS = {
    f"{original}.{norm}": f"{ours}.{norm}"
    for original, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
    for norm in ("norm_q", "norm_k")
}
"""RMS norms below ``blocks.N.``; they have a weight only."""

TABLES = {"head.modulation": "scale_shift_table"}
BLOCK_TABLES = {"modulation": "scale_shift_table"}
"""Parameters that belong to no module."""

WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.", "base_layer.")
"""What FSDP, activation checkpointing, torch.compile and PEFT put into names, anywhere."""
PREFIXES = ("base_model.model.", "model.", "net.", "module.", "generator.", "diffusion_model.", "transformer.")
"""What trainers put before names, any number of times."""
NOT_PARAMETERS = ("freqs", "guidance_embeds", "rope.freqs_cos", "rope.freqs_sin")
"""Entries that a file may hold and the network computes."""
OTHER_NETWORKS = ("critic.", "discriminator.", "gan.")
"""Prefixes of networks that were trained beside the generator."""

_BLOCK = re.compile(r"(blocks\.\d+\.)(.+)")


def diffusers_name(original: str) -> str | None:
    """The diffusers name of an original Wan parameter, None for a name the map does not know."""
    return _translated(original, MODULES, BLOCK_MODULES, BLOCK_NORMS, TABLES, BLOCK_TABLES)


def original_name(diffusers: str) -> str | None:
    """The inverse of `diffusers_name`."""
    turned = (_turned(table) for table in (MODULES, BLOCK_MODULES, BLOCK_NORMS, TABLES, BLOCK_TABLES))
    return _translated(diffusers, *turned)


def _turned(table: Mapping[str, str]) -> dict[str, str]:
    return {value: key for key, value in table.items()}


def _translated(
    name: str, modules: Mapping[str, str], block_modules: Mapping[str, str], block_norms: Mapping[str, str],
    tables: Mapping[str, str], block_tables: Mapping[str, str],
) -> str | None:  # fmt: skip
    block = _BLOCK.fullmatch(name)
    prefix, name = block.groups() if block else ("", name)
    table = (block_tables if block else tables).get(name)
    if table is not None:
        return f"{prefix}{table}"
    module, _, parameter = name.rpartition(".")
    if block and module in block_norms:
        return f"{prefix}{block_norms[module]}.weight" if parameter == "weight" else None
    path = (block_modules if block else modules).get(module)
    return f"{prefix}{path}.{parameter}" if path and parameter in ("weight", "bias") else None


def to_diffusers_keys(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with original Wan names → the same tensors under their diffusers names.

    Raises ValueError that lists the names the map does not know.
    """
    names = {original: diffusers_name(original) for original in state_dict}
    unknown = sorted(original for original, name in names.items() if name is None)
    if unknown:
        raise ValueError(
            f"not parameters of a text-to-video Wan checkpoint: {listed(unknown)}; strip prefixes before mapping"
        )
    return {name: state_dict[original] for original, name in names.items() if name is not None}


def plain_name(key: str) -> str:
    """A key without what wrappers put into it and trainers before it."""
    for wrapper in WRAPPERS:
        key = re.sub(rf"(?<![^.]){re.escape(wrapper)}", "", key)
    while True:
        prefix = next((prefix for prefix in PREFIXES if key.startswith(prefix)), "")
        if not prefix:
            return key
        key = key.removeprefix(prefix)


def listed(names: Sequence[str], shown: int = 4) -> str:
    """The first few of some names."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


@dataclass(frozen=True)
class Naming:
    """What the keys of a file mean. names: key → the network's parameter. original: whether they are original names."""

    names: Mapping[str, str]
    original: bool

    def shown(self, name: str) -> str:
        """A parameter of the network as this file would call it."""
        return (original_name(name) if self.original else None) or name


def read_names(plain: Mapping[str, str], source: str) -> Naming:
    """What the keys of a file mean: all are original names or all are those of diffusers. plain: key → bare name.

    Raises ValueError for keys that are neither, and for two keys of one parameter.
    """
    ours = {key: name if original_name(name) else None for key, name in plain.items()}
    theirs = {key: diffusers_name(name) for key, name in plain.items()}
    original = _unknown(theirs) <= _unknown(ours)
    chosen = theirs if original else ours
    unknown = sorted(key for key, name in chosen.items() if name is None)
    if unknown:
        kind = "original Wan" if original else "diffusers"
        raise ValueError(
            f"{source} is no text-to-video Wan checkpoint: {len(unknown)} of {len(plain)} keys are no {kind} names: "
            f"{listed(unknown)}"
        )
    names = {key: name for key, name in chosen.items() if name is not None}
    twice = _twice(names)
    if twice:
        raise ValueError(f"{source} holds {len(twice)} parameters under two keys: {listed(twice)}")
    return Naming(names, original)


def _unknown(names: Mapping[str, str | None]) -> int:
    return sum(name is None for name in names.values())


def _twice(names: Mapping[str, str]) -> list[str]:
    """``key and key`` for every parameter that several keys name."""
    keys: dict[str, list[str]] = {}
    for key, name in names.items():
        keys.setdefault(name, []).append(key)
    return sorted(" and ".join(sorted(several)) for several in keys.values() if len(several) > 1)


@dataclass(frozen=True)
class WanWeights:
    """The tensors of a checkpoint by the network's names. source: the file. keys: name → key in the file.

    left_out: keys of what is no parameter of the generator.
    """

    source: str
    tensors: Mapping[str, Tensor]
    keys: Mapping[str, str]
    naming: Naming
    left_out: tuple[str, ...] = ()

    def check(self, expected: Mapping[str, Tensor]) -> None:
        """Every name and shape must be the network's. Raises ValueError that counts and names the first differences."""
        missing = [self.naming.shown(name) for name in sorted(expected.keys() - self.tensors.keys())]
        extra = [self.keys[name] for name in sorted(self.tensors.keys() - expected.keys())]
        if missing or extra:
            parts = [f"{len(missing)} tensors are missing: {listed(missing)}"] if missing else []
            parts += [f"{len(extra)} are too many: {listed(extra)}"] if extra else []
            raise ValueError(f"{self.source} does not fit the network, {' and '.join(parts)}; nothing was loaded")
        wrong = [
            f"{self.keys[name]} is {list(tensor.shape)}, needed {list(expected[name].shape)}"
            for name, tensor in self.tensors.items()
            if tensor.shape != expected[name].shape
        ]
        if wrong:
            raise ValueError(
                f"{self.source} does not fit the network, {len(wrong)} shapes differ: {listed(wrong)}; nothing was "
                f"loaded"
            )


def read_weights(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> WanWeights:
    """The generator's tensors of a state dict, in whichever names it has, fitted to a network's state dict.

    A patch embedding that was flattened to [C, in · patch] gets its shape back; nothing is copied. Raises ValueError
    for unknown, missing and repeated keys, other shapes, and tensors that are no floating-point numbers.
    """
    plain = {key: plain_name(key) for key in state}
    left_out = tuple(sorted(key for key, name in plain.items() if _is_left_out(key, name)))
    naming = read_names({key: name for key, name in plain.items() if key not in set(left_out)}, source)
    _check_numbers({key: state[key] for key in naming.names}, source)
    tensors = {name: _unflattened(name, state[key], expected) for key, name in naming.names.items()}
    weights = WanWeights(source, tensors, {name: key for key, name in naming.names.items()}, naming, left_out)
    weights.check(expected)
    return weights


def _is_left_out(key: str, name: str) -> bool:
    return name in NOT_PARAMETERS or any(text.startswith(OTHER_NETWORKS) for text in (key, name))


def _check_numbers(state: Mapping[str, Tensor], source: str) -> None:
    wrong = sorted(f"{key} ({tensor.dtype})" for key, tensor in state.items() if not tensor.is_floating_point())
    if wrong:
        raise ValueError(f"{source} holds {len(wrong)} tensors that are no floating-point weights: {listed(wrong)}")


def _unflattened(name: str, tensor: Tensor, expected: Mapping[str, Tensor]) -> Tensor:
    if name != "patch_embedding.weight" or tensor.ndim != 2 or name not in expected:
        return tensor
    shape = expected[name].shape
    fits = tensor.shape[0] == shape[0] and tensor.numel() == shape.numel()
    return tensor.reshape(shape) if fits else tensor


def holds_lora(keys: Iterable[str]) -> bool:
    """Whether there are adapters among the keys of a file."""
    return any(".lora_A." in key or ".lora_B." in key for key in keys)
