"""What a block reads of the stored past: frames by id, looked up in chunks and gathered once per layer.

Rows of a batch may see different frames. Where all see the same one it is read once; elsewhere each row picks its own
from the stored chunks, so that no chunk is copied per branch.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

LayerKV = tuple[Tensor, Tensor]
"""(k, v) of one layer, each [N, F, S, heads, head_dim]; k is not rotated."""

Positions = tuple[int, ...] | tuple[tuple[int, ...], ...]
"""Temporal positions of frames, one list for all rows or one per row."""


@dataclass(frozen=True)
class Chunk:
    """K/V of consecutive frames that were committed together. ``kv[layer]`` has its own batch size, that of the time
    when it was committed; later forks expand it on reading."""

    start: int
    kv: tuple[LayerKV, ...]

    @property
    def length(self) -> int:
        return self.kv[0][0].shape[1]

    @property
    def stop(self) -> int:
        return self.start + self.length


Chunks = tuple[Chunk, ...]


@dataclass(frozen=True)
class Run:
    """Consecutive frames of one chunk, the same for all rows."""

    chunk: int
    first: int
    last: int  # past the end


@dataclass(frozen=True)
class Pick:
    """Frames from chunks of one batch size, put side by side: ``found`` holds (row, column, frame) as [3, count]."""

    chunks: tuple[int, ...]
    found: Tensor


@dataclass(frozen=True)
class Gather:
    """Frames that differ from row to row, ``columns`` of them."""

    rows: int
    columns: int
    picks: tuple[Pick, ...]


def locate(chunks: Chunks, frames: Iterable[int]) -> list[tuple[int, int]]:
    """(chunk, offset) of each frame. Raises KeyError for one that was never committed or dropped."""
    frames = list(frames)
    place = {i: (c, i - chunk.start) for c, chunk in enumerate(chunks) for i in range(chunk.start, chunk.stop)}
    missing = sorted({i for i in frames if i not in place})
    if missing:
        raise KeyError(f"frames {missing} are not in the history, resident are {list(place)}")
    return [place[i] for i in frames]


def as_runs(chunks: Chunks, frames: Iterable[int]) -> list[Run]:
    """Frames that all rows see, in this order, as few pieces. Raises KeyError as `locate` does."""
    runs: list[Run] = []
    for c, offset in locate(chunks, frames):
        if runs and runs[-1].chunk == c and runs[-1].last == offset:
            runs[-1] = Run(c, runs[-1].first, offset + 1)
        else:
            runs.append(Run(c, offset, offset + 1))
    return runs


def as_gather(chunks: Chunks, branches: Sequence[int], frames: Sequence[Sequence[int]]) -> Gather:
    """Rows that see different frames: which chunks hold them, and where each row finds its own there."""
    places = [locate(chunks, row) for row in frames]
    used = sorted({c for row in places for c, _ in row})
    picks = []
    for count in sorted({branches[c] for c in used}):  # chunks from before a fork and after it
        together = tuple(c for c in used if branches[c] == count)
        before = dict(zip(together, accumulate((chunks[c].length for c in together), initial=0), strict=False))
        found = [
            (row, column, before[c] + offset)
            for row, line in enumerate(places)
            for column, (c, offset) in enumerate(line)
            if c in before
        ]
        picks.append(Pick(together, torch.tensor(found).T))
    return Gather(len(frames), len(places[0]), tuple(picks))


def as_pieces(chunks: Chunks, branches: Sequence[int], frames: Sequence[Sequence[int]]) -> list[Run | Gather]:
    """Equally many frames per row, as runs where all rows name the same ones and gathers elsewhere."""
    columns = list(zip(*frames, strict=True))
    pieces: list[Run | Gather] = []
    first = 0
    while first < len(columns):
        last = first + 1
        common = len(set(columns[first])) == 1
        while last < len(columns) and (len(set(columns[last])) == 1) == common:
            last += 1
        part = columns[first:last]
        if common:
            pieces += as_runs(chunks, [column[0] for column in part])
        else:
            pieces.append(as_gather(chunks, branches, list(zip(*part, strict=True))))
        first = last
    return pieces


def spread(x: Tensor, rows: int) -> Tensor:
    """x [R, …] as so many rows, each standing for rows / R consecutive ones."""
    return x if len(x) == rows else x.repeat_interleave(rows // len(x), 0)


@dataclass
class VisibleKV:
    """What one block sees of the past. Reading a layer gathers it once; rotated keys are kept for the block's steps.

    chunks, branches: what is stored, see `KVHistory`. frames: the ids seen, one list for all rows or one per row.
    rows: which of the ``total`` rows of the batch this is for, None for all. positions: temporal positions per row,
    where rows differ in them. memory: per layer, (rotated k, v) of further frames, [R, m, S, heads, head_dim] with R
    dividing the ``batch`` rows that ask; every query sees all of them. budget: bytes of rotated keys and their values
    to keep, None for all layers; layers beyond it are rotated at every step, to the same values. offsets: what is added
    to the attention logits of each frame, None for nothing; not with a memory.
    """

    chunks: Chunks
    branches: tuple[int, ...]
    frames: tuple[int, ...] | tuple[tuple[int, ...], ...]
    pieces: tuple[Run | Gather, ...]
    rows: tuple[int, ...] | None = None
    total: int = 0
    positions: tuple[tuple[int, ...], ...] | None = None
    memory: tuple[LayerKV, ...] = ()
    batch: int = 0
    budget: int | None = None
    offsets: tuple[float, ...] | None = None
    memo: dict = field(default_factory=dict)

    def __len__(self) -> int:
        """Frames seen by a row."""
        first = self.frames[0] if self.frames else ()
        return len(first) if isinstance(first, tuple) and self.frames else len(self.frames)

    def read(self, layer: int) -> LayerKV:
        """(k, v) of a layer: [N, frames, S, heads, head_dim], k un-rotated."""
        k, v = (
            torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
            for parts in ([self._read(piece, layer, which) for piece in self.pieces] for which in range(2))
        )
        return k, v

    def rotated(self, layer: int, positions: Positions, rotate: Callable[[Tensor], Tensor]) -> LayerKV:
        """(k rotated at ``positions``, v) and then the memory; memoised within the budget, since all denoising steps of
        a block read the same.

        Keys that carry a graph are not memoised while gradients are on: a memo would tie two backward passes
        together, and one that was made under ``no_grad`` would cut the graph.
        """
        if torch.is_grad_enabled() and any(t.requires_grad for t in self._sources(layer)):
            return self._rotated(layer, rotate)
        key = (layer, positions)
        if key in self.memo:
            return self.memo[key]
        made = self._rotated(layer, rotate)
        kept = sum(t.nbytes for pair in self.memo.values() if isinstance(pair, tuple) for t in pair)
        if self.budget is None or kept + sum(t.nbytes for t in made) <= self.budget:
            self.memo[key] = made
        return made

    def before_fork(self) -> tuple["VisibleKV", int]:
        """(the view of the trunk, its branches) where all rows see what was there before a fork, else (itself, 1)."""
        counts = {self.branches[chunk] for chunk in self._used()}
        if self.rows is not None or len(counts) != 1 or any(isinstance(piece, Gather) for piece in self.pieces):
            return self, 1
        return replace(self, branches=(1,) * len(self.branches), memo={}), counts.pop()

    def remembered(self, layer: int) -> LayerKV | None:
        """(rotated k, v) of the memory, None without one."""
        if not self.memory:
            return None
        k, v = self.memory[layer]
        return spread(k, self.batch), spread(v, self.batch)

    def _rotated(self, layer: int, rotate: Callable[[Tensor], Tensor]) -> LayerKV:
        parts: list[LayerKV] = []
        if self.pieces:
            k, v = self.read(layer)
            parts.append((rotate(k), v))
        memory = self.remembered(layer)
        parts += [] if memory is None else [memory]
        if len(parts) == 1:
            return parts[0]
        (k, v), (more_k, more_v) = parts
        return torch.cat([k, more_k], dim=1), torch.cat([v, more_v], dim=1)

    def _sources(self, layer: int) -> list[Tensor]:
        """The tensors that a layer is read from."""
        stored = [t for c in self._used() for t in self.chunks[c].kv[layer]]
        return [*stored, *self.memory[layer]] if self.memory else stored

    def _read(self, piece: Run | Gather, layer: int, which: int) -> Tensor:
        return self._read_run(piece, layer, which) if isinstance(piece, Run) else self._read_gather(piece, layer, which)

    def _read_run(self, run: Run, layer: int, which: int) -> Tensor:
        branches = self.branches[run.chunk]
        piece = self.chunks[run.chunk].kv[layer][which][:, run.first : run.last]
        if self.rows is not None:
            return piece[self._index("rows", lambda: torch.tensor(self.rows) // branches, branches, piece.device)]
        return piece.unsqueeze(1).expand(-1, branches, *piece.shape[1:]).flatten(0, 1) if branches > 1 else piece

    def _read_gather(self, gather: Gather, layer: int, which: int) -> Tensor:
        out: Tensor | None = None
        for pick in gather.picks:
            stored = torch.cat([self.chunks[c].kv[layer][which] for c in pick.chunks], dim=1)
            branches = self.branches[pick.chunks[0]]
            row, column, frame = self._index("found", lambda pick=pick: pick.found, id(pick), stored.device)
            owner = self._index("owner", lambda pick=pick, b=branches: self._owners(pick, b), id(pick), stored.device)
            if out is None:
                out = stored.new_empty(gather.rows, gather.columns, *stored.shape[2:])
            out = out.index_put((row, column), stored[owner, frame])
        assert out is not None, "a gather without a pick"
        return out

    def _owners(self, pick: Pick, branches: int) -> Tensor:
        """Which stored row each picked frame comes from."""
        rows = torch.arange(self.total) if self.rows is None else torch.tensor(self.rows)
        return rows[pick.found[0]] // branches

    def _index(self, name: str, make: Callable[[], Tensor], key: int, device: torch.device) -> Tensor:
        """An index tensor on the device, moved there once for all layers and steps."""
        if (name, key) not in self.memo:
            self.memo[name, key] = make().to(device, non_blocking=True)
        return self.memo[name, key]

    def _used(self) -> set[int]:
        """Chunks that are read."""
        runs = {piece.chunk for piece in self.pieces if isinstance(piece, Run)}
        picks = [pick for piece in self.pieces if isinstance(piece, Gather) for pick in piece.picks]
        return runs.union(*(pick.chunks for pick in picks))
