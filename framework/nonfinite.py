"""NaN and infinity in a training step: found before they can move a weight, named with their step, answered by a rule.

The rule is a part: `Stop` ends the run, `Skip` leaves the step out, counts it, and ends a run that does nothing else.
Checked are the latents of a rollout, the scores of every signal, the advantages, the loss and its terms, and the
gradients. On several ranks all of them find the same, so all of them take the same way.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from framework.interfaces import Remembering
from framework.types import Advantage, Scores


class NonFinite(FloatingPointError):
    """Something in a step is NaN or infinite; the message is one line that names it, the step, and what to change."""


class NonFiniteRule(Remembering, ABC):
    """What a run does about a step with NaN or infinity in it."""

    @abstractmethod
    def answer(self, found: NonFinite) -> None:
        """Returns where the run goes on without this step; raises NonFinite where it must not."""

    def passed(self) -> None:
        """A step went through."""
        return None

    def metrics(self) -> Mapping[str, float]:
        """Numbers to log with every step."""
        return {}


@dataclass(frozen=True)
class Stop(NonFiniteRule):
    """The first one ends the run before it moves anything, and the last checkpoint is whole."""

    def answer(self, found: NonFinite) -> None:
        raise found


@dataclass
class Skip(NonFiniteRule):
    """The update moves nothing and the next step follows, with other prompts and noise; ``limit`` of them in a row end
    the run, since a policy that has diverged never comes back. Earlier updates of the same step stay."""

    limit: int = 3
    skipped: int = field(default=0, init=False)
    in_a_row: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ValueError(f"Skip.limit must be at least 1, got {self.limit}; Stop() ends a run at the first")

    def answer(self, found: NonFinite) -> None:
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row >= self.limit:
            raise NonFinite(f"{found} ({self.in_a_row} steps in a row, Skip.limit={self.limit})") from found

    def passed(self) -> None:
        self.in_a_row = 0

    def metrics(self) -> Mapping[str, float]:
        return {"train/skipped_steps": float(self.skipped)}

    def state_dict(self) -> dict:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]


def all_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite."""
    return bool(torch.isfinite(tensor).all())


def check_latents(fine: bool, step: int) -> None:
    """Raises NonFinite for a rollout with NaN or infinity in its latents, on any rank."""
    if not fine:
        raise NonFinite(
            f"non-finite latents in the rollout of step {step}: the policy has diverged; go back to an earlier "
            f"checkpoint and lower AdamW.learning_rate or raise the regularizer's weight"
        )


def check_scores(scores: Scores, step: int) -> None:
    """Raises NonFinite for a signal without one valid score. A single clip that has none is left out by its rule."""
    for name, valid in scores.valid.items():
        if not bool(valid.any()):
            raise NonFinite(
                f"non-finite reward {name!r} for all {len(valid)} clips of step {step}: the reward model fails; look "
                f"at what it says of one clip"
            )


def check_advantages(advantage: Advantage, step: int) -> None:
    """Raises NonFinite for an active clip without a finite advantage."""
    if not all_finite(advantage.values[advantage.active]):
        raise NonFinite(
            f"non-finite advantage at step {step}: its rule divided by no spread, or met a score too large for float32"
        )


def terms(metrics: Mapping[str, Tensor | float]) -> dict[str, Tensor]:
    """The loss and its two terms, of what an update measured."""
    return {name: torch.as_tensor(metrics[name]) for name in ("loss", "policy_loss", "penalty")}
