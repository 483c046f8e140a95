"""Which of a rollout's Gaussian steps are trained, and where the policies are asked for them.

Any surrogate that differentiates the density of sampler steps shares this: step choice, step weights ρ, block weights
w_j, and whether gradient also reaches the encoding of the clean clip.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from framework.block_weights import BlockWeights, Uniform
from framework.interfaces import GeneratorRecipe
from framework.kernels import TransitionKernel
from framework.records import Endpoints, Transitions
from framework.rng import Streams
from framework.types import Probes, Tape


class StepChoice(ABC):
    """Which stochastic steps of a clip are trained."""

    @property
    @abstractmethod
    def fixed(self) -> bool:
        """Whether every draw is the same."""

    @abstractmethod
    def choose(self, steps: int, clips: Sequence[tuple[int, int]], streams: Streams) -> Tensor:
        """Indices [N, S] into the ``steps`` stochastic steps, for clips named by (group, branch)."""


@dataclass(frozen=True)
class AllSteps(StepChoice):
    """Every stochastic step of every clip; one encoding of the clean clip serves them all."""

    @property
    def fixed(self) -> bool:
        return True

    def choose(self, steps: int, clips: Sequence[tuple[int, int]], streams: Streams) -> Tensor:
        return torch.arange(steps).expand(len(clips), -1)


@dataclass(frozen=True)
class OneRandomStep(StepChoice):
    """One step per clip, uniformly (the paper's choice): a third of the passes, three times the variance."""

    @property
    def fixed(self) -> bool:
        return False

    def choose(self, steps: int, clips: Sequence[tuple[int, int]], streams: Streams) -> Tensor:
        return torch.stack([torch.randint(steps, (1,), generator=streams("policy_step", *clip)) for clip in clips])


class StepWeights(ABC):
    """ρ_k of a sampler step."""

    @abstractmethod
    def weight(self, kernel: TransitionKernel, sigma: float, sigma_next: float) -> float:
        """ρ ≥ 0 of the step σ → σ'."""


@dataclass(frozen=True)
class PlainSteps(StepWeights):
    """ρ = 1: the policy gradient as it is; the last stochastic step outweighs the first ninefold."""

    def weight(self, kernel: TransitionKernel, sigma: float, sigma_next: float) -> float:
        return 1.0


@dataclass(frozen=True)
class ReleasedReweight(StepWeights):
    """ρ = σ' / (σ − σ'), RAVEN's option: times (1 − σ')/σ' it gives 1.00, 1.59, 1.80 on the usual grid."""

    def weight(self, kernel: TransitionKernel, sigma: float, sigma_next: float) -> float:
        return sigma_next / max(sigma - sigma_next, 1e-6)


@dataclass(frozen=True)
class EqualGradient(StepWeights):
    """ρ = std / |dμ/dx̂0|: every step's gradient in x̂0 has the size of A times its noise."""

    def weight(self, kernel: TransitionKernel, sigma: float, sigma_next: float) -> float:
        return kernel.std(sigma, sigma_next) * sigma / abs(kernel.coefficients(sigma, sigma_next)[1])


def stochastic_steps(transitions: Transitions) -> list[int]:
    """Indices of the steps with a density. Raises ValueError when there is none."""
    found = [k for k, pair in enumerate(transitions.grid) if transitions.kernel.std(*pair) > 0]
    if not found:
        raise ValueError(f"{type(transitions.kernel).__name__} has no stochastic step: there is no density to train")
    return found


@dataclass(frozen=True)
class TrainedSteps:
    """What a Gaussian surrogate trains of a rollout.

    steps: which stochastic steps. step_weights: ρ per step. block_weights: w_j over blocks (off by default).
    history_grad: gradient through the encoding of the clean clip as well (RAVEN's packed training-time test).
    """

    steps: StepChoice = field(default_factory=AllSteps)
    step_weights: StepWeights = field(default_factory=PlainSteps)
    block_weights: BlockWeights = field(default_factory=Uniform)
    history_grad: bool = False

    def probes(self, tape: Tape, recipe: GeneratorRecipe, streams: Streams) -> Probes:
        """The chosen states of every branch, with what a density needs beside the velocity: x', a, b, std, ρ, w."""
        record, ends = tape[Transitions], tape[Endpoints]
        device, frames = record.states.device, record.states.shape[3]
        usable = stochastic_steps(record)
        rows = torch.nonzero(~tape.anchors).squeeze(1)
        names = [(plan.group, b) for plan in tape.plans for b, branch in enumerate(plan.branches) if not branch.anchor]
        chosen = torch.tensor(usable)[self.steps.choose(len(usable), names, streams)]  # [N, S] step indices

        def of_step(value) -> Tensor:
            """A number of each step [N, S], in the precision of the latents."""
            table = [value(*pair) if k in usable else 0.0 for k, pair in enumerate(record.grid)]
            return torch.tensor(table, dtype=record.states.dtype)[chosen].to(device)

        kernel = record.kernel
        where = chosen.to(device).view(*chosen.shape, 1, 1, 1, 1).expand(-1, -1, *record.states.shape[2:])
        rows = rows.to(device)
        sizes = [min(recipe.block_frames, frames - f) for f in range(0, frames, recipe.block_frames)]
        per_frame = torch.tensor(self.block_weights.per_frame(sizes), dtype=record.states.dtype)
        return Probes(
            noisy=record.states[rows].gather(1, where),
            sigma=of_step(lambda sigma, _: sigma).unsqueeze(2).expand(-1, -1, frames),
            clean=ends.latents[rows],
            start=ends.start,
            prefix=ends.prefix,
            scenes=tuple(plan.scene for plan in tape.plans),
            rows=rows,
            history_grad=self.history_grad,
            extra={
                "next": record.next_states[rows].gather(1, where),
                "of_x": of_step(lambda *pair: kernel.coefficients(*pair)[0]),
                "of_velocity": of_step(lambda *pair: kernel.coefficients(*pair)[1]),
                "std": of_step(kernel.std),
                "step_weight": of_step(lambda *pair: self.step_weights.weight(kernel, *pair)),
                "frame_weight": per_frame.to(device).expand(len(rows), -1),
            },
        )
