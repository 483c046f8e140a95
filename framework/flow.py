"""The one flow convention of the project and its conversions.

    x_σ = (1 − σ) x0 + σ ε        v = ε − x0        σ = 0 is data, σ = 1 is noise

Every function broadcasts σ from the left: a σ of shape [N, F] against a latent [N, C, F, H, W] is given as
``expand_sigma(sigma)``. All of it runs in the dtype of its arguments; callers keep latents in float32.
"""

from torch import Tensor

X0_SIGMA_FLOOR = 0.05
"""Smallest σ that an x0-predicting network is divided by, so that v stays bounded near the data."""


def expand_sigma(sigma: Tensor) -> Tensor:
    """σ per frame [..., F] → [..., 1, F, 1, 1], which broadcasts over a latent [..., C, F, H, W]."""
    return sigma.unsqueeze(-2).unsqueeze(-1).unsqueeze(-1)


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_σ = (1 − σ) x0 + σ ε, with σ already broadcastable."""
    return (1 - sigma) * x0 + sigma * noise


def velocity_distance(left: Tensor, right: Tensor) -> Tensor:
    """⟨(v − v')²⟩ over all dimensions but the first: [N]."""
    return (left - right).square().flatten(1).mean(1)


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """v = ε − x0, the velocity of the straight path from data to noise."""
    return noise - x0


def x0_from_velocity(x: Tensor, velocity: Tensor, sigma: Tensor | float) -> Tensor:
    """x̂0 = x_σ − σ v."""
    return x - sigma * velocity


def noise_from_velocity(x: Tensor, velocity: Tensor, sigma: Tensor | float) -> Tensor:
    """ε̂ = x_σ + (1 − σ) v, the noise end of the same straight path (x̂1 in the papers)."""
    return x + (1 - sigma) * velocity


def velocity_from_x0(x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """v = (x_σ − x̂0) / max(σ, 0.05): how an x0-predicting network speaks velocity."""
    return (x - x0) / sigma.clamp(min=X0_SIGMA_FLOOR)
