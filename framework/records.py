"""What a rollout or an objective leaves behind. A record type is data and requirement in one.

An exploration *writes* records, surrogates, advantage rules and regularizers *read* them. A recipe is valid when
everything read was written upstream; a subclass satisfies a requirement for its base.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from framework.flow import velocity_distance
from framework.kernels import TransitionKernel

REFERENCE_VIEW = frozenset({"reference"})


class Record:
    """Base of everything that one part writes and another reads."""

    views: ClassVar[frozenset[str]] = frozenset()
    """Policies that an objective must have asked to write it; a surrogate that writes it leaves it out otherwise."""


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
class Displacements(Predictions):
    """Predictions under a history other than the canonical one; an energy measures how they differ when replayed."""

    blocks: int  # how many blocks of the window, from its first, were made under the other history
    steps: tuple[bool, ...]  # which of the K steps were


@dataclass(frozen=True)
class Anchors(Record):
    """A branch per group that explored nothing."""

    mask: Tensor  # bool [N]


@dataclass(frozen=True)
class Transitions(Record):
    """Sampler steps with a density: where each one started and where it went (requires a stochastic kernel)."""

    states: Tensor  # [N, K, C, F, H, W], x at level σ_k
    next_states: Tensor  # [N, K, C, F, H, W], x at level σ_{k+1}
    grid: tuple[tuple[float, float], ...]  # the K pairs (σ, σ')
    kernel: TransitionKernel  # whose steps these are


@dataclass(frozen=True)
class OnPolicyTransitions(Transitions):
    """Transitions whose mean was the behaviour policy's own prediction under the canonical history."""


@dataclass(frozen=True)
class AnchorShift(Record):
    """`EndpointShift` on the trajectory of the group's anchor, repeated on its branches: drift that all share."""

    views: ClassVar[frozenset[str]] = REFERENCE_VIEW

    distance: Tensor  # [N]


@dataclass(frozen=True)
class BranchLogits(Record):
    """Log-probabilities of the branches of a group under the current and the reference policy."""

    views: ClassVar[frozenset[str]] = REFERENCE_VIEW

    current: Tensor  # [N], Σ_branches exp = 1 in every group; 0 at anchors
    reference: Tensor  # [N], no gradient
    groups: Tensor  # [N]


@dataclass(frozen=True)
class KernelShift(Record):
    """Closed-form KL of the sampler's Gaussian steps from the reference's."""

    views: ClassVar[frozenset[str]] = REFERENCE_VIEW

    divergence: Tensor  # [N], KL(θ ‖ ref) averaged over dimensions and trained steps


@dataclass(frozen=True)
class EndpointShift(Record):
    """How far the current policy's velocities moved from the reference's at the same probes: a velocity-space KL."""

    views: ClassVar[frozenset[str]] = REFERENCE_VIEW

    distance: Tensor  # [N], ⟨(v_θ − v_ref)²⟩ over all dimensions but the first


def endpoint_shift(views: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The statistic behind `EndpointShift`, where somebody asked for the reference."""
    return {"shift": velocity_distance(views["current"], views["reference"])} if "reference" in views else {}


def written_shift(statistics: Mapping[str, Tensor]) -> dict[type, "Record"]:
    """`EndpointShift` where its statistic was measured."""
    return {EndpointShift: EndpointShift(statistics["shift"])} if "shift" in statistics else {}
