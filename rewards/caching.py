"""Clips that were scored before are not scored again: worth it where the same clips come back, e.g. controls."""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from framework.interfaces import RewardModel
from framework.serving.protocol import clip_names
from framework.types import Scores, VideoBatch
from rewards.composite import refuse_policy
from rewards.wrapped import WrappedReward


@dataclass(frozen=True)
class Known:
    """The scores of one clip. windows: per signal [W]."""

    values: Mapping[str, Tensor]
    windows: Mapping[str, Tensor]


class CachedReward(WrappedReward):
    """Scores of another reward, remembered by the content of the clips: pixels, frame rate, windows and prompts.

    entries: clips that are remembered; those asked for least recently are forgotten. Only scores that are valid in
    every signal are. Clips that are new are scored together, so a reward that rounds differently in other batches does
    so here. hits, misses: clips that were known and that were scored.
    """

    def __init__(self, model: RewardModel, entries: int = 4096) -> None:
        if entries < 1:
            raise ValueError(f"CachedReward.entries must be at least 1, got {entries}")
        refuse_policy(model, "CachedReward")
        self.model, self.entries = model, entries
        self.hits = self.misses = 0
        self._known: OrderedDict[str, Known] = OrderedDict()
        self._lock = threading.Lock()

    def score(self, videos: VideoBatch) -> Scores:
        names = clip_names(videos, "")
        with self._lock:
            found = {name: self._known[name] for name in names if name in self._known}
            first = {name: row for row, name in reversed(list(enumerate(names))) if name not in found}
            rows = sorted(first.values())
            if rows:
                new = self.model.score(rows_of_videos(videos, rows))
                found |= {names[row]: known(new, i) for i, row in enumerate(rows)}
            self.hits += len(names) - len(rows)
            self.misses += len(rows)
            for name in names:
                self._remember(name, found[name])
        return assembled([found[name] for name in names], self.signals)

    def _remember(self, name: str, scores: Known) -> None:
        if any(bool(value.isnan()) for value in scores.values.values()):
            return
        self._known[name] = scores
        self._known.move_to_end(name)
        if len(self._known) > self.entries:
            self._known.popitem(last=False)


def rows_of_videos(videos: VideoBatch, rows: list[int]) -> VideoBatch:
    """Some clips of a batch."""
    return replace(videos, frames=videos.frames[rows], windows=tuple(videos.windows[row] for row in rows))


def known(scores: Scores, row: int) -> Known:
    """The scores of one clip; NaN where invalid, and without windows that only other clips of its batch have."""
    values = {n: v[row].where(scores.valid[n][row], torch.nan) for n, v in scores.values.items()}
    return Known(values, {name: trimmed(windows[row]) for name, windows in scores.windows.items()})


def trimmed(windows: Tensor) -> Tensor:
    """[W] without the NaN at its end."""
    scored = (~windows.isnan()).nonzero()
    return windows[: int(scored[-1]) + 1] if len(scored) else windows[:0]


def assembled(clips: list[Known], signals: tuple[str, ...]) -> Scores:
    """The scores of several clips; windows are filled up with NaN."""
    values = {name: torch.stack([clip.values[name] for clip in clips]) for name in signals}
    windows: dict[str, Tensor] = {}
    for name in {name for clip in clips for name in clip.windows}:
        rows = [clip.windows.get(name, values[name].new_empty(0)) for clip in clips]
        width = max(map(len, rows))
        windows[name] = torch.stack([torch.cat([r, r.new_full((width - len(r),), torch.nan)]) for r in rows])
    return replace(Scores.of(values), windows=windows)
