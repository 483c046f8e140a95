"""Stage 2 of pre-training: distribution matching distillation on the student's own rollouts (DMD, minimal form).

The student rolls out its few steps; at states it really visits it is asked again, behind its own detached clips, and
moved along the difference of two scores, a frozen teacher's and a critic's that keeps learning the student:

    g = (x̂_critic − x̂_teacher) / |x̂ − x̂_teacher|           L = ½ mean (x̂_θ − sg(x̂_θ − g))²   ⇒   dL/dx̂_θ ∝ g

with both predictions at a noised x̂, σ = shift(U[0, 1)) per block. Generator, critic and teacher start from the base.
Deviations from the published recipes: no classifier-free guidance (the base has none), one critic step per student
step, and the critic is causal like the student, so that one packed pass behind the same clean context serves all.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from framework.averaging import WeightAverage
from framework.distillation import (
    StudentRollout,
    flow_matching_loss,
    matching_loss,
    noised_probes,
    predict_x0,
    roll_out_student,
    visited_probes,
)
from framework.distillation_interfaces import ClipSource, DistributionGradient, PretrainingStage
from framework.flow import X0_SIGMA_FLOOR
from framework.interfaces import StreamingGenerator
from framework.rng import Streams
from framework.schedules import draw_shifted_sigma
from framework.types import Probes


def dmd_gradient(x0: Tensor, critic_x0: Tensor, teacher_x0: Tensor) -> Tensor:
    """(x̂_critic − x̂_teacher) / mean|x̂ − x̂_teacher| with the mean over each clip; all [N, …]."""
    scale = (x0 - teacher_x0).flatten(1).abs().mean(1).clamp(min=1e-5)
    return (critic_x0 - teacher_x0) / scale.view(-1, *[1] * (x0.ndim - 1))


@dataclass(frozen=True)
class DMD(DistributionGradient):
    """dl/dx̂ = (f − r) / n, n = max(mean|x̂ − r|, 1e-5) over each clip, f the critic's and r the teacher's prediction."""

    def __call__(self, x0: Tensor, critic_x0: Tensor, teacher_x0: Tensor) -> Tensor:
        return dmd_gradient(x0, critic_x0, teacher_x0)


@dataclass
class DistributionMatching(PretrainingStage):
    """Distribution matching on the student's own rollouts; the averaged weights are the result.

    steps: iterations, each one rollout. critic_warmup: critic updates before the student's first. ema: decay of the
    average that is the result. history_grad: whether the student also learns through the encoding of its own clips."""

    steps: int = 260
    batch_size: int = 16
    learning_rate: float = 1e-4
    critic_learning_rate: float = 4e-4
    critic_warmup: int = 20
    ema: float = 0.97
    max_grad_norm: float = 10.0
    history_grad: bool = False
    name: str = "student"

    def begin(self, generator: StreamingGenerator) -> None:
        network = generator.network
        self.critic = copy.deepcopy(network).train()
        betas = (0.0, 0.99)
        self.optimizer = torch.optim.AdamW(network.parameters(), self.learning_rate, betas, weight_decay=0.0)
        self.critic_optimizer = torch.optim.AdamW(
            self.critic.parameters(), self.critic_learning_rate, betas, weight_decay=0.0
        )
        self.average = WeightAverage(network.state_dict())
        self.teacher_network = copy.deepcopy(network).requires_grad_(False).eval()

    def step(self, generator: StreamingGenerator, data: ClipSource, streams: Streams, step: int) -> dict[str, Tensor]:
        recipe = generator.recipe
        _, captions = data.sample(self.batch_size, 1, streams("captions"))
        prompts = tuple(str(c) for c in captions)
        states, clips = self.roll_out(generator, prompts, streams("rollout"))
        metrics = {"critic_loss": self.train_critic(generator, prompts, clips, streams("critic"))}
        if step < self.critic_warmup:
            return metrics

        # the student, asked at one visited state per clip and block, behind its own clips
        rollout, sigmas = StudentRollout(prompts, states, clips, clips), recipe.schedule.sigmas
        k = torch.randint(len(sigmas), (len(clips), 1, recipe.clip_blocks), generator=streams("level"))
        x0 = predict_x0(generator, visited_probes(rollout, k, sigmas, self.history_grad))

        # both scores at the noised prediction, behind the same clips
        noised = self.noised(generator, rollout, x0.detach(), streams("score"))
        with torch.no_grad():
            critic_x0 = predict_x0(_twin(generator, self.critic), noised)
            teacher_x0 = predict_x0(_twin(generator, self.teacher_network), noised)
            gradient = dmd_gradient(x0, critic_x0, teacher_x0)
        loss = matching_loss(x0, gradient)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(generator.network.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.average.update(generator.network.state_dict(), self.ema)
        return metrics | {"dmd_gradient_rms": gradient.square().mean().sqrt(), "grad_norm": norm}

    def roll_out(
        self, generator: StreamingGenerator, prompts: Sequence[str], random: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """(states at the K levels [N, K, C, F, H, W], clean clips [N, C, F, H, W]) of the student's own sampler."""
        rollout = roll_out_student(generator, prompts, random)
        return rollout.states, rollout.clips

    def train_critic(
        self, generator: StreamingGenerator, prompts: tuple[str, ...], clips: Tensor, random: torch.Generator
    ) -> Tensor:
        """One flow-matching step of the critic on the student's clips."""
        rollout = StudentRollout(prompts, clips.unsqueeze(1), clips, clips)
        probes = self.noised(generator, rollout, clips.unsqueeze(1), random)
        loss = flow_matching_loss(_twin(generator, self.critic), probes)
        self.critic_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.critic.parameters(), self.max_grad_norm)
        self.critic_optimizer.step()
        return loss.detach()

    @staticmethod
    def noised(generator: StreamingGenerator, rollout: StudentRollout, x0: Tensor, random: torch.Generator) -> Probes:
        """x0 [N, 1, C, F, H, W] at a shifted random level per block, behind the clean clips."""
        shape = (len(x0), 1, generator.recipe.clip_blocks)
        sigma = draw_shifted_sigma(shape, generator.recipe.schedule.shift, random, floor=X0_SIGMA_FLOOR)
        return noised_probes(rollout, x0, sigma, random)

    def finish(self, generator: StreamingGenerator) -> None:
        generator.network.load_state_dict(dict(self.average.weights))

    def state_dict(self) -> dict[str, Any]:
        return {
            "teacher": self.teacher_network.state_dict(),
            "critic": self.critic.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "critic_optimizer": self.critic_optimizer.state_dict(),
            "average": dict(self.average.weights),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.teacher_network.load_state_dict(state["teacher"])
        self.critic.load_state_dict(state["critic"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.critic_optimizer.load_state_dict(state["critic_optimizer"])
        self.average = WeightAverage(state["average"])


def _twin(generator: StreamingGenerator, network: nn.Module) -> StreamingGenerator:
    """The same generator around another network of its kind."""
    other = copy.copy(generator)
    other.network = network
    return other
