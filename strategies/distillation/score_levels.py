"""Noise levels at which critic and teacher are asked: shift(U[0, 1)), kept away from the ends in one of two ways."""

from dataclasses import dataclass

import torch
from torch import Tensor

from framework.distillation_interfaces import ScoreLevels
from framework.flow import X0_SIGMA_FLOOR
from framework.schedules import draw_shifted_sigma


@dataclass(frozen=True)
class Floored(ScoreLevels):
    """σ = max(shift(u), floor), u ~ U[0, 1) for every block: what the base was trained at.

    floor: below it an x0-predicting network is divided by the floor and not by σ, and speaks no exact velocity.
    """

    floor: float = X0_SIGMA_FLOOR

    def __post_init__(self) -> None:
        if not 0 <= self.floor < 1:
            raise ValueError(f"Floored.floor must lie in [0, 1), got {self.floor}")

    def draw(self, clips: int, blocks: int, shift: float, random: torch.Generator) -> Tensor:
        return draw_shifted_sigma((clips, 1, blocks), shift, random, floor=self.floor)


@dataclass(frozen=True)
class Rescaled(ScoreLevels):
    """σ = low + (high − low) shift(u), u ~ U[0, 1): RAVEN's map into [0.02, 0.98]; no mass piles up at the ends.

    per_block: a level of its own for every block; False gives a clip one level, which a bidirectional critic needs.
    integer_timesteps: round 1000 σ to whole timesteps.
    """

    low: float = 0.02
    high: float = 0.98
    per_block: bool = True
    integer_timesteps: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < 1:
            raise ValueError(f"Rescaled needs 0 < low < high < 1, got {self.low} and {self.high}")

    def draw(self, clips: int, blocks: int, shift: float, random: torch.Generator) -> Tensor:
        shifted = draw_shifted_sigma((clips, 1, blocks if self.per_block else 1), shift, random)
        sigma = (self.low + (self.high - self.low) * shifted).expand(clips, 1, blocks)
        return (1000 * sigma).round() / 1000 if self.integer_timesteps else sigma
