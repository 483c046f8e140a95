"""Several reward models as one, and one signal as a weighted sum of others."""

import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from framework.interfaces import RewardModel
from framework.types import Scores, VideoBatch
from rewards.failure import only
from rewards.wrapped import WrappedReward


@dataclass(frozen=True)
class CompositeReward(RewardModel):
    """All signals of several reward models, side by side; advantage rules weigh them. Names must differ."""

    models: Sequence[RewardModel]

    def __post_init__(self) -> None:
        names = [name for model in self.models for name in model.signals]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice or not names:
            raise ValueError(
                f"CompositeReward.models need distinct signals and at least one model; given twice: {twice}"
            )

    @property
    def signals(self) -> tuple[str, ...]:
        return tuple(name for model in self.models for name in model.signals)

    def score(self, videos: VideoBatch) -> Scores:
        scores = self.models[0].score(videos)
        for model in self.models[1:]:
            scores = scores | model.score(videos)
        return scores

    def settle(self, scores: Scores, groups: Tensor) -> Scores:
        settled = [model.settle(only(scores, model.signals), groups) for model in self.models]
        return functools.reduce(operator.or_, settled)

    def metrics(self) -> Mapping[str, float]:
        return {name: value for model in self.models for name, value in model.metrics().items()}

    def unavailable(self) -> str | None:
        return next((reason for model in self.models if (reason := model.unavailable()) is not None), None)

    def state_dict(self) -> dict:
        return {str(i): model.state_dict() for i, model in enumerate(self.models)}

    def load_state_dict(self, state: dict) -> None:
        for i, model in enumerate(self.models):
            model.load_state_dict(state[str(i)])


@dataclass(frozen=True)
class WeightedReward(WrappedReward):
    """One signal Σ_k w_k r_k / Σ_k |w_k| of another model's raw scores; invalid where any of them is."""

    model: RewardModel
    weights: Mapping[str, float]
    name: str = "weighted"

    def __post_init__(self) -> None:
        unknown = sorted(set(self.weights) - set(self.model.signals))
        if unknown or not any(self.weights.values()):
            raise ValueError(
                f"WeightedReward.weights must weigh signals of {list(self.model.signals)}, not all 0; "
                f"got {dict(self.weights)}"
            )
        refuse_policy(self.model, "WeightedReward")

    @property
    def signals(self) -> tuple[str, ...]:
        return (self.name,)

    def score(self, videos: VideoBatch) -> Scores:
        raw = self.model.score(videos)
        scale = sum(abs(w) for w in self.weights.values())
        value = torch.stack([w * raw.values[name] for name, w in self.weights.items()]).sum(0) / scale
        valid = torch.stack([raw.valid[name] for name in self.weights]).all(0)
        return Scores({self.name: value}, {self.name: valid})


def refuse_policy(model: RewardModel, wrapper: str) -> None:
    """Raises ValueError for a failure policy inside of a wrapper that steps do not ask to settle anything."""
    inside = model.models if isinstance(model, CompositeReward) else (model,)
    for part in inside:
        if isinstance(part, CompositeReward):
            refuse_policy(part, wrapper)
        elif type(part).settle is not RewardModel.settle:
            name = type(part).__name__
            raise ValueError(
                f"{wrapper} cannot hold {name}, which decides about the failed scores of a step and would not be "
                f"asked: put {wrapper} inside of {name}"
            )
