"""The map of original Wan names is a bijection onto the model's state dict and refuses what it does not know."""

import pytest
import torch

from backbones.wan.checkpoints import diffusers_name, to_diffusers_keys
from tests.backbones.micro import micro_network

LAYERS = 2


def original_names() -> list[str]:
    """All names of an original text-to-video checkpoint, listed by hand."""
    names = [
        f"{module}.{parameter}"
        for module in (
            "patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2",
            "time_projection.1", "head.head",
        )
        for parameter in ("weight", "bias")
    ]  # fmt: skip
    names.append("head.modulation")
    for i in range(LAYERS):
        names.append(f"blocks.{i}.modulation")
        for attention in ("self_attn", "cross_attn"):
            names += [f"blocks.{i}.{attention}.{part}.{p}" for part in "qkvo" for p in ("weight", "bias")]
            names += [f"blocks.{i}.{attention}.norm_{part}.weight" for part in "qk"]
        names += [f"blocks.{i}.{module}.{p}" for module in ("norm3", "ffn.0", "ffn.2") for p in ("weight", "bias")]
    return names


def test_every_parameter_has_exactly_one_original_name():
    names = original_names()
    assert len(names) == 15 + LAYERS * 27
    assert sorted(to_diffusers_keys(dict.fromkeys(names, torch.zeros(1)))) == sorted(micro_network().state_dict())


def test_tensors_pass_through_untouched():
    tensor = torch.randn(2)
    assert to_diffusers_keys({"blocks.11.norm3.weight": tensor})["blocks.11.norm2.weight"] is tensor


@pytest.mark.parametrize(
    "unknown",
    [
        "model.patch_embedding.weight",
        "blocks.0.self_attn.norm_q.bias",
        "blocks.0.norm2.weight",
        "blocks.x.modulation",
        "modulation",
        "patch_embedding.weight.lora_A",
        "",
        "weight",
    ],
)
def test_an_unknown_name_is_refused_and_named(unknown: str):
    assert diffusers_name(unknown) is None
    known = {"head.modulation": torch.zeros(1)}
    with pytest.raises(ValueError, match="not parameters of a text-to-video Wan checkpoint") as error:
        to_diffusers_keys({**known, unknown: torch.zeros(1)})
    assert unknown in str(error.value) and "head.modulation" not in str(error.value)


def test_the_affine_norm_is_the_one_before_the_cross_attention():
    """Swapping norm2 and norm3 is the classic error of this map; norm3 has no parameters in diffusers."""
    assert diffusers_name("blocks.0.norm3.weight") == "blocks.0.norm2.weight"
    assert "blocks.0.norm3.weight" not in micro_network().state_dict()
