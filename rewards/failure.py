"""What a step does about clips that a reward could not score: one class per policy, wrapped around its reward.

    REWARD = @failure.Mask()
    failure.Mask.model = @client.HttpReward()

A failed score is never a zero. Without any policy here, a clip without a score leaves its group, and a reward that
cannot score at all ends the run. The policies decide on the scores of all clips of the step, gathered from all ranks,
so every rank decides the same and takes the same number of updates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from framework.advantages import group_mean
from framework.interfaces import RewardFailed, RewardModel
from framework.reporting.progress import say
from framework.types import Scores, VideoBatch
from rewards.wrapped import WrappedReward


@dataclass(frozen=True)
class Raise(WrappedReward):
    """One clip without a score ends the run, on all ranks at the same step."""

    model: RewardModel

    def score(self, videos: VideoBatch) -> Scores:
        return self.model.score(videos)

    def settle(self, scores: Scores, groups: Tensor) -> Scores:
        scores = self.model.settle(scores, groups)
        for name in learned(scores, self.signals):
            failed = (~scores.valid[name]).nonzero().flatten().tolist()
            if failed:
                raise RewardFailed(
                    f"{name} is invalid for {len(failed)} of {len(groups)} clips, the first in group "
                    f"{int(groups[failed[0]])}; failure.Mask leaves such clips out in place of failure.Raise"
                )
        return scores


@dataclass
class Mask(WrappedReward):
    """A clip without a score leaves its group, a group that lost too many clips leaves the step, and a run that keeps
    losing clips ends.

    A group in which something failed is kept with ``min_share`` of its clips and at least ``min_clips``, anchors
    counted. limit: share of the step's clips without a score; above it for ``patience`` steps in a row the run ends.
    A reward that cannot score at all (RewardFailed) gives clips without a score; a step without any is an error of its
    own, which `train.nonfinite` answers.
    """

    model: RewardModel
    min_share: float = 0.5
    min_clips: int = 3
    limit: float = 0.05
    patience: int = 3
    in_a_row: int = field(default=0, init=False)
    reason: str = field(default="", init=False)
    failed: dict[str, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if not (0 <= self.min_share <= 1 and 0 <= self.limit <= 1):
            raise ValueError(f"Mask.min_share and limit are shares from 0 to 1, got {self.min_share} and {self.limit}")
        if self.min_clips < 1 or self.patience < 1:
            raise ValueError(
                f"Mask.min_clips and patience must be at least 1, got {self.min_clips} and {self.patience}"
            )

    def score(self, videos: VideoBatch) -> Scores:
        try:
            return self.model.score(videos)
        except RewardFailed as error:
            self.reason = str(error)
            say(f"reward {', '.join(self.signals)}: {len(videos)} clips without a score: {error}")
            return without_scores(self.signals, len(videos))

    def settle(self, scores: Scores, groups: Tensor) -> Scores:
        scores = self.model.settle(scores, groups)
        names = learned(scores, self.signals)
        valid = torch.stack([torch.ones(len(groups), dtype=torch.bool), *(scores.valid[name] for name in names)]).all(0)
        share = float((~valid).double().mean())
        self.failed = {name: float((~scores.valid[name]).double().mean()) for name in names}
        self.in_a_row = self.in_a_row + 1 if share > self.limit else 0
        if self.in_a_row >= self.patience:
            raise RewardFailed(
                f"{', '.join(self.signals)}: {share:.0%} of the clips have no score, {self.in_a_row} steps in a row "
                f"above Mask.limit={self.limit:g}{'; the last reason: ' if self.reason else ''}{self.reason}"
            )
        return dropped(scores, names, valid & ~self._depleted(valid, groups))

    def _depleted(self, valid: Tensor, groups: Tensor) -> Tensor:
        """Clips of groups in which something failed and too little is left, bool [N]."""
        left = group_mean(valid.double(), groups)
        size = (groups[:, None] == groups).sum(1)
        count = (left * size).round()
        return (left < 1) & ((left < self.min_share) | (count < self.min_clips))

    def metrics(self) -> Mapping[str, float]:
        shares = {f"reward/{name}/invalid": share for name, share in self.failed.items()}
        return {**self.model.metrics(), **shares}

    def state_dict(self) -> dict:
        return {"in_a_row": self.in_a_row, "model": self.model.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.in_a_row = state["in_a_row"]
        self.model.load_state_dict(state["model"])


@dataclass
class SkipComponent(WrappedReward):
    """Signals that are only looked at: logged where they are valid, never learned from, and free to fail.

    Neither the advantage rule nor a regularizer gets to see them, so a failure changes no update.
    """

    model: RewardModel
    failed: dict[str, float] = field(default_factory=dict, init=False)

    def score(self, videos: VideoBatch) -> Scores:
        try:
            return self.model.score(videos)
        except RewardFailed as error:
            say(f"reward {', '.join(self.signals)}, which nothing learns from, is skipped: {error}")
            return without_scores(self.signals, len(videos))

    def settle(self, scores: Scores, groups: Tensor) -> Scores:
        self.failed = {name: float((~scores.valid[name]).double().mean()) for name in self.signals}
        return only(scores, [name for name in scores.values if name not in self.signals])

    def metrics(self) -> Mapping[str, float]:
        shares = {f"reward/{name}/invalid": share for name, share in self.failed.items()}
        return {**self.model.metrics(), **shares}

    def unavailable(self) -> str | None:
        return None  # it is free to fail


def learned(scores: Scores, signals: Sequence[str]) -> list[str]:
    """Those of some signals that are still there: a `SkipComponent` further inside has taken its own away."""
    return [name for name in signals if name in scores.values]


def without_scores(signals: Sequence[str], clips: int) -> Scores:
    """Scores of so many clips of which none could be scored."""
    return Scores.of({name: torch.full((clips,), torch.nan) for name in signals})


def only(scores: Scores, names: Sequence[str]) -> Scores:
    """The scores of some of the signals."""
    return Scores(
        {name: scores.values[name] for name in names},
        {name: scores.valid[name] for name in names},
        {name: scores.windows[name] for name in names if name in scores.windows},
    )


def dropped(scores: Scores, signals: Sequence[str], kept: Tensor) -> Scores:
    """The scores with the clips that are not kept, bool [N], made invalid in some of the signals."""
    values = {n: v.masked_fill(~kept, torch.nan) if n in signals else v for n, v in scores.values.items()}
    valid = {n: v & kept if n in signals else v for n, v in scores.valid.items()}
    return replace(scores, values=values, valid=valid)
