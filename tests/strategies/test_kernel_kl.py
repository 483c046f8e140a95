"""The kernel KL is the divergence of two sampler steps, in the units of the policy term, and alive off equality."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from framework.advantages import GroupRelative
from framework.block_weights import FutureParticipation
from framework.compatibility import IncompatibleRecipe, check_recipe
from framework.kernels import Consistency, FlowGRPO, Ode
from framework.records import KernelShift, Transitions
from framework.types import Objective
from strategies.exploration.noise_endpoint import NoiseEndpoint
from strategies.regularizers.kernel_kl import KernelKL
from strategies.surrogates.gaussian_kernel import (
    GaussianRatio,
    GaussianRegression,
    GaussianReinforce,
    kernel_divergence,
    log_density,
)
from strategies.surrogates.nft import NFT
from strategies.surrogates.transitions import EqualGradient, TrainedSteps
from tests.strategies.test_gaussian_kernel import Drawn, advantages_for, cases, make_tape, near, probed, steps_of
from tests.support import close, holds, normal, over, refuted

SEEDS = st.integers(0, 2**20)
STDS = st.floats(0.1, 2.0)


# the closed form


def check_monte_carlo(divergence, seed: int, std: float) -> None:
    """E_π[log π − log π_ref] over samples of the step, to five standard errors."""
    mean, shift = normal(seed, 1, 1, 2, 1, 2, 2), normal(seed + 1, 1, 1, 2, 1, 2, 2)
    reference, wide = mean + std * shift, torch.full((1, 1), std, dtype=torch.float64)
    samples = mean + std * normal(seed + 2, 4000, 1, 2, 1, 2, 2)
    each = log_density(samples, mean, wide) - log_density(samples, reference, wide)
    error = float(each.std() / len(each) ** 0.5)
    assert abs(float(each.mean()) - float(divergence(mean, reference, wide))) < 5 * error + 1e-12


def without_half(mean: Tensor, reference: Tensor, std: Tensor) -> Tensor:
    return 2 * kernel_divergence(mean, reference, std)


def of_diffusion(mean: Tensor, reference: Tensor, std: Tensor) -> Tensor:
    """Flow-GRPO's release: g² where the variance of a step of D = .25 is g² D."""
    return 0.25 * kernel_divergence(mean, reference, std)


def test_the_closed_form_is_the_mean_log_ratio():
    holds(partial(check_monte_carlo, kernel_divergence), SEEDS, STDS, examples=15)


@pytest.mark.parametrize("mutant", [without_half, of_diffusion])
def test_the_monte_carlo_check_sees_another_factor(mutant):
    refuted(partial(check_monte_carlo, mutant), SEEDS, STDS)


def check_zero_at_equality(divergence, seed: int, std: float) -> None:
    mean, reference = normal(seed, 3, 2, 2, 2, 2, 2), normal(seed + 1, 3, 2, 2, 2, 2, 2)
    wide = torch.full((3, 2), std, dtype=torch.float64)
    asked = mean.clone().requires_grad_()
    still = divergence(asked, mean, wide)
    assert not still.any() and not torch.autograd.grad(still.sum(), asked)[0].any()
    away = divergence(asked, reference, wide)
    assert bool((away > 0).all()) and bool(torch.autograd.grad(away.sum(), asked)[0].all())


def absolute(mean: Tensor, reference: Tensor, std: Tensor) -> Tensor:
    return ((mean - reference).square() + 1e-12).sqrt().flatten(2).mean(2) / std


def test_the_kl_is_zero_with_zero_gradient_at_the_reference_and_alive_elsewhere():
    holds(partial(check_zero_at_equality, kernel_divergence), SEEDS, STDS)


@pytest.mark.parametrize("mutant", [absolute, lambda m, r, s: kernel_divergence(m.detach(), r, s) + 0 * m.sum()])
def test_the_equality_check_sees_another_distance_and_a_dead_gradient(mutant):
    refuted(partial(check_zero_at_equality, mutant), SEEDS, STDS)


# its units


def check_units_of_the_policy_term(kind, penalised, drawn: Drawn, weight: float) -> None:
    """β KL has the value and the gradient of the policy term of a sample at μ_ref with A = β, up to its constant."""
    tape, trained, seed = drawn
    surrogate = kind(trained=trained)
    probes = probed(surrogate, tape, seed)
    reference, velocity = near(probes, seed + 6), near(probes, seed + 5).requires_grad_()
    advantage = advantages_for(probes, seed + 7)
    objective = surrogate.loss({"current": velocity, "reference": reference}, probes, advantage)
    found = penalised(weight, objective)
    kernel = tape[Transitions].kernel
    at_reference = torch.stack(
        [
            torch.stack([kernel.mean(x, v, *pair) for x, v, pair in zip(clip, views, pairs, strict=True)])
            for clip, views, pairs in zip(probes.noisy, reference, steps_of(tape, probes), strict=True)
        ]
    )
    imagined = replace(probes, extra=probes.extra | {"next": at_reference})
    uniform = replace(advantage, values=torch.full_like(advantage.values, weight))
    expected = GaussianReinforce(trained).loss({"current": velocity}, imagined, uniform)
    close(found.detach(), expected.per_clip.detach(), atol=1e-12, rtol=1e-9)
    slopes = [torch.autograd.grad(value.sum(), velocity, retain_graph=True)[0] for value in (found, expected.per_clip)]
    close(slopes[0], slopes[1], atol=1e-12, rtol=1e-9)


def as_shipped(weight: float, objective: Objective) -> Tensor:
    return KernelKL(weight).penalty(objective, None)


def a_hundredth(weight: float, objective: Objective) -> Tensor:
    """The release: λ multiplies the policy term alone."""
    return KernelKL(weight / 100).penalty(objective, None)


WEIGHTS = st.floats(0.01, 3.0)


@pytest.mark.parametrize("kind", [GaussianReinforce, GaussianRegression])
def test_the_kl_is_a_policy_term_towards_the_reference(kind):
    holds(partial(check_units_of_the_policy_term, kind, as_shipped), cases(), WEIGHTS, examples=25)


def test_the_units_check_sees_a_kl_that_is_not_scaled_with_the_policy_term():
    refuted(partial(check_units_of_the_policy_term, GaussianReinforce, a_hundredth), cases(), WEIGHTS)


@over(SEEDS)
def test_marks_and_weight_scale_the_penalty_per_clip(seed: int):
    divergence = normal(seed, 4).square()
    objective = Objective(torch.zeros(4), {KernelShift: KernelShift(divergence)})
    marks = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    close(KernelKL(0.3).penalty(objective, None), 0.3 * divergence, atol=1e-12)
    close(KernelKL(0.3).penalty(objective, marks), 0.3 * marks * divergence, atol=1e-12)


def test_steps_and_blocks_are_weighted_as_in_the_policy_term():
    trained = TrainedSteps(step_weights=EqualGradient(), block_weights=FutureParticipation(-2.0))
    surrogate = GaussianReinforce(trained)
    probes = probed(surrogate, make_tape(FlowGRPO(), 2, 2, 6, 0))
    views = {"current": near(probes, 1), "reference": near(probes, 2)}
    found = surrogate.loss(views, probes, advantages_for(probes, 3)).written[KernelShift].divergence
    plain = GaussianReinforce()
    unweighted = plain.loss(views, probed(plain, make_tape(FlowGRPO(), 2, 2, 6, 0)), advantages_for(probes, 3))
    assert (found - unweighted.written[KernelShift].divergence).abs().min() > 1e-3


# what it fits


@pytest.mark.parametrize("surrogate", [GaussianReinforce(), GaussianRegression(), GaussianRatio()])
def test_it_needs_a_gaussian_surrogate_on_a_stochastic_kernel(surrogate):
    check_recipe(NoiseEndpoint(kernel=Consistency()), surrogate, GroupRelative(), KernelKL())
    with pytest.raises(IncompatibleRecipe, match="Transitions"):
        check_recipe(NoiseEndpoint(kernel=Ode()), surrogate, GroupRelative(), KernelKL())
    with pytest.raises(IncompatibleRecipe, match="KernelKL reads KernelShift"):
        check_recipe(NoiseEndpoint(), NFT(), GroupRelative(), KernelKL())


def test_a_negative_weight_is_refused():
    with pytest.raises(ValueError, match=r"KernelKL\.weight"):
        KernelKL(-1e-3)
