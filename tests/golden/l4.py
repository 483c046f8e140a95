"""Kind l4: KVPO's energies, Gibbs policies, clipped ratio loss, discrete KL and gates, as the paper and as released."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from framework.anchored_advantages import AnyBranchBeatsAnchor
from strategies.regularizers.branch_kl import branch_kl
from strategies.surrogates.gibbs_tve import (
    branch_ratio,
    clipped_surrogate,
    energy_gradient,
    log_gibbs,
    trajectory_velocity_energy,
)
from tests.golden.backbone import precision
from tests.golden.case import Case, Row, compare, largest_difference, scaled_difference

INPUTS: tuple[str, ...] = ("advantages", "sigma", "z", "v_target", "v_theta", "v_old", "v_ref")
NOT_TAKEN_UP: tuple[str, ...] = ()
TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-5}
GRADIENT_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
RELEASED_KL_EPS = 1e-10
"""Added to π_θ inside the logarithm of the released KL; the case describes it in words."""


def relative_to_largest(actual: Tensor, expected: Tensor) -> float:
    """max |actual − expected| / max |expected|; the absolute difference from an expected zero."""
    largest = float(expected.abs().max())
    return largest_difference(actual, expected) / (largest if largest > 0 else 1.0)


def check(case: Case) -> list[Row]:
    """Both forms, in both precisions."""
    return [
        compare(case, tensor, actual, GRADIENT_TOLERANCE[dtype], precision(dtype) + how, relative_to_largest)
        if ".grad_" in tensor
        else compare(case, tensor, actual, TOLERANCE[dtype], precision(dtype) + how, scaled_difference)
        for dtype in TOLERANCE
        for form in (paper, released)
        for tensor, actual, how in form(case, dtype)
    ]


def step_first(case: Case, name: str, dtype: torch.dtype) -> Tensor:
    """Velocities [G, blocks, steps, D] with the step behind the branch: [G, steps, blocks, D]."""
    return case[name].to(dtype).transpose(1, 2)


def in_one_group(case: Case) -> tuple[Tensor, Tensor]:
    """(group ids, who is a branch): all of one group, no anchor among them."""
    count = len(case["advantages"])
    return torch.zeros(count, dtype=torch.long), torch.ones(count, dtype=torch.bool)


def gradient(case: Case, name: str, dtype: torch.dtype, loss_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """(loss, its gradient [G, blocks, steps, D]) at one of the case's velocities."""
    velocity = step_first(case, name, dtype).clone().requires_grad_()
    loss = loss_of(velocity)
    (slope,) = torch.autograd.grad(loss, velocity)
    return loss.detach(), slope.transpose(1, 2)


def paper(case: Case, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, str]]:
    """Mean energies at a temperature."""
    tau, (lower, upper), kl_coef = (case.hparam(name) for name in ("tau", "clip", "kl_coef"))
    groups, branches = in_one_group(case)
    advantage, target = case["advantages"].to(dtype), step_first(case, "v_target", dtype)

    def log_policy(velocity: Tensor) -> Tensor:
        return log_gibbs(trajectory_velocity_energy(velocity, target), tau, groups, branches)

    old, reference = (log_policy(step_first(case, name, dtype)) for name in ("v_old", "v_ref"))

    def clip_loss(velocity: Tensor) -> Tensor:
        return -clipped_surrogate(branch_ratio(log_policy(velocity), old), advantage, lower, upper).mean()

    def whole_loss(velocity: Tensor) -> Tensor:
        return clip_loss(velocity) + kl_coef * branch_kl(log_policy(velocity), reference, groups)[0]

    for policy, suffix in (("v_theta", ""), ("v_old", "_old"), ("v_ref", "_ref")):
        velocity = step_first(case, policy, dtype)
        energy = trajectory_velocity_energy(velocity, target)
        yield f"paper.energy_mean{suffix}", energy.mean(1), ""
        yield f"paper.energy_sum{suffix}", target.shape[2] * energy.sum(1), ""
        yield f"paper.log_pi{suffix}", log_policy(velocity), ""

    current = log_policy(step_first(case, "v_theta", dtype))
    yield "paper.ratio", branch_ratio(current, old), ""
    yield "paper.kl", branch_kl(current, reference, groups)[0], ""
    yield "paper.loss_clip", clip_loss(step_first(case, "v_theta", dtype)), ""
    loss, slope = gradient(case, "v_theta", dtype, whole_loss)
    yield "paper.loss", loss, ""
    yield "paper.grad_v_theta", slope, ""
    beaten_by_the_anchor = -advantage.abs()
    yield "paper.gate_zero_loss", loss * AnyBranchBeatsAnchor()(beaten_by_the_anchor, groups, branches)[0], ""

    yield "paper.grad_v_theta_at_old", gradient(case, "v_old", dtype, clip_loss)[1], ""
    at_old = step_first(case, "v_old", dtype)
    per_energy = energy_gradient(old, torch.ones_like(old), advantage, lower, upper, tau)
    closed = per_energy[:, None, None, None] * 2 * (at_old - target) / target[0].numel()
    yield "paper.grad_v_theta_at_old", closed.transpose(1, 2), ", closed form"


def released(case: Case, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, str]]:
    """Summed x0 residuals without a temperature, a gradient through the first steps, and two gates."""
    (lower, upper), kl_coef, graded = (case.hparam(name) for name in ("clip", "kl_coef", "grad_steps_released"))
    groups, branches = in_one_group(case)
    advantage, target = case["advantages"].to(dtype), step_first(case, "v_target", dtype)
    sigma = case["sigma"].to(dtype).view(1, -1, 1, 1)
    # x̂0 − x0_θ = σ (v_θ − v̂) at the same state, so the released divisor is part of the weight of a velocity energy
    weight = sigma.square() / (2 * sigma.clamp(min=case.hparam("sigma_floor_released")).square())

    def score(velocity: Tensor) -> Tensor:
        energy = trajectory_velocity_energy(velocity, target, weight)
        return -target.shape[2] * torch.cat([energy[:, :graded], energy[:, graded:].detach()], 1).sum(1)

    def log_policy(velocity: Tensor) -> Tensor:
        return log_gibbs(-score(velocity).unsqueeze(1), 1.0, groups, branches)

    old, reference = (log_policy(step_first(case, name, dtype)) for name in ("v_old", "v_ref"))

    def parts(velocity: Tensor) -> tuple[Tensor, Tensor]:
        current = log_policy(velocity)
        clip_loss = -clipped_surrogate(branch_ratio(current, old), advantage, lower, upper).mean()
        return clip_loss, branch_kl(current, reference, groups, RELEASED_KL_EPS)[0]

    for policy, suffix in (("v_theta", ""), ("v_old", "_old"), ("v_ref", "_ref")):
        yield f"released.score{suffix}", score(step_first(case, policy, dtype)), ""
    current = log_policy(step_first(case, "v_theta", dtype))
    ratio = branch_ratio(current, old)
    clip_loss, kl = parts(step_first(case, "v_theta", dtype))
    yield "released.pi", current.exp(), ""
    yield "released.ratio", ratio, ""
    yield "released.loss_clip", clip_loss, ""
    yield "released.kl", kl, ""
    yield "released.clip_fraction", ((ratio < lower) | (ratio > upper)).to(dtype).mean(), ""

    def whole_loss(velocity: Tensor) -> Tensor:
        clip_loss, kl = parts(velocity)
        return clip_loss + kl_coef * kl

    loss, slope = gradient(case, "v_theta", dtype, whole_loss)
    # the shipped gate appends an anchor of logit 0 to *normalised* log-probabilities: π_anchor = 1/2, whatever they are
    halved = float(1 - torch.cat([current, current.new_zeros(1)]).softmax(0)[-1])
    for mechanism, unsafe in (("mechanism_1", 0.0), ("mechanism_2", halved)):
        for verdict, scale in (("safe", 1.0), ("unsafe", unsafe)):
            yield f"released.{mechanism}.{verdict}.loss", scale * loss, ""
            yield f"released.{mechanism}.{verdict}.grad_v_theta", scale * slope, ""
