"""One sampler step as a distribution: mean and std of x_{σ'} given x_σ and the network's velocity.

A kernel is a frozen value. ``std`` is a float: it depends on the grid alone, never on the data, so nothing here
reads a tensor back to the host.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from framework.flow import noise_from_velocity, x0_from_velocity


class TransitionKernel(ABC):
    """x_{σ'} ~ N(mean(x_σ, v), std² I)."""

    @abstractmethod
    def mean(self, x: Tensor, velocity: Tensor, sigma: float, sigma_next: float) -> Tensor:
        """Mean of the next state, same shape as x."""

    @abstractmethod
    def coefficients(self, sigma: float, sigma_next: float) -> tuple[float, float]:
        """(a, b) of mean = a x + b v; b is the slope d mean / d v, and −b/σ the slope d mean / d x̂0 at a fixed x."""

    @abstractmethod
    def std(self, sigma: float, sigma_next: float) -> float:
        """Standard deviation of the next state; 0 where the step is deterministic."""

    @property
    @abstractmethod
    def stochastic(self) -> bool:
        """Whether some step of a grid has std > 0, i.e. whether transitions have a density at all."""

    def step(self, x: Tensor, velocity: Tensor, sigma: float, sigma_next: float, noise: Tensor | None) -> Tensor:
        """mean + std · noise; a step with std = 0 ignores the noise."""
        std = self.std(sigma, sigma_next)
        mean = self.mean(x, velocity, sigma, sigma_next)
        if std == 0:
            return mean
        if noise is None:
            raise ValueError(f"{type(self).__name__} needs noise for the step {sigma:g} → {sigma_next:g}")
        return mean + std * noise


@dataclass(frozen=True)
class Consistency(TransitionKernel):
    """Predict x̂0, then noise it again: the sampler of few-step students (consistency models).

        mean = (1 − σ') x̂0 + sqrt(σ'² − std²) ε̂        std = σ' sin(η π/2)

    η = 1 is plain re-noise, N((1 − σ') x̂0, σ'² I), the kernel of RAVEN's CM-GRPO (2605.15190, sec. 4); smaller η is
    coefficient-preserving sampling (2509.05952). The last step (σ' = 0) is a point mass at x̂0.
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.eta <= 1:
            raise ValueError(f"Consistency.eta must lie in (0, 1], got {self.eta}; use Ode for a deterministic sampler")

    def mean(self, x: Tensor, velocity: Tensor, sigma: float, sigma_next: float) -> Tensor:
        mean = (1 - sigma_next) * x0_from_velocity(x, velocity, sigma)
        kept = math.sqrt(max(0.0, sigma_next**2 - self.std(sigma, sigma_next) ** 2)) if self.eta < 1 else 0.0
        return mean + kept * noise_from_velocity(x, velocity, sigma) if kept else mean

    def coefficients(self, sigma: float, sigma_next: float) -> tuple[float, float]:
        kept = math.sqrt(max(0.0, sigma_next**2 - self.std(sigma, sigma_next) ** 2))
        return 1 - sigma_next + kept, (1 - sigma) * kept - sigma * (1 - sigma_next)

    def std(self, sigma: float, sigma_next: float) -> float:
        return sigma_next * math.sin(self.eta * math.pi / 2) if self.eta < 1 else sigma_next

    @property
    def stochastic(self) -> bool:
        return True


@dataclass(frozen=True)
class Ode(TransitionKernel):
    """The Euler step of the probability-flow ODE: x + (σ' − σ) v, no noise."""

    def mean(self, x: Tensor, velocity: Tensor, sigma: float, sigma_next: float) -> Tensor:
        return x + (sigma_next - sigma) * velocity

    def coefficients(self, sigma: float, sigma_next: float) -> tuple[float, float]:
        return 1.0, sigma_next - sigma

    def std(self, sigma: float, sigma_next: float) -> float:
        return 0.0

    @property
    def stochastic(self) -> bool:
        return False


class EulerMaruyama(TransitionKernel):
    """One step of the SDE that has the ODE's marginals, with diffusion g(σ) and D = σ − σ':

        mean = x − D v − (g² D / 2σ) ε̂        std = g √D        (Flow-GRPO 2505.05470, DanceGRPO 2505.07818)

    Every step is stochastic, the last one too. Baselines only: a few-step student was never trained at the states that
    added noise leads to. One class per choice of g.
    """

    @abstractmethod
    def squared_diffusion(self, sigma: float, sigma_next: float) -> float:
        """g² of the step."""

    def coefficients(self, sigma: float, sigma_next: float) -> tuple[float, float]:
        pull = self.squared_diffusion(sigma, sigma_next) * (sigma - sigma_next) / (2 * sigma)
        return 1 - pull, sigma_next - sigma - pull * (1 - sigma)

    def mean(self, x: Tensor, velocity: Tensor, sigma: float, sigma_next: float) -> Tensor:
        of_x, of_velocity = self.coefficients(sigma, sigma_next)
        return of_x * x + of_velocity * velocity

    def std(self, sigma: float, sigma_next: float) -> float:
        return math.sqrt(self.squared_diffusion(sigma, sigma_next) * (sigma - sigma_next))

    @property
    def stochastic(self) -> bool:
        return True


@dataclass(frozen=True)
class FlowGRPO(EulerMaruyama):
    """g² = a² σ / (1 − σ), and at σ = 1, where that is infinite, a² / (1 − σ'): the first step's std is exactly a.

    noise_level: a (.7 in the release). The convention of Flow-GRPO, which puts the second grid value into 1 − σ only.
    """

    noise_level: float = 0.7

    def __post_init__(self) -> None:
        _check_noise("FlowGRPO.noise_level", self.noise_level)

    def squared_diffusion(self, sigma: float, sigma_next: float) -> float:
        return self.noise_level**2 * sigma / (1 - (sigma_next if sigma == 1 else sigma))


@dataclass(frozen=True)
class RavenEulerMaruyama(EulerMaruyama):
    """As `FlowGRPO` but for the first step, where g² = a² (1 + 1 / (1 − σ')): RAVEN's baseline (2605.15190, App.).

    Its release leaves sigma_max at 1, which divides by 1e-6 there: a std of 199 at a = .8. With the second grid value
    in its place the first step's std is a √(1 + D), 3 % above Flow-GRPO's.
    """

    noise_level: float = 0.7

    def __post_init__(self) -> None:
        _check_noise("RavenEulerMaruyama.noise_level", self.noise_level)

    def squared_diffusion(self, sigma: float, sigma_next: float) -> float:
        ratio = 1 + 1 / (1 - sigma_next) if sigma == 1 else sigma / (1 - sigma)
        return self.noise_level**2 * ratio


@dataclass(frozen=True)
class DanceGRPO(EulerMaruyama):
    """g = η at every level: DanceGRPO's kernel. eta: .25 … .3 in the release."""

    eta: float = 0.3

    def __post_init__(self) -> None:
        _check_noise("DanceGRPO.eta", self.eta)

    def squared_diffusion(self, sigma: float, sigma_next: float) -> float:
        return self.eta**2


def _check_noise(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}; use Ode for a deterministic sampler")


def gaussian_log_density(x: Tensor, mean: Tensor, std: float) -> Tensor:
    """log N(x; mean, std² I) averaged over all dimensions but the first → [N], in float32 or wider.

    The mean (not the sum) over dimensions is the convention under which PPO clip ranges near 1e-4 are published.
    Raises ValueError for std = 0: a point mass has no density.
    """
    if std <= 0:
        raise ValueError("a deterministic step (std = 0) has no log-density; leave the last step out")
    residual = (x - mean).flatten(1)
    if residual.dtype.itemsize < 4:
        residual = residual.float()
    return -residual.square().mean(1) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)
