"""A reward of one's own without a class: a function of clips, or of one window at a time.

    # my_reward.py                                          # my_reward.gin
    def redness(frames, fps, prompt):                       REWARD = @function.WindowFunction()
        pixels = frames.float() / 255                       function.WindowFunction.function = @my_reward.redness
        return float((pixels[:, 0] - pixels[:, 1:].mean(1)).mean())
                                                            function.WindowFunction.names = ['redness']

The contract, which `framework.conformance.check_reward` tries: a score depends on its clip alone; the frames are not
changed; NaN says that a clip cannot be scored, and no number does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from framework.interfaces import RewardModel
from framework.types import Scores, VideoBatch
from rewards.windows import score_windows


@dataclass(frozen=True)
class FunctionReward(RewardModel):
    """A function of a whole batch.

    function: (VideoBatch) → {name: [N]}, or [N] where there is one name; NaN where a clip cannot be scored. names: the
    signals that it gives. Raises ValueError for any other result.
    """

    function: Callable[..., Any]
    names: Sequence[str] = ("reward",)

    def __post_init__(self) -> None:
        _check_names("FunctionReward.names", self.names)

    @property
    def signals(self) -> tuple[str, ...]:
        return tuple(self.names)

    @torch.no_grad()
    def score(self, videos: VideoBatch) -> Scores:
        given = _by_name(self.function(videos), self.names, self.function)
        return Scores.of({name: _column(given[name], name, len(videos), self.function) for name in self.names})


@dataclass(frozen=True)
class WindowFunction(RewardModel):
    """A function of one window of one clip; a clip's score is the mean over its windows.

    function: (frames uint8 [T, 3, H, W], frames per second, prompt) → {name: number}, or a number where there is one
    name; NaN where the window cannot be scored. names: the signals that it gives. Raises ValueError for any other
    result.
    """

    function: Callable[..., Any]
    names: Sequence[str] = ("reward",)

    def __post_init__(self) -> None:
        _check_names("WindowFunction.names", self.names)

    @property
    def signals(self) -> tuple[str, ...]:
        return tuple(self.names)

    @torch.no_grad()
    def score(self, videos: VideoBatch) -> Scores:
        return score_windows(videos, self.signals, self._score_spans)

    def _score_spans(self, clips: Tensor, prompts: Sequence[str], fps: float) -> Tensor:
        table = torch.empty(len(self.names), len(clips))
        for i, (clip, prompt) in enumerate(zip(clips, prompts, strict=True)):
            given = _by_name(self.function(clip, fps, prompt), self.names, self.function)
            for k, name in enumerate(self.names):
                table[k, i] = _number(given[name], name, self.function)
        return table


def _check_names(what: str, names: Sequence[str]) -> None:
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{what} must name at least one signal, each once, got {list(names)}")


def _called(function: Callable[..., Any]) -> str:
    """The name of a function, also of one that gin has filled arguments into."""
    inner = getattr(function, "func", function)
    return getattr(inner, "__name__", type(inner).__name__)


def _by_name(given: Any, names: Sequence[str], function: Callable[..., Any]) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        if len(names) > 1:
            raise ValueError(f"{_called(function)} must give {{name: scores}} for {list(names)}, got {_kind(given)}")
        return {names[0]: given}
    if set(given) != set(names):
        raise ValueError(f"{_called(function)} gives {sorted(map(str, given))}, but its names are {list(names)}")
    return given


def _column(value: Any, name: str, clips: int, function: Callable[..., Any]) -> Tensor:
    """[clips] float32 on the CPU."""
    if not isinstance(value, Tensor) or value.shape != (clips,) or value.is_complex():
        raise ValueError(f"{_called(function)} must give {name} as a tensor [{clips}], got {_kind(value)}")
    column = value.detach().float().cpu()
    _refuse_infinite(column, name, function)
    return column


def _number(value: Any, name: str, function: Callable[..., Any]) -> float:
    scalar = isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)
    if not scalar or isinstance(value, bool):
        raise ValueError(f"{_called(function)} must give {name} as one number, got {_kind(value)}")
    number = float(value)
    _refuse_infinite(torch.tensor(number), name, function)
    return number


def _refuse_infinite(values: Tensor, name: str, function: Callable[..., Any]) -> None:
    if bool(torch.isinf(values).any()):
        raise ValueError(f"{_called(function)} gives an infinite {name}; give NaN for a clip that cannot be scored")


def _kind(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__} {value!r:.40}"
