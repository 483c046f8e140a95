"""Diffusion-DPO between the siblings of a group: the better clip of a pair is to be denoised better, the other worse.

    m_i = ⟨(v_θ − (ε − x0_i))²⟩ − ⟨(v_ref − (ε − x0_i))²⟩        how much worse than the reference θ denoises clip i
    L_i = Σ_{j : A_j < A_i} −log sigmoid(β (m_j − m_i)) / (G − 1)

After Eq. 14 of 2311.12908, with every pair of a group of G in place of one annotated pair. Siblings share noise and
levels, so that a difference of margins is one of clips.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from framework.flow import add_noise, expand_sigma, velocity_distance, velocity_target
from framework.interfaces import GeneratorRecipe, SurrogatePolicy
from framework.records import Endpoints, EndpointShift, Record, endpoint_shift, written_shift
from framework.rng import Streams, draw_noise
from framework.types import Advantage, Objective, Probes, Statistics, Tape, Views


def pair_loss(margin: Tensor, advantage: Advantage, beta: float) -> Tensor:
    """L [N] of margins [N]; 0 for the worst clip of a group. A clip without a score is in no pair."""
    pairs = (advantage.groups[:, None] == advantage.groups) & advantage.active
    beaten = pairs & (advantage.values[:, None] > advantage.values)
    losses = softplus(beta * (margin[:, None] - margin)).where(beaten, 0)
    return losses.sum(1) / (pairs.sum(1) - 1).clamp(min=1)


@dataclass(frozen=True)
class EndpointDPO(SurrogatePolicy):
    """Diffusion-DPO over all pairs of siblings. beta: one over the margin, in squared velocity, that decides a pair."""

    beta: float = 100.0

    reads: ClassVar[frozenset[type[Record]]] = frozenset({Endpoints})
    writes: ClassVar[frozenset[type[Record]]] = frozenset({EndpointShift})
    views: ClassVar[frozenset[str]] = frozenset({"current", "reference"})
    coupled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ValueError(f"EndpointDPO.beta must be positive, got {self.beta}")

    def probes(self, tape: Tape, recipe: GeneratorRecipe, streams: Streams) -> Iterator[Probes]:
        """Every clip at fresh noise, a level per block; both belong to the group."""
        ends = tape[Endpoints]
        clean, frames = ends.latents, ends.latents.shape[2]
        levels = torch.tensor(recipe.schedule.sigmas[1:])  # at σ = 1 nothing of a clip is left to tell it from another
        groups = [plan.group for plan in tape.plans for _ in plan.branches]
        blocks = -(-frames // recipe.block_frames)
        drawn = torch.stack([torch.randint(len(levels), (1, blocks), generator=streams("level", g)) for g in groups])
        sigma = levels[drawn].repeat_interleave(recipe.block_frames, -1)[..., :frames].to(clean.device)
        noise = draw_noise([streams.derive("noise", g) for g in groups], (1, *clean.shape[1:]), clean.device)
        yield Probes(
            noisy=add_noise(clean[:, None], noise, expand_sigma(sigma)),
            sigma=sigma,
            clean=clean,
            start=ends.start,
            prefix=ends.prefix,
            scenes=tuple(plan.scene for plan in tape.plans),
            rows=torch.arange(len(clean), device=clean.device),
            extra={"target": velocity_target(clean[:, None], noise)},
        )

    def statistics(self, views: Views, probes: Probes) -> Statistics:
        target = probes.extra["target"]
        margin = velocity_distance(views["current"], target) - velocity_distance(views["reference"], target)
        return {"margin": margin} | endpoint_shift(views)

    def objective(self, statistics: Statistics, advantage: Advantage) -> Objective:
        loss = pair_loss(statistics["margin"], advantage, self.beta)
        return Objective(loss, written_shift(statistics), {"margin": statistics["margin"].detach()})
