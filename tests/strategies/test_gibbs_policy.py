"""The Gibbs policy is a distribution that only differences of energies move; its ratio is clipped as PPO clips."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from strategies.surrogates.gibbs_tve import (
    AutoTemperature,
    auto_temperature,
    branch_ratio,
    clip_acts,
    clipped_surrogate,
    energy_gradient,
    log_gibbs,
    trajectory_velocity_energy,
)
from tests.support import close, holds, normal, over, refuted

SEEDS = st.integers(0, 2**20)


# groups of branches with one anchor each, anywhere among them


@dataclass(frozen=True)
class Batch:
    """Energies [N, S] of a few groups, ids side by side; one anchor a group."""

    energies: Tensor
    groups: Tensor
    branches: Tensor
    seed: int


@st.composite
def batches(draw, anchored: bool = True) -> Batch:
    prompts, size, seed = draw(st.integers(1, 3)), draw(st.integers(2, 6)) + anchored, draw(SEEDS)
    ids = draw(st.lists(st.integers(0, 10**6), min_size=prompts, max_size=prompts, unique=True))
    anchors = torch.zeros(prompts, size, dtype=torch.bool)
    if anchored:
        anchors[torch.arange(prompts), draw(st.integers(0, size - 1))] = True
    energies = normal(seed, prompts * size, draw(st.integers(1, 3))).square()
    return Batch(energies, torch.tensor(ids).repeat_interleave(size), ~anchors.flatten(), seed)


LogPolicy = Callable[[Tensor, Tensor | float, Tensor, Tensor], Tensor]


def over_the_batch(energies: Tensor, tau: Tensor | float, groups: Tensor, branches: Tensor) -> Tensor:
    """A planted error: one distribution over all prompts."""
    return log_gibbs(energies, tau, torch.zeros_like(groups), branches)


def with_the_anchor(energies: Tensor, tau: Tensor | float, groups: Tensor, branches: Tensor) -> Tensor:
    """A planted error: the anchor is a candidate."""
    return log_gibbs(energies, tau, groups, torch.ones_like(branches)).where(branches, 0)


def upside_down(energies: Tensor, tau: Tensor | float, groups: Tensor, branches: Tensor) -> Tensor:
    """A planted error: energy as reward."""
    return log_gibbs(-energies, tau, groups, branches)


def without_normaliser(energies: Tensor, tau: Tensor | float, groups: Tensor, branches: Tensor) -> Tensor:
    return (-(energies / tau).mean(1)).where(branches, 0)


def check_distribution(log_policy: LogPolicy, batch: Batch, tau: float) -> None:
    """Positive, of sum 1 over the branches of each group, 0 at anchors; against a loop over the groups."""
    log_prob = log_policy(batch.energies, tau, batch.groups, batch.branches)
    assert bool((log_prob[~batch.branches] == 0).all())
    for group in batch.groups.unique():
        rows = (batch.groups == group) & batch.branches
        probabilities = log_prob[rows].exp()
        assert bool((probabilities > 0).all()) and abs(probabilities.sum() - 1) < 1e-12
        weights = [math.exp(-energy / tau) for energy in batch.energies[rows].mean(1).tolist()]
        close(probabilities, torch.tensor(weights, dtype=torch.float64) / sum(weights), atol=1e-12)


TAUS = st.floats(0.1, 10.0)


def test_probabilities_are_positive_and_sum_to_one_in_every_group():
    holds(partial(check_distribution, log_gibbs), batches(), TAUS)


@pytest.mark.parametrize("mutant", [over_the_batch, with_the_anchor, upside_down, without_normaliser])
def test_the_distribution_check_sees_other_candidates_and_signs(mutant: LogPolicy):
    refuted(partial(check_distribution, mutant), batches(), TAUS)


def check_differences_only(log_policy: LogPolicy, batch: Batch, tau: float, shift: float) -> None:
    """A constant per group changes nothing, however the anchor moved; lower energies are likelier."""
    log_prob = log_policy(batch.energies, tau, batch.groups, batch.branches)
    per_group = shift * batch.groups.to(torch.float64).sub(batch.groups[0]).sign().add(2).unsqueeze(1)
    moved = batch.energies + per_group + 3 * (~batch.branches).double().unsqueeze(1)
    close(log_policy(moved, tau, batch.groups, batch.branches), log_prob, atol=1e-10)
    energy = batch.energies.mean(1)
    for i, j in itertools.product(range(len(energy)), repeat=2):
        if batch.groups[i] == batch.groups[j] and batch.branches[i] and batch.branches[j] and energy[i] < energy[j]:
            assert log_prob[i] > log_prob[j]


def test_only_differences_of_energies_count_and_lower_is_likelier():
    holds(partial(check_differences_only, log_gibbs), batches(), TAUS, st.floats(-5, 5))


@pytest.mark.parametrize("mutant", [over_the_batch, with_the_anchor, upside_down, without_normaliser])
def test_the_difference_check_sees_absolute_energies(mutant: LogPolicy):
    refuted(partial(check_differences_only, mutant), batches(), TAUS, st.floats(-5, 5))


def check_temperature(log_policy: LogPolicy, batch: Batch, tau: float, scale: float) -> None:
    """(E, τ) and (cE, cτ) are one policy; hot is uniform, cold is the lowest energy."""
    arguments = batch.groups, batch.branches
    close(
        log_policy(scale * batch.energies, scale * tau, *arguments), log_policy(batch.energies, tau, *arguments), 1e-9
    )
    hot, cold = (log_policy(batch.energies, t, *arguments).exp() for t in (1e9, 1e-9))
    for group in batch.groups.unique():
        rows = (batch.groups == group) & batch.branches
        close(hot[rows], torch.full_like(hot[rows], 1 / int(rows.sum())), atol=1e-7)
        assert cold[rows].argmax() == batch.energies[rows].mean(1).argmin() and cold[rows].max() > 1 - 1e-6


def forgetting_tau(energies: Tensor, tau: Tensor | float, groups: Tensor, branches: Tensor) -> Tensor:
    return log_gibbs(energies, 1.0, groups, branches)


def squaring_tau(energies: Tensor, tau: float, groups: Tensor, branches: Tensor) -> Tensor:
    return log_gibbs(energies, tau * tau, groups, branches)


def test_temperature_is_the_unit_of_energy():
    holds(partial(check_temperature, log_gibbs), batches(), TAUS, st.floats(0.01, 100))


@pytest.mark.parametrize("mutant", [forgetting_tau, squaring_tau, upside_down])
def test_the_temperature_check_sees_another_unit(mutant: LogPolicy):
    refuted(partial(check_temperature, mutant), batches(), TAUS, st.floats(0.01, 100))


# the automatic temperature

Auto = Callable[..., Tensor]


def check_auto_temperature(auto: Auto, batch: Batch, scale: float) -> None:
    """Unit deviation per step over the branches, equal in a group, in proportion to the energies, no gradient."""
    energies = batch.energies.clone().requires_grad_()
    tau = auto(energies, batch.groups, batch.branches, 0.0, 1e-12)
    assert tau.shape == energies.shape and not tau.requires_grad and bool((tau > 0).all())
    for group in batch.groups.unique():
        rows = batch.groups == group
        assert bool((tau[rows] == tau[rows][0]).all())
        logits = -batch.energies[rows & batch.branches] / tau[rows & batch.branches]
        close(logits.std(0, correction=0), torch.ones(logits.shape[1]), atol=1e-9)
    close(auto(scale * batch.energies, batch.groups, batch.branches, 0.0, 1e-12), scale * tau, 1e-9, 1e-9)


def of_the_batch(energies: Tensor, groups: Tensor, branches: Tensor, relative: float, floor: float) -> Tensor:
    return auto_temperature(energies, torch.zeros_like(groups), branches, relative, floor)


def of_the_anchor_too(energies: Tensor, groups: Tensor, branches: Tensor, relative: float, floor: float) -> Tensor:
    return auto_temperature(energies, groups, torch.ones_like(branches), relative, floor)


def one_for_all_steps(energies: Tensor, groups: Tensor, branches: Tensor, relative: float, floor: float) -> Tensor:
    mean = energies.mean(1, keepdim=True).expand_as(energies)
    return auto_temperature(mean, groups, branches, relative, floor)


def test_the_automatic_temperature_gives_every_step_unit_deviation():
    holds(partial(check_auto_temperature, auto_temperature), batches(), st.floats(0.1, 10))


@pytest.mark.parametrize("mutant", [of_the_batch, of_the_anchor_too, one_for_all_steps])
def test_the_automatic_temperature_check_sees_another_spread(mutant: Auto):
    refuted(partial(check_auto_temperature, mutant), batches(), st.floats(0.1, 10))


@over(batches())
def test_a_group_without_spread_gets_the_floor_and_stays_finite(batch: Batch):
    level = torch.full_like(batch.energies, 0.7)
    tau = auto_temperature(level, batch.groups, batch.branches, 0.01, 1e-8)
    close(tau, torch.full_like(tau, 0.007), atol=1e-12)
    nothing = AutoTemperature()(torch.zeros_like(level), batch.groups, batch.branches)
    close(nothing, torch.full_like(tau, 1e-8), atol=1e-18)


# energies


def check_energy(energy: Callable[..., Tensor], seed: int, blocks: int, weighted: bool) -> None:
    """Against loops over clips, steps, blocks and elements; a mean, so that more of the same changes nothing."""
    shape = (2, 3, 2, 3 * blocks, 2, 2)
    velocity, recorded = normal(seed, *shape), normal(seed + 1, *shape)
    weight = normal(seed + 2, 2, 3, 1, 3 * blocks, 1, 1).square() if weighted else 1.0
    out = energy(velocity, recorded, weight)
    for n, k in itertools.product(range(2), range(3)):
        residual = (recorded[n, k] - velocity[n, k]).square() * (weight[n, k] if isinstance(weight, Tensor) else 1.0)
        per_block = [residual[:, 3 * b : 3 * b + 3].mean() for b in range(blocks)]
        close(out[n, k], sum(per_block) / blocks, atol=1e-12)


def summed_over_blocks(velocity: Tensor, recorded: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    return velocity.shape[3] // 3 * trajectory_velocity_energy(velocity, recorded, weight)


def test_the_energy_is_a_mean_over_blocks_and_dimensions():
    holds(partial(check_energy, trajectory_velocity_energy), SEEDS, st.integers(1, 3), st.booleans())


def test_the_energy_check_sees_a_sum_over_blocks():
    refuted(partial(check_energy, summed_over_blocks), SEEDS, st.integers(1, 3), st.booleans())


Energy = Callable[..., Tensor]


def check_count_does_not_matter(energy: Energy, batch: Batch, blocks: int, repeats: int) -> None:
    """Equal residuals in every block and step: neither the number of blocks nor that of steps moves π."""
    offset = batch.energies[:, :1].sqrt()

    def policy(steps: int, frames: int) -> Tensor:
        recorded = torch.zeros(len(offset), steps, 2, frames, 1, 1, dtype=torch.float64)
        velocity = recorded + offset.view(-1, 1, 1, 1, 1, 1)
        return log_gibbs(energy(velocity, recorded), 0.4, batch.groups, batch.branches)

    close(policy(repeats, 3 * blocks), policy(1, 3), atol=1e-10)


def test_the_number_of_blocks_and_steps_does_not_move_the_policy():
    holds(
        partial(check_count_does_not_matter, trajectory_velocity_energy),
        batches(),
        st.integers(1, 4),
        st.integers(1, 4),
    )


def test_the_count_check_sees_summed_energies():
    refuted(partial(check_count_does_not_matter, summed_over_blocks), batches(), st.integers(1, 4), st.integers(1, 4))


def test_energies_of_half_precision_velocities_are_float32():
    velocity, recorded = normal(0, 2, 1, 2, 3, 2, 2), normal(1, 2, 1, 2, 3, 2, 2)
    assert trajectory_velocity_energy(velocity.bfloat16(), recorded.bfloat16()).dtype == torch.float32
    assert trajectory_velocity_energy(velocity, recorded).dtype == torch.float64


# ratio and clip

Surrogate = Callable[[Tensor, Tensor, float, float], Tensor]
LOWER, UPPER = 0.9, 1.2


def check_clip_regions(surrogate: Surrogate, distance: float, size: float) -> None:
    """Winners go on above the upper bound and losers below the lower one unseen; the four other cases have slope A."""
    for sign, (ratio, flat_for) in itertools.product(
        (1, -1), ((UPPER + distance, 1), (LOWER * (1 - distance), -1), (1.0, 0))
    ):
        at, advantage = torch.tensor([ratio], requires_grad=True), torch.tensor([sign * size])
        value = surrogate(at, advantage, LOWER, UPPER)
        (slope,) = torch.autograd.grad(value.sum(), at)
        flat = sign == flat_for
        close(slope, torch.zeros(1) if flat else advantage, atol=1e-6)
        bound = UPPER if ratio > 1 else LOWER
        close(value.detach(), advantage * (bound if flat else ratio), atol=1e-6)
        below, above = clip_acts(at.detach(), advantage, LOWER, UPPER)
        assert bool(below | above) == flat


def clipped_both_ways(ratio: Tensor, advantage: Tensor, lower: float, upper: float) -> Tensor:
    return ratio.clamp(lower, upper) * advantage


def pessimism_forgotten(ratio: Tensor, advantage: Tensor, lower: float, upper: float) -> Tensor:
    return torch.maximum(ratio * advantage, ratio.clamp(lower, upper) * advantage)


def test_the_surrogate_is_flat_exactly_where_the_clip_acts():
    holds(partial(check_clip_regions, clipped_surrogate), st.floats(0.01, 0.9), st.floats(0.1, 3))


@pytest.mark.parametrize(
    "mutant", [clipped_both_ways, pessimism_forgotten, lambda ratio, advantage, lower, upper: ratio * advantage]
)
def test_the_clip_check_sees_another_minimum(mutant: Surrogate):
    refuted(partial(check_clip_regions, mutant), st.floats(0.01, 0.9), st.floats(0.1, 3))


def test_a_ratio_neither_overflows_nor_moves_the_old_policy():
    far = torch.tensor([200.0, -200.0], requires_grad=True)
    close(branch_ratio(far, torch.zeros(2)).detach().log(), torch.tensor([20.0, -20.0]), atol=1e-5)
    old = torch.zeros(2, requires_grad=True)
    assert not branch_ratio(torch.zeros(2), old).requires_grad


Slope = Callable[[Tensor, Tensor, Tensor, float, float, float], Tensor]


def check_energy_gradient(closed: Slope, seed: int, size: int, tau: float, away: float) -> None:
    """Autograd of L through ratio and softmax against the closed form, at θ = old and where clips act."""
    old, advantage = normal(seed, size, 1).square(), 2 * normal(seed + 1, size)
    energies = (old + away * normal(seed + 2, size, 1)).requires_grad_()
    groups, branches = torch.zeros(size, dtype=torch.long), torch.ones(size, dtype=torch.bool)
    log_prob, log_prob_old = (log_gibbs(e, tau, groups, branches) for e in (energies, old))
    ratio = branch_ratio(log_prob, log_prob_old)
    loss = -clipped_surrogate(ratio, advantage, LOWER, UPPER).mean()
    (gradient,) = torch.autograd.grad(loss, energies)
    expected = closed(log_prob.detach(), ratio.detach(), advantage, LOWER, UPPER, tau)
    close(gradient.squeeze(1), expected, atol=1e-11 / tau)


def without_baseline(log_prob, ratio, advantage, lower, upper, tau):
    return ratio * advantage / (len(ratio) * tau)


def without_clip(log_prob, ratio, advantage, lower, upper, tau):
    return energy_gradient(log_prob, ratio, advantage, 0.0, math.inf, tau)


def as_at_old(log_prob, ratio, advantage, lower, upper, tau):
    return energy_gradient(log_prob, torch.ones_like(ratio), advantage, lower, upper, tau)


GRADIENT_DRAWS = SEEDS, st.integers(2, 9), st.floats(0.2, 3.0), st.sampled_from([0.0, 0.05, 0.5])


def test_the_gradient_with_respect_to_energies_has_a_closed_form():
    holds(partial(check_energy_gradient, energy_gradient), *GRADIENT_DRAWS)


@pytest.mark.parametrize("mutant", [without_baseline, without_clip, as_at_old])
def test_the_gradient_check_sees_a_missing_term(mutant: Slope):
    refuted(partial(check_energy_gradient, mutant), *GRADIENT_DRAWS)
