"""The Gibbs policy over the branches of a group: what a deterministic sampler has in place of a likelihood.

KVPO (2605.14278). Branches differ in the history they were shown. Replayed behind the canonical history, the policy
reproduces some of them better than others; the trajectory velocity energy says how well, and a softmax over the group
makes a categorical distribution of it, which a clipped policy-gradient loss can move:

    E_i    = mean over routed blocks, routed steps and dimensions of w(σ) (v̂_i − v_θ(x_i, σ))²
    π_θ(i) = exp(−E_i/τ) / Σ_j exp(−E_j/τ)                         over the branches of a group, the anchor left out
    ρ_i    = exp(clamp(log π_θ(i) − log π_old(i), ±20))
    L      = −(1/G) Σ_i min(ρ_i A_i, clip(ρ_i, 1 − ε_low, 1 + ε_high) A_i)

with v̂_i the velocity recorded under the branch's own history. Its gradient, c_i = ρ_i A_i where the clip does not act
and 0 where it does (derived, tested against autograd; at θ = old, c = A):

    dL/dE_i = (1/(G τ)) (c_i − π_i Σ_j c_j)

A branch whose reward failed is no candidate either: with A = 0 in place of a score it would be pushed by −π Σ_j c_j.

So above-mean branches attract and the others repel without bound, a baseline that all branches share almost cancels,
and drift that all energies share moves neither ρ nor the branch KL: `AnchorShift` is there to see it. The anchor was
recorded under the canonical history: its energy is 0 while θ = old, which is logged.

Deviations. Paper: a sum over blocks and steps; here the mean, so that their number does not change τ. Paper: all steps;
here those that were routed, since the others contribute 0 at θ = old and only dilute E. Released code: residuals of
x̂0, i.e. w = σ² (``space="x0"``), summed, divided by 2 in place of τ, a gradient through the first steps only; and the
context of the replay is noise without a seed, so that ρ ≠ 1 at θ = old.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from framework.advantages import group_mean, group_std
from framework.flow import expand_sigma
from framework.interfaces import GeneratorRecipe, SurrogatePolicy
from framework.records import (
    Anchors,
    AnchorShift,
    BranchLogits,
    Displacements,
    Endpoints,
    EndpointShift,
    Record,
    endpoint_shift,
    written_shift,
)
from framework.rng import Streams
from framework.types import Advantage, Objective, Probes, Statistics, Tape, Views


def trajectory_velocity_energy(velocity: Tensor, recorded: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """⟨w (v̂ − v)²⟩ per clip and step: [N, S, …] → [N, S], in float32 or wider.

    The mean runs over everything behind the step: blocks, channels and pixels. weight: w(σ), broadcast over [N, S, …];
    1 is the paper's energy and σ² that of x̂0 residuals.
    """
    wide = torch.promote_types(velocity.dtype, torch.float32)
    return (weight * (recorded.to(wide) - velocity.to(wide)).square()).flatten(2).mean(2)


def siblings(groups: Tensor, branches: Tensor) -> Tensor:
    """Which clips j are branches of clip i's group: bool [N, N]."""
    return (groups.unsqueeze(1) == groups) & branches


def candidates(branches: Tensor, advantage: Advantage) -> Tensor:
    """The branches that the policy chooses between: bool [N], those that were scored. A group without an active clip,
    whose loss is 0, keeps all of its branches."""
    open_groups = group_mean(advantage.active.double(), advantage.groups) > 0
    return branches & (advantage.active | ~open_groups)


def log_gibbs(energies: Tensor, temperature: Tensor | float, groups: Tensor, branches: Tensor) -> Tensor:
    """log π(i) = ℓ_i − log Σ_j exp ℓ_j with ℓ = −⟨E/τ⟩ over the steps, j over the branches of i's group: [N].

    energies [N, S]; temperature a number or [N, S]; branches: bool [N], False for anchors, whose entry is 0.
    """
    logits = -(energies / temperature).mean(1)
    # dense rather than scattered: sums in a fixed order, so that equal energies give a ratio of exactly 1
    normaliser = logits.expand(len(logits), -1).masked_fill(~siblings(groups, branches), -torch.inf).logsumexp(1)
    return (logits - normaliser).where(branches, 0)


def auto_temperature(energies: Tensor, groups: Tensor, branches: Tensor, relative_floor: float, floor: float) -> Tensor:
    """τ_k = max(std_group(E_k), relative floor × mean_group(E_k), floor) of the old policy's energies [N, S] → [N, S].

    Every step's −E_k/τ_k then has deviation 1 over the branches of a group, so the steps count alike and the deviation
    of their mean is at most 1, reached where they agree.
    """
    columns = energies.detach().unbind(1)
    spread, level = (
        torch.stack([of_group(column, groups, branches) for column in columns], 1)
        for of_group in (group_std, group_mean)
    )
    return torch.maximum(spread, relative_floor * level).clamp(min=floor)


def branch_ratio(log_prob: Tensor, log_prob_old: Tensor, limit: float = 20.0) -> Tensor:
    """ρ = exp(clamp(log π_θ − log π_old, ±limit)); the old policy carries no gradient."""
    return (log_prob - log_prob_old.detach()).clamp(-limit, limit).exp()


def clipped_surrogate(ratio: Tensor, advantage: Tensor, lower: float, upper: float) -> Tensor:
    """min(ρ A, clip(ρ, lower, upper) A), to be made large (PPO, 1707.06347, Eq. 7, with two bounds)."""
    return torch.minimum(ratio * advantage, ratio.clamp(lower, upper) * advantage)


def clip_acts(ratio: Tensor, advantage: Tensor, lower: float, upper: float) -> tuple[Tensor, Tensor]:
    """Where the surrogate is flat: (losers already below the lower bound, winners already above the upper one)."""
    return (ratio < lower) & (advantage < 0), (ratio > upper) & (advantage > 0)


def energy_gradient(
    log_prob: Tensor, ratio: Tensor, advantage: Tensor, lower: float, upper: float, temperature: float
) -> Tensor:
    """dL/dE_i = (1/(G τ)) (c_i − π_i Σ_j c_j) for one group of G branches, all arguments [G]; see the file's head."""
    below, above = clip_acts(ratio, advantage, lower, upper)
    pull = (ratio * advantage).where(~(below | above), 0)
    return (pull - log_prob.exp() * pull.sum()) / (len(pull) * temperature)


class Temperature(ABC):
    """How large a difference of energies is a large one."""

    @abstractmethod
    def __call__(self, old: Tensor, groups: Tensor, branches: Tensor) -> Tensor:
        """τ > 0 per clip and step [N, S], no gradient, from the old policy's energies [N, S]; equal within a group."""


@dataclass(frozen=True)
class FixedTemperature(Temperature):
    """One τ for all groups and steps, in units of the energy."""

    value: float

    def __post_init__(self) -> None:
        if not self.value > 0:
            raise ValueError(f"FixedTemperature.value must be positive, got {self.value}")

    def __call__(self, old: Tensor, groups: Tensor, branches: Tensor) -> Tensor:
        return torch.full_like(old, self.value)


@dataclass(frozen=True)
class AutoTemperature(Temperature):
    """τ from the spread of the old policy's energies in each group, see `auto_temperature`.

    relative_floor: as a part of the group's mean energy; spread below it is not blown up to unit deviation. floor: in
    units of the energy, for groups whose routes changed nothing.
    """

    relative_floor: float = 0.01
    floor: float = 1e-8

    def __post_init__(self) -> None:
        if self.relative_floor < 0:
            raise ValueError(f"AutoTemperature.relative_floor must be 0 or more, got {self.relative_floor}")
        if not self.floor > 0:
            raise ValueError(f"AutoTemperature.floor must be positive, got {self.floor}")

    def __call__(self, old: Tensor, groups: Tensor, branches: Tensor) -> Tensor:
        return auto_temperature(old, groups, branches, self.relative_floor, self.floor)


@dataclass(frozen=True)
class GibbsTVE(SurrogatePolicy):
    """The clipped ratio of Gibbs policies over trajectory velocity energies.

    temperature: τ, the same for the current, the old and the reference policy. space: "v" weighs every level alike,
    "x0" by σ². clip_low, clip_high: the ratio is clipped to [1 − clip_low, 1 + clip_high]. log_ratio_limit: clamp of
    log ρ, against overflow.
    """

    temperature: Temperature = AutoTemperature()
    space: str = "v"
    clip_low: float = 0.1
    clip_high: float = 0.2
    log_ratio_limit: float = 20.0

    reads: ClassVar[frozenset[type[Record]]] = frozenset({Displacements, Anchors, Endpoints})
    writes: ClassVar[frozenset[type[Record]]] = frozenset({BranchLogits, EndpointShift, AnchorShift})
    views: ClassVar[frozenset[str]] = frozenset({"current", "behaviour"})
    coupled: ClassVar[bool] = True
    has_ratio: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.space not in ("v", "x0"):
            raise ValueError(f"GibbsTVE.space must be 'v' or 'x0', got {self.space!r}")
        if not 0 < self.clip_low <= 1:
            raise ValueError(f"GibbsTVE.clip_low must lie in (0, 1], got {self.clip_low}")
        if not self.clip_high > 0:
            raise ValueError(f"GibbsTVE.clip_high must be positive, got {self.clip_high}")
        if not self.log_ratio_limit > 0:
            raise ValueError(f"GibbsTVE.log_ratio_limit must be positive, got {self.log_ratio_limit}")

    @property
    def fixed_probes(self) -> bool:
        """The recorded states are the places to ask at, whatever the update."""
        return True

    def probes(self, tape: Tape, recipe: GeneratorRecipe, streams: Streams) -> Iterator[Probes]:
        """All clips, anchors included, at the states of the routed steps of the routed blocks. Nothing is random."""
        moved, ends, anchors = tape[Displacements], tape[Endpoints], tape[Anchors].mask
        frames = moved.blocks * recipe.block_frames
        steps = [k for k, routed in enumerate(moved.steps) if routed]
        if not steps or not frames:
            raise ValueError(
                f"GibbsTVE has nothing to measure: the exploration routed {moved.blocks} blocks in the sampler steps "
                f"{steps}; let it route at least one block and one step"
            )
        _refuse_groups_without_anchor(tape.groups, anchors)
        device = moved.states.device
        noisy = moved.states[:, steps, :, :frames]
        sigma = torch.tensor([moved.sigmas[k] for k in steps], device=device)
        yield Probes(
            noisy=noisy,
            sigma=sigma.view(1, -1, 1).expand(len(noisy), -1, frames),
            clean=ends.latents[:, :, :frames],
            start=ends.start,
            prefix=ends.prefix,
            scenes=tuple(plan.scene for plan in tape.plans),
            rows=torch.arange(len(noisy), device=device),
            extra={"velocity": moved.velocities[:, steps, :, :frames], "anchor": anchors.to(device)},
        )

    def statistics(self, views: Views, probes: Probes) -> Statistics:
        """Energies [n, S] of the current, the old and, where it was asked, the reference policy; who is an anchor."""
        weight = expand_sigma(probes.sigma).square() if self.space == "x0" else 1.0
        names = {"current": "energy", "behaviour": "old_energy", "reference": "reference_energy"}
        measured = {
            name: trajectory_velocity_energy(views[policy], probes.extra["velocity"], weight)
            for policy, name in names.items()
            if policy in views
        }
        return measured | {"anchor": probes.extra["anchor"].to(measured["energy"])} | endpoint_shift(views)

    def objective(self, statistics: Statistics, advantage: Advantage) -> Objective:
        groups = advantage.groups
        branches = candidates(statistics["anchor"] == 0, advantage)
        energy, old = statistics["energy"], statistics["old_energy"].detach()
        tau = self.temperature(old, groups, branches)
        log_prob, log_prob_old = (log_gibbs(e, tau, groups, branches) for e in (energy, old))
        ratio = branch_ratio(log_prob, log_prob_old, self.log_ratio_limit)
        bounds = 1 - self.clip_low, 1 + self.clip_high
        loss = -clipped_surrogate(ratio, advantage.values, *bounds).where(branches, 0)

        written: dict[type, Record] = written_shift(statistics)
        if "reference_energy" in statistics:
            reference = log_gibbs(statistics["reference_energy"].detach(), tau, groups, branches)
            written[BranchLogits] = BranchLogits(log_prob, reference, groups)
            written[AnchorShift] = AnchorShift(group_mean(statistics["shift"], groups, ~branches))
        below, above = clip_acts(ratio.detach(), advantage.values, *bounds)
        same, sure = siblings(groups, branches), log_prob.detach()
        deviation = (ratio.detach() - 1).abs().expand(len(ratio), -1)
        metrics = {
            "energy": energy.detach().mean(1),
            "anchor_energy": group_mean(energy.detach().mean(1), groups, ~branches),
            "ratio_mean": ratio.detach(),
            "ratio_max_deviation": deviation.where(same, 0).amax(1),
            "clip_fraction_low": below.to(ratio),
            "clip_fraction_high": above.to(ratio),
            "temperature": tau.mean(1),
            "branch_entropy": (-sure * sure.exp()).expand(len(ratio), -1).where(same, 0).sum(1),
        }
        return Objective(loss, written, metrics)


def _refuse_groups_without_anchor(groups: Tensor, anchors: Tensor) -> None:
    """Raises ValueError where a group has no anchor or fewer than two branches to choose between."""
    for group in groups.unique().tolist():
        inside = anchors[(groups == group).to(anchors.device)]
        if not bool(inside.any()) or int((~inside).sum()) < 2:
            raise ValueError(
                f"group {group} has {int(inside.sum())} anchors and {int((~inside).sum())} branches; GibbsTVE compares "
                "at least two branches beside an anchor: raise the exploration's group_size or let it add the anchor"
            )
