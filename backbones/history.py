"""The clean past of a stream: an immutable KV history addressed by frame id, and the policies that decide who sees it.

Keys are stored without rotation. A *policy* is a pure rule on integers: which committed frames a block sees, and at
which temporal positions. Rollout, packed replay and export ask the same policy object, so they cannot disagree.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

LayerKV = tuple[Tensor, Tensor]
"""(k, v) of one layer, each [N, F, S, heads, head_dim]; k is not rotated."""


class HistoryPolicy(ABC):
    """Which committed frames a block sees, and where all of them sit on the temporal axis."""

    @abstractmethod
    def visible(self, start: int, length: int) -> tuple[int, ...]:
        """Ids (ascending) of the committed frames that the block of frames [start, start + length) attends to."""

    @abstractmethod
    def positions(self, visible: Sequence[int], start: int, length: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Temporal positions of the visible frames and of the block's own frames."""

    @abstractmethod
    def retains(self, frame: int, start: int) -> bool:
        """Whether a committed frame can still be seen by a block that starts at or after ``start``."""


@dataclass(frozen=True)
class FullHistory(HistoryPolicy):
    """Every earlier frame is visible at its own position (Self-Forcing)."""

    def visible(self, start: int, length: int) -> tuple[int, ...]:
        return tuple(range(start))

    def positions(self, visible: Sequence[int], start: int, length: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return tuple(visible), tuple(range(start, start + length))

    def retains(self, frame: int, start: int) -> bool:
        return True


@dataclass(frozen=True)
class SinkWindow(HistoryPolicy):
    """The first ``sink`` frames and the most recent ones; ``window`` counts sink, recent and the current block.

    relative = False keeps absolute frame ids as positions (LongLive 1.0); relative = True numbers the visible frames
    and the block 0, 1, 2, …, which clamps the distance to the sink (Infinity-RoPE, LongLive "infinity").
    """

    sink: int = 3
    window: int = 12
    relative: bool = False

    def __post_init__(self) -> None:
        if self.sink < 0 or self.window <= self.sink:
            raise ValueError(
                f"SinkWindow.window counts the sink and the current block: it must exceed sink={self.sink}, "
                f"got window={self.window}"
            )

    def visible(self, start: int, length: int) -> tuple[int, ...]:
        if self.window - self.sink < length:
            raise ValueError(
                f"SinkWindow.window={self.window} leaves {self.window - self.sink} frames beside the sink, "
                f"too few for a block of {length}"
            )
        recent = max(self.sink, start + length - (self.window - self.sink))
        return (*range(min(self.sink, start)), *range(recent, start))

    def positions(self, visible: Sequence[int], start: int, length: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if not self.relative:
            return tuple(visible), tuple(range(start, start + length))
        seen = len(visible)
        return tuple(range(seen)), tuple(range(seen, seen + length))

    def retains(self, frame: int, start: int) -> bool:
        # a block of one frame is the shortest: it sees the most history
        return frame < self.sink or frame > start - (self.window - self.sink)


@dataclass(frozen=True)
class Chunk:
    """K/V of consecutive frames that were committed together. ``kv[layer]`` has its own batch size, see `fork`."""

    start: int
    kv: tuple[LayerKV, ...]

    @property
    def length(self) -> int:
        return self.kv[0][0].shape[1]

    @property
    def stop(self) -> int:
        return self.start + self.length


@dataclass(frozen=True)
class KVHistory:
    """Committed frames in order. Every operation returns a new history that shares the old tensors.

    A chunk that was committed before a fork keeps the batch of the trunk; `view` expands it on reading, so the shared
    prefix of a group is stored once. ``branches`` is how many current rows stand for one row of each chunk.
    """

    chunks: tuple[Chunk, ...] = ()
    branches: tuple[int, ...] = ()

    @property
    def next_frame(self) -> int:
        """Id of the frame that would be committed next."""
        return self.chunks[-1].stop if self.chunks else 0

    @property
    def frame_ids(self) -> tuple[int, ...]:
        """Ids of the frames that are still resident, ascending."""
        return tuple(i for chunk in self.chunks for i in range(chunk.start, chunk.stop))

    def commit(self, kv: Sequence[LayerKV], policy: HistoryPolicy | None = None) -> "KVHistory":
        """Append frames; with a policy, drop chunks that no later block can see (constant memory)."""
        chunk = Chunk(self.next_frame, tuple(kv))
        chunks, branches = (*self.chunks, chunk), (*self.branches, 1)
        if policy is not None:
            start = chunk.stop
            kept = [any(policy.retains(i, start) for i in range(c.start, c.stop)) for c in chunks[:-1]] + [True]
            branches = tuple(b for b, keep in zip(branches, kept, strict=True) if keep)
            chunks = tuple(c for c, keep in zip(chunks, kept, strict=True) if keep)
        return KVHistory(chunks, branches)

    def fork(self, branches: int) -> "KVHistory":
        """Each row becomes ``branches`` consecutive rows; no tensor is copied."""
        return KVHistory(self.chunks, tuple(b * branches for b in self.branches))

    def view(self, frames: Sequence[int]) -> "VisibleKV":
        """The K/V of these frames, in this order. Raises KeyError for a frame that was never committed or dropped."""
        place = {i: (c, i - chunk.start) for c, chunk in enumerate(self.chunks) for i in range(chunk.start, chunk.stop)}
        missing = [i for i in frames if i not in place]
        if missing:
            raise KeyError(f"frames {missing} are not in the history, resident are {list(self.frame_ids)}")
        runs: list[tuple[int, int, int]] = []  # (chunk, first offset, past-the-end offset)
        for i in frames:
            c, offset = place[i]
            if runs and runs[-1][0] == c and runs[-1][2] == offset:
                runs[-1] = (c, runs[-1][1], offset + 1)
            else:
                runs.append((c, offset, offset + 1))
        return VisibleKV(self, tuple(frames), tuple(runs))


@dataclass
class VisibleKV:
    """What one block sees of the past. Reading a layer gathers it once; rotated keys are kept for the block's steps."""

    history: KVHistory
    frames: tuple[int, ...]
    runs: tuple[tuple[int, int, int], ...]
    memo: dict = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.frames)

    def read(self, layer: int) -> LayerKV:
        """(k, v) of a layer: [N, frames, S, heads, head_dim], k un-rotated."""
        parts = ([], [])
        for c, first, last in self.runs:
            branches = self.history.branches[c]
            for out, tensor in zip(parts, self._chunk(c, layer), strict=True):
                piece = tensor[:, first:last]
                if branches > 1:
                    piece = piece.unsqueeze(1).expand(-1, branches, *piece.shape[1:]).flatten(0, 1)
                out.append(piece)
        k, v = (part[0] if len(part) == 1 else torch.cat(part, dim=1) for part in parts)
        return k, v

    def rotated(self, layer: int, positions: tuple[int, ...], rotate: Callable[[Tensor], Tensor]) -> LayerKV:
        """(k rotated at ``positions``, v); memoised, since all denoising steps of a block read the same.

        Keys that carry a graph are not memoised while gradients are on: a memo would tie two backward passes
        together, and one that was made under ``no_grad`` would cut the graph.
        """
        if torch.is_grad_enabled() and any(t.requires_grad for c, *_ in self.runs for t in self._chunk(c, layer)):
            k, v = self.read(layer)
            return rotate(k), v
        key = (layer, positions)
        if key not in self.memo:
            k, v = self.read(layer)
            self.memo[key] = (rotate(k), v)
        return self.memo[key]

    def _chunk(self, c: int, layer: int) -> LayerKV:
        return self.history.chunks[c].kv[layer]
