"""Kind l1: the NFT loss in x0 space (released), in velocity space (paper) and as DiffusionNFT has it."""

from collections.abc import Iterator

import torch
from torch import Tensor

from framework.flow import add_noise, velocity_distance, velocity_target, x0_from_velocity
from strategies.regularizers.velocity_kl import batch_normalised, masked_mean
from strategies.surrogates.nft import adaptive_branch_losses, branch_losses, nft_gradient, nft_loss, preference
from tests.golden.backbone import precision
from tests.golden.case import Case, Row, compare, scaled_difference

INPUTS: tuple[str, ...] = ("x0", "noise", "sigma", "advantages", "mask", "v_theta", "v_old", "v_ref")
NOT_TAKEN_UP: tuple[str, ...] = ()
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def check(case: Case) -> list[Row]:
    """All three forms, in both precisions."""
    return [
        compare(case, tensor, actual, tolerance, precision(dtype), scaled_difference)
        for dtype, tolerance in TOLERANCE.items()
        for tensor, actual in compute(case, dtype)
    ]


def compute(case: Case, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every expected tensor by name."""
    beta, kl_weight = case.hparam("beta"), case.hparam("kl_weight")
    x0, noise, v_theta, v_old, v_ref = (case[name].to(dtype) for name in ("x0", "noise", "v_theta", "v_old", "v_ref"))
    sigma = case["sigma"].to(dtype).view(-1, *[1] * (x0.ndim - 1))
    x_t = add_noise(x0, noise, sigma)
    mask = case["mask"]
    r = preference(case["advantages"].to(dtype), case.hparam("adv_clip_max"))
    yield "r", r

    x_theta, x_old, x_ref = (x0_from_velocity(x_t, v, sigma) for v in (v_theta, v_old, v_ref))
    masks = {"full_kl": torch.ones_like(mask), "selective_kl": mask, "empty_mask": torch.zeros_like(mask)}
    forms = (
        ("x0", "x", x_theta, x_old, x_ref, x0, ("full_kl", "selective_kl", "empty_mask")),
        ("v", "v", v_theta, v_old, v_ref, velocity_target(x0, noise), ("full_kl", "selective_kl")),
    )
    for space, letter, theta, old, reference, target, kinds in forms:
        for kind in kinds:
            current = theta.detach().requires_grad_()
            positive, negative = branch_losses(current, old, target, beta)
            policy = nft_loss(current, old, target, r, beta)
            kl = masked_mean(velocity_distance(current, reference), masks[kind])
            total = policy.mean() + kl_weight * kl
            (gradient,) = torch.autograd.grad(total, current)
            yield f"{space}.{kind}.loss_pos", positive
            yield f"{space}.{kind}.loss_neg", negative
            yield f"{space}.{kind}.policy_per_sample", policy
            yield f"{space}.{kind}.kl", kl
            yield f"{space}.{kind}.total", total
            yield f"{space}.{kind}.grad_{letter}_theta", gradient
    yield "x0.policy_grad_closed_form", nft_gradient(x_theta, x_old, x0, r, beta) / len(x0)
    yield "v.selective_kl_batch_normalised", batch_normalised(velocity_distance(v_theta, v_ref), mask)

    current = v_theta.detach().requires_grad_()
    positive, negative, weight_positive, weight_negative = adaptive_branch_losses(current, v_old, x_t, x0, sigma, beta)
    policy = (r * positive + (1 - r) * negative) / beta
    kl = velocity_distance(current, v_ref).mean()
    mean_policy = case.hparam("adv_clip_max") * policy.mean()
    total = mean_policy + kl_weight * kl
    (gradient,) = torch.autograd.grad(total, current)
    yield "diffusion_nft.loss_pos", positive
    yield "diffusion_nft.loss_neg", negative
    yield "diffusion_nft.weight_pos", weight_positive
    yield "diffusion_nft.weight_neg", weight_negative
    yield "diffusion_nft.policy_per_sample", policy
    yield "diffusion_nft.policy", mean_policy
    yield "diffusion_nft.kl", kl
    yield "diffusion_nft.total", total
    yield "diffusion_nft.grad_v_theta", gradient
