"""Names of a Wan checkpoint: the original parameter names mapped to those of diffusers.

The map goes by exact module path, so a name it does not know is an error and never a silently dropped tensor.
Text-to-video only: image-conditioning tensors are unknown here, as they are to `CausalWanTransformer3DModel`.
"""

import re
from collections.abc import Mapping

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

_BLOCK = re.compile(r"(blocks\.\d+\.)(.+)")


def diffusers_name(original: str) -> str | None:
    """The diffusers name of an original Wan parameter, None for a name the map does not know."""
    block = _BLOCK.fullmatch(original)
    prefix, name = block.groups() if block else ("", original)
    if name == ("modulation" if block else "head.modulation"):
        return f"{prefix}scale_shift_table"
    module, _, parameter = name.rpartition(".")
    if block and module in BLOCK_NORMS:
        return f"{prefix}{BLOCK_NORMS[module]}.weight" if parameter == "weight" else None
    path = (BLOCK_MODULES if block else MODULES).get(module)
    return f"{prefix}{path}.{parameter}" if path and parameter in ("weight", "bias") else None


def to_diffusers_keys(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with original Wan names → the same tensors under their diffusers names.

    Raises ValueError that lists the names the map does not know.
    """
    names = {original: diffusers_name(original) for original in state_dict}
    unknown = sorted(original for original, name in names.items() if name is None)
    if unknown:
        shown = ", ".join(unknown[:8]) + (f" and {len(unknown) - 8} more" if len(unknown) > 8 else "")
        raise ValueError(f"not parameters of a text-to-video Wan checkpoint: {shown}; strip prefixes before mapping")
    return {name: state_dict[original] for original, name in names.items() if name is not None}
