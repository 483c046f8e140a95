"""Noise levels: the shifted few-step grid of a distilled student and the shifted draw that training uses.

shift:  σ' = k σ / (1 + (k − 1) σ)        timestep t = 1000 σ (float, never rounded unless asked)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


def shift_sigma(sigma, shift: float):
    """σ' = k σ / (1 + (k − 1) σ) for a float or a tensor; k = 1 changes nothing."""
    return shift * sigma / (1 + (shift - 1) * sigma)


@dataclass(frozen=True)
class FewStepSchedule:
    """The σ grid a few-step student was distilled on: σ_0 = 1 > σ_1 > … and finally 0.

    steps: nominal steps out of 1000, descending, e.g. (1000, 750, 500, 250): 1000 − 1000 i/K of K = 4.
    shift: the time shift k of the flow (5 for the Wan family).
    warp: whether the nominal steps are shifted; un-warped lists are a known way to lose quality.
    integer_timesteps: round 1000 σ to whole timesteps (RAVEN's grid 1000, 938, 833, 625).
    """

    steps: tuple[float, ...] = (1000, 750, 500, 250)
    shift: float = 5.0
    warp: bool = True
    integer_timesteps: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", tuple(self.steps))
        if not self.steps or sorted(set(self.steps), reverse=True) != list(self.steps):
            raise ValueError(f"FewStepSchedule.steps must strictly descend, got {self.steps}")
        if not (self.steps[-1] > 0 and self.steps[0] <= 1000):
            raise ValueError(f"FewStepSchedule.steps must lie in 1 … 1000, got {self.steps}")
        if self.shift <= 0:
            raise ValueError(f"FewStepSchedule.shift must be positive, got {self.shift}")
        if len(set(self.sigmas)) < len(self.steps) or self.sigmas[-1] == 0:
            raise ValueError(
                f"FewStepSchedule.integer_timesteps=True rounds two of the steps {self.steps} to the same timestep, or "
                f"one to 0: {[round(1000 * s) for s in self.sigmas]}; leave it False or space the steps"
            )

    @property
    def sigmas(self) -> tuple[float, ...]:
        """The K noise levels at which the network is asked, descending; the final 0 is not among them."""
        levels = [step / 1000 for step in self.steps]
        if self.warp:
            levels = [shift_sigma(level, self.shift) for level in levels]
        if self.integer_timesteps:
            levels = [round(1000 * level) / 1000 for level in levels]
        return tuple(levels)

    @property
    def transitions(self) -> tuple[tuple[float, float], ...]:
        """(σ, σ') of every sampler step; the last one has σ' = 0."""
        grid = (*self.sigmas, 0.0)
        return tuple(pairwise(grid))


def draw_shifted_sigma(shape: Sequence[int], shift: float, generator: torch.Generator, floor: float = 0.0) -> Tensor:
    """σ = shift(u), u ~ U[0, 1): the training distribution of shifted flows; optionally at least ``floor``."""
    u = torch.rand(tuple(shape), generator=generator)
    return shift_sigma(u, shift).clamp(min=floor)
