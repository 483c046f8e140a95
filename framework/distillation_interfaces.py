"""The extension points of making a few-step generator: pre-training stages, and what a distillation is made of."""

from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor

from framework.interfaces import GeneratorRecipe, StreamingGenerator
from framework.rng import Streams


class ClipSource(Protocol):
    """Training clips with captions, for pre-training."""

    def sample(self, n: int, frames: int, generator: torch.Generator) -> tuple[Tensor, list]:
        """(clean latents [n, C, frames, H, W], n captions whose ``str`` is the prompt)."""
        ...


class PretrainingStage(ABC):
    """One stage of making a few-step generator. Everything it learns stays in the generator's network."""

    name: str
    steps: int

    @abstractmethod
    def begin(self, generator: StreamingGenerator) -> None:
        """Build optimisers and copies from the generator as the previous stage left it."""

    @abstractmethod
    def step(self, generator: StreamingGenerator, data: ClipSource, streams: Streams, step: int) -> dict[str, Tensor]:
        """One optimiser step; metrics as tensors, so that nothing waits for the device."""

    @abstractmethod
    def finish(self, generator: StreamingGenerator) -> None:
        """Leave the stage's result in the generator's network."""

    @abstractmethod
    def state_dict(self) -> dict:
        """Everything that `step` depends on beside the network's weights."""

    @abstractmethod
    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict`; called after `begin`."""


class DistributionGradient(ABC):
    """Where a distilled student is to move, from two predictions at its noised output."""

    @abstractmethod
    def __call__(self, x0: Tensor, critic_x0: Tensor, teacher_x0: Tensor) -> Tensor:
        """dl/dx̂ of the student's x̂0 [N, …], before block weights and the mean; all of one shape, no graph."""


class ScoreLevels(ABC):
    """Noise levels at which critic and teacher are asked about a clip."""

    @abstractmethod
    def draw(self, clips: int, blocks: int, shift: float, random: torch.Generator) -> Tensor:
        """σ of every block [clips, 1, blocks]; ``shift``: the generator's."""


class StudentHistory(ABC):
    """The clean past that a student is asked behind while it is distilled, with the prompts it belongs to."""

    @abstractmethod
    def draw(
        self, count: int, step: int, recipe: GeneratorRecipe, streams: Streams
    ) -> tuple[tuple[str, ...], Tensor | None]:
        """(count prompts, clean clips [count, C, F, H, W] to stand before the blocks; None: the student's own)."""
