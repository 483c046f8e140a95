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
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from framework.averaging import WeightAverage
from framework.flow import X0_SIGMA_FLOOR, add_noise, expand_sigma, velocity_target, x0_from_velocity
from framework.interfaces import ClipSource, PretrainingStage, StreamingGenerator
from framework.kernels import Consistency
from framework.rng import Streams
from framework.rollout import generate_blocks, noise_count
from framework.schedules import draw_shifted_sigma
from framework.types import Probes


def dmd_gradient(x0: Tensor, critic_x0: Tensor, teacher_x0: Tensor) -> Tensor:
    """(x̂_critic − x̂_teacher) / mean|x̂ − x̂_teacher| with the mean over each clip; all [N, …]."""
    scale = (x0 - teacher_x0).flatten(1).abs().mean(1).clamp(min=1e-5)
    return (critic_x0 - teacher_x0) / scale.view(-1, *[1] * (x0.ndim - 1))


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
        levels = torch.tensor(recipe.schedule.sigmas)
        blocks = recipe.clip_blocks
        k = torch.randint(len(levels), (len(clips), 1, blocks), generator=streams("level"))
        k = k.repeat_interleave(recipe.block_frames, dim=-1)
        noisy = torch.gather(states, 1, expand_sigma(k).expand(-1, 1, *states.shape[2:]))
        probes = replace(self.probes(prompts, clips, noisy, levels[k]), history_grad=self.history_grad)
        x0 = x0_from_velocity(noisy, generator.replay(probes), expand_sigma(probes.sigma))

        # both scores at the noised prediction, behind the same clips
        noised = self.noised(prompts, clips, x0.detach(), recipe.schedule.shift, recipe.block_frames, streams("score"))
        with torch.no_grad():
            critic_x0 = self.predict_with(generator, self.critic, noised)
            teacher_x0 = self.predict_with(generator, self.teacher_network, noised)
            gradient = dmd_gradient(x0, critic_x0, teacher_x0)
        loss = 0.5 * (x0 - (x0.detach() - gradient)).square().mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(generator.network.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.average.update(generator.network.state_dict(), self.ema)
        return metrics | {"dmd_gradient_rms": gradient.square().mean().sqrt(), "grad_norm": norm}

    @torch.no_grad()
    def roll_out(
        self, generator: StreamingGenerator, prompts: Sequence[str], random: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """(states at the K levels [N, K, C, F, H, W], clean clips [N, C, F, H, W]) of the student's own sampler."""
        recipe, kernel = generator.recipe, Consistency()
        channels, height, width = recipe.latent
        frames = recipe.clip_blocks * recipe.block_frames
        shape = (len(prompts), noise_count(kernel, recipe), channels, frames, height, width)
        noise = torch.randn(shape, generator=random)
        traces = list(generate_blocks(generator, generator.open(prompts), noise, kernel))
        states = torch.cat([torch.stack(t.states[:-1], 1) for t in traces], dim=3)
        return states, torch.cat([t.x0 for t in traces], dim=2)

    def train_critic(
        self, generator: StreamingGenerator, prompts: tuple[str, ...], clips: Tensor, random: torch.Generator
    ) -> Tensor:
        """One flow-matching step of the critic on the student's clips."""
        recipe = generator.recipe
        probes = self.noised(prompts, clips, clips.unsqueeze(1), recipe.schedule.shift, recipe.block_frames, random)
        velocity = self.replay_with(generator, self.critic, probes)
        loss = (velocity - probes.extra["target"]).square().mean()
        self.critic_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.critic.parameters(), self.max_grad_norm)
        self.critic_optimizer.step()
        return loss.detach()

    def noised(
        self,
        prompts: tuple[str, ...],
        context: Tensor,
        x0: Tensor,
        shift: float,
        block_frames: int,
        random: torch.Generator,
    ) -> Probes:
        """x0 [N, 1, C, F, H, W] at a shifted random level per block, behind the clean context."""
        n, frames = len(context), context.shape[2]
        sigma = draw_shifted_sigma((n, 1, frames // block_frames), shift, random, floor=X0_SIGMA_FLOOR)
        sigma = sigma.repeat_interleave(block_frames, dim=-1)
        noise = torch.randn(x0.shape, generator=random)
        probes = self.probes(prompts, context, add_noise(x0, noise, expand_sigma(sigma)), sigma)
        return replace(probes, extra={"target": velocity_target(x0, noise)})

    @staticmethod
    def probes(prompts: tuple[str, ...], context: Tensor, noisy: Tensor, sigma: Tensor) -> Probes:
        rows = torch.arange(len(context))
        return Probes(noisy, sigma, context, 0, None, prompts, rows)

    def predict_with(self, generator: StreamingGenerator, network: nn.Module, probes: Probes) -> Tensor:
        """x̂0 of another network of the same kind at the same probes."""
        return x0_from_velocity(probes.noisy, self.replay_with(generator, network, probes), expand_sigma(probes.sigma))

    @staticmethod
    def replay_with(generator: StreamingGenerator, network: nn.Module, probes: Probes) -> Tensor:
        twin = copy.copy(generator)
        twin.network = network
        return twin.replay(probes)

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
