"""The clean past of a stream: an immutable KV history addressed by frame id, and the policies that decide who sees it.

Keys are stored without rotation. A *policy* is a pure rule on integers: which committed frames a block sees, and at
which temporal positions. Rollout, packed replay and export ask the same policy object, so they cannot disagree. What a
policy chooses by content, per layer and clip, is a `Memory` that the stream carries beside its frames.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backbones.visible import Chunk, LayerKV, VisibleKV, as_pieces, as_runs


class Memory(ABC):
    """What a stream remembers beyond its frames, chosen by content: an immutable value, renewed by commits only.

    A block is shown `kv` of what `recall` gives, all its denoising steps and its clean pass the same; then `record`
    makes the memory of the next block. Branches of a fork share it: its tensors have R rows, R dividing the batch.
    """

    @property
    @abstractmethod
    def kv(self) -> tuple[LayerKV, ...]:
        """What is shown, per layer (k, v) [R, frames, S, heads, head_dim]; k is rotated. Empty for nothing."""

    @property
    @abstractmethod
    def frames(self) -> Tensor:
        """Ids of the frames shown [layers, R, frames]."""

    @abstractmethod
    def recall(self, text: Sequence[Tensor]) -> "Memory":
        """As the next block sees it. text: keys of the prompts per layer [P, L, heads, head_dim], P dividing R."""

    @abstractmethod
    def record(self, kv: Sequence[LayerKV], start: int, rotate: Callable[[Tensor, int], Tensor]) -> "Memory":
        """After the clean pass of a block at ``start``; rotate(k [N, 1, S, heads, d], frame) → k at that position."""

    @abstractmethod
    def switched(self, rows: Sequence[int] | None, batch: int) -> "Memory":
        """After the prompts of some rows of the batch, None for all, have changed."""

    @abstractmethod
    def as_stored(self) -> "Memory":
        """What a pass between two blocks sees, such as a recache: whatever takes no choice by content."""


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

    @property
    def remembered(self) -> int:
        """How many frames of a memory a block sees at most, beside the visible ones."""
        return 0

    @property
    def recomputes(self) -> bool:
        """Whether a stream keeps its past as clean latents, encoded anew for every block; see `recompute`."""
        return False

    def logit_offsets(self, visible: int) -> tuple[float, ...] | None:
        """What is added to a block's attention logits for each of ``visible`` frames that it sees; None for nothing.

        Asked of policies that recompute: cached keys serve several blocks at once in a packed replay.
        """
        return None

    def memory(self) -> Memory | None:
        """The memory of a stream that has seen nothing; None for a policy that is a rule on integers alone."""
        return None


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
    and the block 0, 1, 2, …, which clamps the distance to the sink (Infinity-RoPE, LongLive "infinity"). sink_start:
    the sink's first frame, moved only by a prompt switch (`recache.MovedSinkRecache`).
    """

    sink: int = 3
    window: int = 12
    relative: bool = False
    sink_start: int = 0

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
        sink_stop = self.sink_start + self.sink
        recent = max(sink_stop, start + length - (self.window - self.sink))
        return (*range(self.sink_start, min(sink_stop, start)), *range(recent, start))

    def positions(self, visible: Sequence[int], start: int, length: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if not self.relative:
            return tuple(visible), tuple(range(start, start + length))
        seen = len(visible)
        return tuple(range(seen)), tuple(range(seen, seen + length))

    def retains(self, frame: int, start: int) -> bool:
        # a block of one frame is the shortest: it sees the most history
        in_sink = self.sink_start <= frame < self.sink_start + self.sink
        return in_sink or frame > start - (self.window - self.sink)


@dataclass(frozen=True)
class AnchorWindow(HistoryPolicy):
    """The first ``anchor`` frames, moved along so that they stay near, and the most recent ones (Rolling Forcing).

    window: anchor, recent and the current block together. offset: how many positions before the block the anchor
    starts, once it would lie farther back; everything else stays at its frame id. With offset = window − block the
    anchor stands right before the recent frames, which is what `SinkWindow` does with relative = True.
    """

    anchor: int = 3
    window: int = 21
    offset: int = 21

    def __post_init__(self) -> None:
        if self.anchor < 0 or self.window <= self.anchor:
            raise ValueError(
                f"AnchorWindow.window counts the anchor and the current block: it must exceed anchor={self.anchor}, "
                f"got window={self.window}"
            )

    def visible(self, start: int, length: int) -> tuple[int, ...]:
        return SinkWindow(self.anchor, self.window).visible(start, length)

    def positions(self, visible: Sequence[int], start: int, length: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if self.offset < self.window - length:
            raise ValueError(
                f"AnchorWindow.offset={self.offset} puts the anchor among the recent frames of a block of {length}: it "
                f"must be at least window − block = {self.window - length}"
            )
        moved = max(0, start - self.offset)
        return tuple(i + moved if i < self.anchor else i for i in visible), tuple(range(start, start + length))

    def retains(self, frame: int, start: int) -> bool:
        return SinkWindow(self.anchor, self.window).retains(frame, start)


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

    @property
    def nbytes(self) -> int:
        """Bytes of the distinct storages that keep the frames alive, all rows and layers together."""
        storages = [t.untyped_storage() for chunk in self.chunks for pair in chunk.kv for t in pair]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def commit(self, kv: Sequence[LayerKV], policy: HistoryPolicy | None = None, resident: int = 0) -> "KVHistory":
        """Append frames; with a policy, drop chunks that no later block can see (constant memory).

        resident: keep the last so many frames all the same, for blocks that are routed to older ones.
        """
        chunk = Chunk(self.next_frame, tuple(kv))
        chunks, branches = (*self.chunks, chunk), (*self.branches, 1)
        if policy is not None:
            start = chunk.stop
            kept = [
                c.stop > start - resident or any(policy.retains(i, start) for i in range(c.start, c.stop))
                for c in chunks[:-1]
            ] + [True]
            branches = tuple(b for b, keep in zip(branches, kept, strict=True) if keep)
            chunks = tuple(c for c, keep in zip(chunks, kept, strict=True) if keep)
        return KVHistory(chunks, branches)

    def rewrite(self, start: int, kv: Sequence[LayerKV], rows: Sequence[int] | None = None) -> "KVHistory":
        """Frames from ``start`` on with other K/V, for all rows or some; frames that are not resident are added.

        kv: per layer [rows, F, S, heads, head_dim]. Raises KeyError for a frame that would be added for some rows only.
        """
        stop = start + kv[0][0].shape[1]
        placed: list[tuple[Chunk, int]] = []
        for chunk, branches in zip(self.chunks, self.branches, strict=True):
            low, high = max(chunk.start, start), min(chunk.stop, stop)
            if low >= high:
                placed.append((chunk, branches))
                continue
            new = tuple((k[:, low - start : high - start], v[:, low - start : high - start]) for k, v in kv)
            placed.append((overwritten(chunk, branches, low - chunk.start, new, rows), 1))
        resident = set(self.frame_ids)
        missing = [frame for frame in range(start, stop) if frame not in resident]
        if missing and rows is not None:
            raise KeyError(f"frames {missing} are not in the history, so they cannot be rewritten for some rows only")
        for run in runs_of(missing):
            part = slice(run.start - start, run.stop - start)
            placed.append((Chunk(run.start, tuple((k[:, part].clone(), v[:, part].clone()) for k, v in kv)), 1))
        placed.sort(key=lambda item: item[0].start)
        return KVHistory(tuple(chunk for chunk, _ in placed), tuple(branches for _, branches in placed))

    def fork(self, branches: int) -> "KVHistory":
        """Each row becomes ``branches`` consecutive rows; no tensor is copied."""
        return KVHistory(self.chunks, tuple(b * branches for b in self.branches))

    def view(self, frames: Sequence[int]) -> VisibleKV:
        """The K/V of these frames, in this order. Raises KeyError for a frame that was never committed or dropped."""
        return VisibleKV(self.chunks, self.branches, tuple(frames), tuple(as_runs(self.chunks, frames)))

    def route(self, frames: Sequence[Sequence[int]], rows: Sequence[int], total: int) -> VisibleKV:
        """The K/V of a list of frames per row, all of one length, for some rows of a batch of ``total``.

        Raises KeyError as `view` does, ValueError for lists of different lengths.
        """
        if len(set(map(len, frames))) != 1:
            raise ValueError("the rows of one routed view must see equally many frames")
        pieces = as_pieces(self.chunks, self.branches, frames)
        chosen = None if tuple(rows) == tuple(range(total)) else tuple(rows)
        seen = tuple(map(tuple, frames))
        return VisibleKV(self.chunks, self.branches, seen, tuple(pieces), rows=chosen, total=total)


def kv_frame_bytes(layers: int, tokens: int, width: int, itemsize: int) -> int:
    """Bytes of the keys and values of one latent frame of one clip: 2 · layers · S · width · itemsize."""
    return 2 * layers * tokens * width * itemsize


def overwritten(chunk: Chunk, branches: int, offset: int, kv: Sequence[LayerKV], rows: Sequence[int] | None) -> Chunk:
    """A chunk of the current batch, with other K/V from ``offset`` on for all rows or some; nothing is shared."""
    layers = []
    for old, new in zip(chunk.kv, kv, strict=True):
        pair = []
        for kept, put in zip(old, new, strict=True):
            if rows is None and put.shape[1] == kept.shape[1]:
                pair.append(put.clone())
                continue
            whole = kept.repeat_interleave(branches, 0)
            which = slice(None) if rows is None else torch.tensor(rows, device=whole.device)
            whole[which, offset : offset + put.shape[1]] = put
            pair.append(whole)
        layers.append(tuple(pair))
    return Chunk(chunk.start, tuple(layers))


def runs_of(frames: Sequence[int]) -> list[range]:
    """Ascending ids as runs of neighbours."""
    runs: list[range] = []
    for frame in frames:
        if runs and runs[-1].stop == frame:
            runs[-1] = range(runs[-1].start, frame + 1)
        else:
            runs.append(range(frame, frame + 1))
    return runs
