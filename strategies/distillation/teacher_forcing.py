"""Stage 1 of pre-training: flow matching of every block behind the clean blocks before it.

    L = E w(σ) ‖ v_θ(x_σ, σ | clean history) − (ε − x0) ‖²,   σ = shift(U[0, 1)) independently per block
    w(σ) = (σ / max(σ, weight_floor))²

One packed pass trains all blocks of a clip; several noise draws share the encoding of the clean history. Gradient
reaches the encoding of the history, which is how the model learns to commit clean frames.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from framework.averaging import WeightAverage
from framework.distillation_interfaces import ClipSource, PretrainingStage
from framework.flow import X0_SIGMA_FLOOR, add_noise, expand_sigma, velocity_target
from framework.interfaces import StreamingGenerator
from framework.rng import Streams
from framework.schedules import draw_shifted_sigma
from framework.types import Probes, Scene


@dataclass
class TeacherForcing(PretrainingStage):
    """Flow matching of every block behind true clean history; the averaged weights are the result.

    Hidden matrices are trained by Muon, everything else by AdamW.

    steps: optimiser steps. batch_size: clips a step. noisy_streams: noise draws per clip. learning_rate: of Muon;
    adamw_learning_rate: of the rest. cooldown: last share of the steps over which both rates fall linearly to 0.
    ema: decay of the weight average. weight_floor: the velocity error of an x0-predicting network is its x0 error
    divided by σ²; below this σ the division stops, or the last details of the picture would drown its structure.
    """

    steps: int = 1800
    batch_size: int = 16
    noisy_streams: int = 2
    learning_rate: float = 5e-3
    adamw_learning_rate: float = 2e-3
    warmup: int = 50
    cooldown: float = 0.4
    ema: float = 0.998
    weight_floor: float = 0.3
    max_grad_norm: float = 1.0
    name: str = "base"

    def begin(self, generator: StreamingGenerator) -> None:
        matrices, others = split_parameters(generator.network)
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=self.learning_rate, momentum=0.95, weight_decay=0.0),
            torch.optim.AdamW(others, lr=self.adamw_learning_rate, betas=(0.9, 0.99), weight_decay=0.0),
        ]
        self.average = WeightAverage(generator.network.state_dict())

    def step(self, generator: StreamingGenerator, data: ClipSource, streams: Streams, step: int) -> dict[str, Tensor]:
        recipe = generator.recipe
        clean, captions = data.sample(self.batch_size, recipe.clip_blocks * recipe.block_frames, streams("data"))
        probes = self.probes(clean, captions, recipe.block_frames, recipe.schedule.shift, streams("noise"))
        velocity = generator.replay(probes)
        weight = expand_sigma(probes.sigma / probes.sigma.clamp(min=self.weight_floor)).square()
        loss = (weight * (velocity - probes.extra["target"]).square()).mean()
        rate = self.rate(step)
        for optimizer, base in zip(self.optimizers, (self.learning_rate, self.adamw_learning_rate), strict=True):
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = base * rate
        loss.backward()
        norm = nn.utils.clip_grad_norm_(generator.network.parameters(), self.max_grad_norm)
        for optimizer in self.optimizers:
            optimizer.step()
        self.average.update(generator.network.state_dict(), min(self.ema, (1 + step) / (10 + step)))
        return {"loss": loss.detach(), "grad_norm": norm}

    def probes(
        self, clean: Tensor, captions: list, block_frames: int, shift: float, generator: torch.Generator
    ) -> Probes:
        """``noisy_streams`` noisy versions of every clip, an independent σ per block."""
        n, _, frames, _, _ = clean.shape
        shape = (n, self.noisy_streams)
        sigma = draw_shifted_sigma((*shape, frames // block_frames), shift, generator, floor=X0_SIGMA_FLOOR)
        sigma = sigma.repeat_interleave(block_frames, dim=-1)
        noise = torch.randn(*shape, *clean.shape[1:], generator=generator)
        x0 = clean.unsqueeze(1)
        return Probes(
            noisy=add_noise(x0, noise, expand_sigma(sigma)),
            sigma=sigma,
            clean=clean,
            start=0,
            prefix=None,
            scenes=tuple(Scene.single(str(c)) for c in captions),
            rows=torch.arange(n),
            history_grad=True,
            extra={"target": velocity_target(x0, noise)},
        )

    def rate(self, step: int) -> float:
        """Warm-up, plateau, linear cool-down; a factor on the learning rates."""
        left = (self.steps - step) / max(1.0, self.cooldown * self.steps)
        return min(1.0, (step + 1) / max(1, self.warmup), left)

    def finish(self, generator: StreamingGenerator) -> None:
        generator.network.load_state_dict(dict(self.average.weights))

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizers": [o.state_dict() for o in self.optimizers],
            "average": dict(self.average.weights),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.average = WeightAverage(state["average"])


def split_parameters(network: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(weight matrices inside the transformer blocks, everything else)."""
    matrices, others = [], []
    for name, parameter in network.named_parameters():
        inside = ".blocks." in f".{name}" and parameter.ndim == 2 and name.endswith("weight")
        (matrices if inside else others).append(parameter)
    return matrices, others
