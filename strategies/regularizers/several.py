"""Several regularizers at once: their penalties add up."""

from collections.abc import Sequence

import torch
from torch import Tensor

from framework.interfaces import Regularizer
from framework.records import Record
from framework.types import Marks, Objective, Scores


class Several(Regularizer):
    """The sum of some regularizers' penalties, e.g. a branch KL and a pull on the anchor's velocity.

    parts: the regularizers. At most one of them may mark clips (`SelectiveKL` does); the others see all clips.
    """

    def __init__(self, parts: Sequence[Regularizer]) -> None:
        if not parts:
            raise ValueError("Several.parts is empty; name the regularizers, or use NoRegularizer")
        self.parts = tuple(parts)
        marking = [part for part in self.parts if type(part).prepare is not Regularizer.prepare]
        if len(marking) > 1:
            names = ", ".join(type(part).__name__ for part in marking)
            raise ValueError(f"Several.parts has {len(marking)} that mark clips ({names}); keep one of them")
        self.marking = marking[0] if marking else None

    @property
    def reads(self) -> frozenset[type[Record]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What any part reads."""
        return frozenset().union(*(part.reads for part in self.parts))

    @property
    def views(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What any part has asked."""
        return frozenset().union(*(part.views for part in self.parts))

    @property
    def signals(self) -> frozenset[str]:
        return frozenset().union(*(part.signals for part in self.parts))

    def prepare(self, scores: Scores, groups: Tensor, anchors: Tensor | None = None) -> Marks | None:
        return None if self.marking is None else self.marking.prepare(scores, groups, anchors)

    def penalty(self, objective: Objective, marks: Tensor | None) -> Tensor:
        parts = [part.penalty(objective, marks if part is self.marking else None) for part in self.parts]
        return torch.stack(parts).sum(0)

    def state_dict(self) -> dict:
        return {str(i): part.state_dict() for i, part in enumerate(self.parts)}

    def load_state_dict(self, state: dict) -> None:
        for i, part in enumerate(self.parts):
            part.load_state_dict(state[str(i)])
