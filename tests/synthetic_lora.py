"""Golden cases of kind b7 with other ranks, alphas and targets than the packaged one, by the dense oracle."""

from collections.abc import Sequence

import torch
from torch import Tensor

from backbones.wan.checkpoints import diffusers_name
from tests.backbones.micro import noise
from tests.golden.case import Case
from tests.synthetic_golden import LATENT_HW, MODEL, Oracle, spans_of


@torch.no_grad()
def lora_case(
    lengths: Sequence[int], rank: int, alpha: float, targets: Sequence[str], sink: int, window: int | None,
    batch: int = 1,
) -> Case:  # fmt: skip
    """The oracle asked with its weights and with W + (alpha / rank) B A. targets: ends of original module names."""
    oracle = Oracle(batch, spans_of(lengths), sink, window, False)
    x, history = oracle.draw(5), oracle.draw(6)
    times = torch.linspace(950, 50, len(lengths)).double()
    base = oracle.packed(x, history, times.expand(batch, -1)).float()
    lora: dict[str, Tensor] = {}
    for i, (name, weight) in enumerate(sorted(oracle.weights.items())):
        module = name.removesuffix(".weight")
        if weight.ndim != 2 or not any(module == target or module.endswith(f".{target}") for target in targets):
            continue
        a, b = noise(100 + i, rank, weight.shape[1]).float() / 4, noise(200 + i, weight.shape[0], rank).float() / 4
        lora |= {f"lora.base_model.model.{module}.lora_{half}.weight": t for half, t in (("A", a), ("B", b))}
        key = str(diffusers_name(name))
        oracle.wide[key] = oracle.wide[key] + alpha / rank * (b.double() @ a.double())
    tensors = {
        **oracle.inputs(), **lora, "probe_x": x, "probe_history": history, "probe_timesteps": times,
        "probe_velocity_base": base, "probe_velocity_lora": oracle.packed(x, history, times.expand(batch, -1)).float(),
    }  # fmt: skip
    hparams = {
        "model": MODEL, "batch": batch, "latent_hw": LATENT_HW, "blocks": len(lengths), "frames_per_block": lengths[-1],
        "sink": sink, "window": window, "lora_rank": rank, "lora_alpha": alpha, "lora_targets": list(targets),
    }  # fmt: skip
    return Case("b7_synthetic", hparams, tensors)
