"""Real rewards judge every window of a clip by its own prompt; here windows are cut, batched and put together."""

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from framework.interfaces import RewardModel
from framework.pooling import pool_windows
from framework.types import Scores, VideoBatch
from rewards.frame_sampling import FrameSampling, SpanTooShort

SpanScore = Callable[[Tensor, Sequence[str], float], Tensor]
"""(frames uint8 [n, T, 3, H, W] of one length, n prompts, frames per second) → scores [K, n], NaN for none."""


def score_windows(videos: VideoBatch, signals: Sequence[str], score_spans: SpanScore) -> Scores:
    """Scores of K signals: the plain mean over each clip's windows, and the windows themselves [N, W].

    Windows of the same span are scored together. A clip with a window that could not be scored, or is too short for how
    its frames are chosen, is invalid; the columns of windows that a clip does not have are NaN.
    """
    counts = torch.tensor([len(windows) for windows in videos.windows])
    table = torch.full((len(signals), len(videos), int(counts.max())), torch.nan)
    places: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for clip, windows in enumerate(videos.windows):
        for column, window in enumerate(windows):
            places.setdefault((window.start, window.stop), []).append((clip, column))
    for (start, stop), found in places.items():
        rows, columns = map(list, zip(*found, strict=True))
        prompts = [videos.windows[clip][column].prompt for clip, column in found]
        with contextlib.suppress(SpanTooShort):  # too short for how its frames are chosen: no score
            scores = score_spans(videos.frames[rows, start:stop], prompts, videos.fps).detach().float().cpu()
            table[:, rows, columns] = scores.where(torch.isfinite(scores), torch.nan)
    live = torch.arange(table.shape[2]) < counts[:, None]
    values = {name: pool_windows(column, live.float()) for name, column in zip(signals, table, strict=True)}
    valid = {name: torch.isfinite(value) for name, value in values.items()}
    return Scores(values, valid, dict(zip(signals, table, strict=True)))


class WindowReward(RewardModel):
    """One signal, ``name``, of a reward that judges windows by themselves."""

    name: str

    @property
    def signals(self) -> tuple[str, ...]:
        return (self.name,)

    @torch.no_grad()
    def score(self, videos: VideoBatch) -> Scores:
        return score_windows(videos, self.signals, self._score_spans)

    @abstractmethod
    def _score_spans(self, clips: Tensor, prompts: Sequence[str], fps: float) -> Tensor:
        """As `SpanScore`, [1, n]."""


def take_frames(sampling: FrameSampling, clips: Tensor, prompts: Sequence[str], fps: float) -> Tensor:
    """The chosen frames [n, M, 3, H, W] of clips [n, T, 3, H, W]."""
    chosen = [list(sampling.indices(clips.shape[1], fps, prompt)) for prompt in prompts]
    return torch.stack([clip[rows] for clip, rows in zip(clips, chosen, strict=True)])
