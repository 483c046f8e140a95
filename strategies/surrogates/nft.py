"""The NFT surrogate: reinforcement learning on the forward process, by regression on clean endpoints.

DiffusionNFT (2509.16117), in the form Astrolabe uses (2603.17051, Eq. 2). An implicit positive and an implicit negative
policy are mixed from the old and the current prediction and regressed on the noised endpoint x0:

    x⁺ = β x_θ + (1 − β) x_old        x⁻ = (1 + β) x_old − β x_θ        r = clip(A / (2 A_max) + ½, 0, 1)
    L  = (1/β) E_{x0, σ, ε} w(σ) [ r ⟨(x⁺ − x0)²⟩ + (1 − r) ⟨(x⁻ − x0)²⟩ ]

Its gradient, with N elements and δ = x_θ − x_old (methods derivation, tested against autograd):

    dL/dx_θ = (2 w / N) [ (2r − 1)(x_old − x0) + β δ ]

so dividing by β makes the policy gradient independent of it: β only sets the proximal pull to the old policy. At
θ = old the *value* does not depend on the reward, so never read progress off this loss. With one update per rollout and
an on-policy behaviour policy θ is old at every update: then δ = 0 and β changes nothing at all.

Deviations from the released code: velocities in space "v" and "x0" are both offered (x0 = σ² × v), the context is clean
(the released loss shows the network noisy neighbours, another conditional), σ is drawn per block from the sampler's own
list, and the adaptive weights that DiffusionNFT divides the branches by are a choice, off by default as in Astrolabe.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from framework.flow import add_noise, expand_sigma, velocity_distance, velocity_target
from framework.interfaces import GeneratorRecipe, SurrogatePolicy
from framework.records import Endpoints, EndpointShift, Record, endpoint_shift, written_shift
from framework.rng import Streams, draw_noise
from framework.types import Advantage, Objective, Probes, Statistics, Tape, Views


def preference(advantage: Tensor, limit: float) -> Tensor:
    """r = clip(A, ±A_max) / (2 A_max) + ½ in [0, 1]: the weight of the positive branch."""
    return (advantage.clamp(-limit, limit) / (2 * limit) + 0.5).clamp(0, 1)


def implicit_policies(current: Tensor, old: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """(β θ + (1 − β) old, (1 + β) old − β θ): in velocity or x0, the map is the same."""
    return beta * current + (1 - beta) * old, (1 + beta) * old - beta * current


def branch_losses(current: Tensor, old: Tensor, target: Tensor, beta: float, weight: Tensor | float = 1.0):
    """(positive, negative) mean weighted squared distance to the target over all dimensions but the first: [N] each."""
    plus, minus = implicit_policies(current, old, beta)
    distances = ((weight * (branch - target).square()).flatten(1).mean(1) for branch in (plus, minus))
    return tuple(distances)


def nft_loss(
    current: Tensor, old: Tensor, target: Tensor, r: Tensor, beta: float, weight: Tensor | float = 1.0
) -> Tensor:
    """r L⁺ + (1 − r) L⁻ per sample [N], not yet divided by β. Space is the caller's choice: pass velocities with the
    target ε − x0, or x̂0 with the target x0."""
    positive, negative = branch_losses(current, old, target, beta, weight)
    return r * positive + (1 - r) * negative


def nft_gradient(
    current: Tensor, old: Tensor, target: Tensor, r: Tensor, beta: float, weight: Tensor | float = 1.0
) -> Tensor:
    """d(Σ_n nft_loss_n)/d current = (2 β w / D) [(2r − 1)(old − target) + β (current − old)], D elements a sample."""
    r = r.view(-1, *[1] * (current.ndim - 1))
    elements = current[0].numel()
    return 2 * beta * weight / elements * ((2 * r - 1) * (old - target) + beta * (current - old))


def adaptive_branch_losses(
    current: Tensor, old: Tensor, x: Tensor, x0: Tensor, sigma: Tensor, beta: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """DiffusionNFT's branches: mixed in velocity, measured in x0, each divided by its own stop-gradient weight
    max(mean |x̂0 − x0|, 1e-5) → (L⁺, L⁻, w⁺, w⁻), each [N]. σ broadcasts over x."""
    losses, weights = [], []
    for velocity in implicit_policies(current, old, beta):
        distance = x - sigma * velocity - x0
        weight = distance.detach().abs().flatten(1).mean(1).clamp(min=1e-5)
        weights.append(weight)
        losses.append(distance.square().flatten(1).mean(1) / weight)
    return losses[0], losses[1], weights[0], weights[1]


class BranchWeights(ABC):
    """What the losses of the two branches are divided by, per clip; no gradient passes."""

    @abstractmethod
    def __call__(self, plus: Tensor, minus: Tensor) -> tuple[Tensor, Tensor]:
        """Residuals of x⁺ and x⁻ [n, …] in the space of the loss → (w⁺, w⁻), [n] each."""


@dataclass(frozen=True)
class Unweighted(BranchWeights):
    """1 and 1: Astrolabe removed the adaptive weights."""

    def __call__(self, plus: Tensor, minus: Tensor) -> tuple[Tensor, Tensor]:
        ones = plus.new_ones(len(plus))
        return ones, ones


@dataclass(frozen=True)
class PerBranch(BranchWeights):
    """max(⟨|residual|⟩, floor), each branch its own: DiffusionNFT's.

    Gradients are of equal size at every noise level. But where x⁺ and x⁻ differ in length, a clip without any
    preference (r = ½) is pulled along x_old − x0 all the same, which on a few-step student is blur.
    """

    floor: float = 1e-5

    def __call__(self, plus: Tensor, minus: Tensor) -> tuple[Tensor, Tensor]:
        positive, negative = (x.abs().flatten(1).mean(1).clamp(min=self.floor) for x in (plus, minus))
        return positive, negative


@dataclass(frozen=True)
class Shared(BranchWeights):
    """Half the sum of both, for either branch: equal gradient sizes, and r = ½ stays without a preference."""

    floor: float = 1e-5

    def __call__(self, plus: Tensor, minus: Tensor) -> tuple[Tensor, Tensor]:
        both = ((plus.abs() + minus.abs()) / 2).flatten(1).mean(1).clamp(min=self.floor)
        return both, both


@dataclass(frozen=True)
class NFT(SurrogatePolicy):
    """Negative-aware regression on the clean endpoints of a rollout.

    beta: mixing strength (1 in the paper; .1 in the released configs). advantage_limit: A_max of the map to r; it
    only scales the policy gradient against the proximal term. space: "v" weighs every level alike, "x0" by σ².
    level_weights: one weight per sampler level from σ = 1 down; a level of weight 0 is never drawn (at σ = 1 the noised
    state carries nothing of the sample and adds only gradient noise to a small run). noisy_streams: noise draws per
    clip, which share the encoding of the clean context. history_grad: gradient through that encoding as well.
    branch_weights: what the branches are divided by; with any but `Unweighted`, λ and the gradient's clip mean another
    thing.
    """

    beta: float = 1.0
    advantage_limit: float = 5.0
    space: str = "v"
    level_weights: Sequence[float] | None = None
    noisy_streams: int = 1
    history_grad: bool = False
    branch_weights: BranchWeights = field(default_factory=Unweighted)

    reads: ClassVar[frozenset[type[Record]]] = frozenset({Endpoints})
    writes: ClassVar[frozenset[type[Record]]] = frozenset({EndpointShift})
    views: ClassVar[frozenset[str]] = frozenset({"current", "behaviour"})

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise ValueError(f"NFT.beta must be positive and finite, got {self.beta}")
        if not 0 < self.advantage_limit < math.inf:
            raise ValueError(f"NFT.advantage_limit must be positive and finite, got {self.advantage_limit}")
        if self.space not in ("v", "x0"):
            raise ValueError(f"NFT.space must be 'v' or 'x0', got {self.space!r}")
        if self.noisy_streams < 1:
            raise ValueError(f"NFT.noisy_streams must be at least 1, got {self.noisy_streams}")

    def levels(self, recipe: GeneratorRecipe) -> dict[float, float]:
        """The σ levels that are drawn and their weights."""
        sigmas = recipe.schedule.sigmas
        weights = self.level_weights if self.level_weights is not None else [1.0] * len(sigmas)
        if len(weights) != len(sigmas) or not any(weights) or not all(0 <= w < math.inf for w in weights):
            raise ValueError(
                f"NFT.level_weights needs one finite weight ≥ 0 for each of the sampler's {len(sigmas)} levels "
                f"{[round(s, 4) for s in sigmas]}, not all 0; got {list(weights)}"
            )
        return {sigma: weight for sigma, weight in zip(sigmas, weights, strict=True) if weight > 0}

    def probes(self, tape: Tape, recipe: GeneratorRecipe, streams: Streams) -> Iterator[Probes]:
        """All clips at fresh noise, an independent level per block."""
        ends = tape[Endpoints]
        clean = ends.latents
        frames = clean.shape[2]
        blocks = -(-frames // recipe.block_frames)
        levels = self.levels(recipe)
        names = [(plan.group, branch) for plan in tape.plans for branch in range(len(plan.branches))]
        drawn = torch.stack(
            [torch.randint(len(levels), (self.noisy_streams, blocks), generator=streams("level", *n)) for n in names]
        ).repeat_interleave(recipe.block_frames, -1)[..., :frames]
        sigma, weight = (torch.tensor(list(table))[drawn].to(clean.device) for table in (levels, levels.values()))
        seeds = [streams.derive("noise", *name) for name in names]
        noise = draw_noise(seeds, (self.noisy_streams, *clean.shape[1:]), clean.device)
        x0 = clean.unsqueeze(1)
        yield Probes(
            noisy=add_noise(x0, noise, expand_sigma(sigma)),
            sigma=sigma,
            clean=clean,
            start=ends.start,
            prefix=ends.prefix,
            scenes=tuple(plan.scene for plan in tape.plans),
            rows=torch.arange(len(clean), device=clean.device),
            history_grad=self.history_grad,
            extra={"target": velocity_target(x0, noise), "weight": weight},
        )

    def statistics(self, views: Views, probes: Probes) -> Statistics:
        current, old = views["current"], views["behaviour"]
        target, weight = probes.extra["target"], expand_sigma(probes.extra["weight"])
        scale = expand_sigma(probes.sigma) if self.space == "x0" else torch.ones_like(weight)
        positive, negative = branch_losses(current, old, target, self.beta, weight * scale.square())
        branches = implicit_policies(current.detach(), old, self.beta)
        by_positive, by_negative = self.branch_weights(*(scale * (branch - target) for branch in branches))
        moved = velocity_distance(current.detach(), old)
        losses = {"positive": positive / by_positive, "negative": negative / by_negative}
        return losses | {"distance_to_old": moved} | endpoint_shift(views)

    def objective(self, statistics: Statistics, advantage: Advantage) -> Objective:
        r = preference(advantage.values, self.advantage_limit)
        loss = (r * statistics["positive"] + (1 - r) * statistics["negative"]) / self.beta
        return Objective(loss, written_shift(statistics), {"distance_to_old": statistics["distance_to_old"]})
