"""The Gaussian surrogate: the sampler's own step is the policy, N(μ_θ(x_σ), std² I), and its density is differentiated.

CM-GRPO (RAVEN, 2605.15190, sec. 4) on the consistency kernel, Flow-GRPO and DanceGRPO on Euler–Maruyama ones; which
kernel it is comes with the recorded transitions (x, x', σ, σ'). With μ = a x + b v and N elements a step:

    log π = −⟨w_j (x' − μ)²⟩ / (2 std²) + const                        mean over elements, block weights w_j of mean 1
    on-policy      L = −A ⟨ρ_k log π_k⟩_k                               GaussianReinforce
    as regression  L = ⟨ρ_k ⟨w_j (x̂0 − sg[x̂0 − g])²⟩⟩_k,  g = −A s (x' − μ) / (2 std²),  s = dμ/dx̂0 = −b/σ
    with ratio     L = ⟨ρ_k max(−A r_k, −A clip(r_k, 1 − ε, 1 + ε'))⟩_k,  r_k = exp(log π_θ − log π_old)   GaussianRatio

The regression has exactly the gradient of the on-policy form (tested to 1e-12); its value says nothing. Steps with
std = 0 have no density and are never chosen. Per element the on-policy gradient in x̂0 is −A (s/std) ε: for plain
re-noise (1 − σ')/σ', which grows ninefold over the three steps of the usual grid, hence the step weights ρ.

Deviations from the release: mean over elements (its λ = 100 is folded into the learning rate), block weights off unless
asked for, and no KL by default; a KL (`kernel_kl`) has the same units as log π here, where the release multiplies only
the policy term by λ.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from framework.flow import x0_from_velocity
from framework.interfaces import GeneratorRecipe, SurrogatePolicy
from framework.records import (
    Endpoints,
    EndpointShift,
    KernelShift,
    OnPolicyTransitions,
    Record,
    Transitions,
    endpoint_shift,
    written_shift,
)
from framework.rng import Streams
from framework.types import Advantage, Objective, Probes, Statistics, Tape, Views
from strategies.surrogates.transitions import TrainedSteps


def log_density(target: Tensor, mean: Tensor, std: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """log N(target; mean, std² I), averaged with ``weight`` (of mean 1) over the last four dimensions → [n, S].

    target, mean: [n, S, C, F, H, W]; std: [n, S]; weight broadcasts over the elements. The constant −log(std √2π) is
    left out: it depends on neither policy, and averaged it would make every ratio's exponent large for nothing.
    """
    return -(weight * (target - mean).square()).flatten(2).mean(2) / (2 * std.square())


def score_pull(advantage: Tensor, target: Tensor, mean: Tensor, slope: Tensor, std: Tensor) -> Tensor:
    """g = −A s (x' − μ) / (2 std²) [n, S, C, F, H, W]: half the gradient of −A log π in x̂0, per element.

    advantage [n]; slope s = dμ/dx̂0 and std [n, S].
    """
    factor = -advantage[:, None] * slope / (2 * std.square())
    return factor[..., None, None, None, None] * (target - mean)


def x0_regression(x0: Tensor, pull: Tensor) -> Tensor:
    """(x̂0 − sg[x̂0 − g])² per element: gradient 2 g, value g²."""
    return (x0 - (x0 - pull).detach()).square()


def clipped_ratio_loss(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """max(−A r, −A clip(r, 1 − low, 1 + high)) [n, S] for ratios [n, S] and advantages [n]."""
    advantage = advantage[:, None]
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high))


def kernel_divergence(mean: Tensor, reference: Tensor, std: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """KL(N(μ, std²) ‖ N(μ_ref, std²)) = ⟨w (μ − μ_ref)²⟩ / (2 std²), averaged over elements like log π → [n, S].

    For plain re-noise (1 − σ')² ⟨(x̂0 − x̂0_ref)²⟩ / (2 σ'²). Flow-GRPO's release divides by g² in place of the step's
    variance g² D, which is smaller by D.
    """
    return (weight * (mean - reference).square()).flatten(2).mean(2) / (2 * std.square())


def kernel_mean(velocity: Tensor, probes: Probes) -> Tensor:
    """μ = a x + b v at the probes [n, S, C, F, H, W]."""
    of_x, of_velocity = (probes.extra[name][..., None, None, None, None] for name in ("of_x", "of_velocity"))
    return of_x * probes.noisy + of_velocity * velocity


def frame_weight(probes: Probes) -> Tensor:
    """Block weights per frame, broadcastable over [n, S, C, F, H, W]."""
    return probes.extra["frame_weight"][:, None, None, :, None, None]


def kernel_statistics(views: Views, probes: Probes) -> dict[str, Tensor]:
    """log π [n, S] per policy, the step weights, and the two shifts where the reference was asked."""
    means = {name: kernel_mean(view, probes) for name, view in views.items()}
    std, weight = probes.extra["std"], frame_weight(probes)
    measured = {"step_weight": probes.extra["step_weight"]}
    for name in means.keys() & {"current", "behaviour"}:
        measured[f"log_density_{name}"] = log_density(probes.extra["next"], means[name], std, weight)
    if "reference" in means:
        measured["divergence"] = kernel_divergence(means["current"], means["reference"], std, weight)
    return measured | endpoint_shift(views)


def written_kernel_shift(statistics: Statistics) -> dict[type, Record]:
    """What regularizers read, where it was measured. Steps are weighted as in the policy term."""
    if "divergence" not in statistics:
        return {}
    divergence = (statistics["step_weight"] * statistics["divergence"]).mean(1)
    return {KernelShift: KernelShift(divergence), **written_shift(statistics)}


@dataclass(frozen=True)
class KernelSurrogate(SurrogatePolicy):
    """What the forms have in common: they ask for the density of the sampler's own steps.

    trained: which steps, their weights, and how far gradient reaches.
    """

    trained: TrainedSteps = field(default_factory=TrainedSteps)

    reads: ClassVar[frozenset[type[Record]]] = frozenset({OnPolicyTransitions, Endpoints})
    writes: ClassVar[frozenset[type[Record]]] = frozenset({KernelShift, EndpointShift})
    views: ClassVar[frozenset[str]] = frozenset({"current"})

    @property
    def fixed_probes(self) -> bool:
        return self.trained.steps.fixed

    def probes(self, tape: Tape, recipe: GeneratorRecipe, streams: Streams) -> Iterator[Probes]:
        yield self.trained.probes(tape, recipe, streams)

    def statistics(self, views: Views, probes: Probes) -> Statistics:
        return kernel_statistics(views, probes)


@dataclass(frozen=True)
class GaussianReinforce(KernelSurrogate):
    """−A log π of the steps that were taken: strictly on-policy, one update per rollout."""

    on_policy: ClassVar[bool] = True

    def objective(self, statistics: Statistics, advantage: Advantage) -> Objective:
        log_pi = statistics["log_density_current"]
        loss = -advantage.values * (statistics["step_weight"] * log_pi).mean(1)
        return Objective(loss, written_kernel_shift(statistics), {"log_density": log_pi.detach().mean(1)})


@dataclass(frozen=True)
class GaussianRegression(KernelSurrogate):
    """The stop-gradient regression on x̂0 that RAVEN trains: the gradient of `GaussianReinforce`, another value."""

    on_policy: ClassVar[bool] = True

    def statistics(self, views: Views, probes: Probes) -> Statistics:
        """The regression of a unit advantage: its square is linear in A², its gradient in A, see `objective`."""
        sigma = probes.sigma[..., None, :, None, None]
        x0 = x0_from_velocity(probes.noisy, views["current"], sigma)
        mean = kernel_mean(views["current"], probes).detach()
        slope = -probes.extra["of_velocity"] / probes.sigma[..., 0]
        ones = torch.ones_like(probes.sigma[:, 0, 0])
        pull = score_pull(ones, probes.extra["next"], mean, slope, probes.extra["std"])
        weight = frame_weight(probes)
        # (x̂0 − sg[x̂0 − A g])² = (A g)² in value and 2 A g in gradient: A ⟨(x̂0 − sg[x̂0 − g])²⟩ but for the value's A
        unit = (weight * x0_regression(x0, pull)).flatten(2).mean(2)
        return kernel_statistics(views, probes) | {"regression": unit}

    def objective(self, statistics: Statistics, advantage: Advantage) -> Objective:
        unit, scale = statistics["regression"], advantage.values
        value = unit.detach() * scale[:, None].square()
        loss = (statistics["step_weight"] * (scale[:, None] * (unit - unit.detach()) + value)).mean(1)
        metrics = {"log_density": statistics["log_density_current"].detach().mean(1)}
        return Objective(loss, written_kernel_shift(statistics), metrics)


@dataclass(frozen=True)
class GaussianRatio(KernelSurrogate):
    """PPO on the sampler's steps: importance ratio to the behaviour policy, clipped; for several updates per rollout.

    Both densities are asked under the canonical history, so transitions of any exploration serve. clip_low, clip_high:
    log π is a mean over elements, so useful ranges are near 1e-4.
    """

    clip_low: float = 1e-4
    clip_high: float = 1e-4

    reads: ClassVar[frozenset[type[Record]]] = frozenset({Transitions, Endpoints})
    views: ClassVar[frozenset[str]] = frozenset({"current", "behaviour"})
    has_ratio: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (0 < self.clip_low <= 1 and self.clip_high > 0):
            raise ValueError(
                f"GaussianRatio.clip_low must lie in (0, 1] and clip_high be positive, got {self.clip_low}, "
                f"{self.clip_high}"
            )

    def objective(self, statistics: Statistics, advantage: Advantage) -> Objective:
        log_pi = statistics["log_density_current"]
        ratio = (log_pi - statistics["log_density_behaviour"]).exp()
        clipped = clipped_ratio_loss(ratio, advantage.values, self.clip_low, self.clip_high)
        loss = (statistics["step_weight"] * clipped).mean(1)
        seen, better = ratio.detach(), advantage.values[:, None] > 0
        metrics = {
            "ratio_mean": seen.mean(1),
            "ratio_deviation": (seen - 1).abs().mean(1),
            "clip_frac_high": ((seen > 1 + self.clip_high) & better).to(seen).mean(1),
            "clip_frac_low": ((seen < 1 - self.clip_low) & ~better).to(seen).mean(1),
            "log_density": log_pi.detach().mean(1),
        }
        return Objective(loss, written_kernel_shift(statistics), metrics)
