"""What a rollout or an objective leaves behind. A record type is data and requirement in one.

An exploration *writes* records, surrogates, advantage rules and regularizers *read* them. A recipe is valid when
everything read was written upstream; a subclass satisfies a requirement for its base.
"""

from dataclasses import dataclass

from torch import Tensor


class Record:
    """Base of everything that one part writes and another reads."""


@dataclass(frozen=True)
class Endpoints(Record):
    """The clean latents that each branch arrived at, and the clean prefix its group shares."""

    latents: Tensor  # [N, C, F, H, W], the window's frames, float32
    prefix: Tensor | None  # [P, C, start, H, W], None when the window starts the stream
    start: int  # id of the window's first frame


@dataclass(frozen=True)
class Predictions(Record):
    """What the sampler saw and predicted at every step of every block of the window."""

    states: Tensor  # [N, K, C, F, H, W], the network's input x at the K steps
    velocities: Tensor  # [N, K, C, F, H, W]
    sigmas: tuple[float, ...]  # the K levels


@dataclass(frozen=True)
class Transitions(Record):
    """Sampler steps with a density: where each one started and where it went (requires a stochastic kernel)."""

    states: Tensor  # [N, K, C, F, H, W], x at level σ_k
    next_states: Tensor  # [N, K, C, F, H, W], x at level σ_{k+1}
    grid: tuple[tuple[float, float], ...]  # the K pairs (σ, σ')


@dataclass(frozen=True)
class OnPolicyTransitions(Transitions):
    """Transitions whose mean was the behaviour policy's own prediction under the canonical history."""


@dataclass(frozen=True)
class EndpointShift(Record):
    """Velocities of the current and the reference policy at the same probes: what a velocity-space KL measures."""

    current: Tensor  # [N, S, C, F, H, W]
    reference: Tensor  # [N, S, C, F, H, W], no gradient
