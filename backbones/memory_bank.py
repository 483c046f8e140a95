"""MemFlow's memory bank: single frames of the past that every layer keeps by how much the prompt asks for them.

    score(frame) = mean over text tokens, heads and frame tokens of  K_text · K_frame / √head_dim

The candidate is the first frame of a block, after its clean pass; the bank takes it before the next block starts. What
is kept depends on the scores, so it differs between layers and clips, and it is made again wherever clean blocks are
committed: in a rollout, and under the policy in force in a replay.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from backbones.history import HistoryPolicy, Memory, SinkWindow
from backbones.visible import LayerKV, spread
from framework.arguments import check_counts


@dataclass(frozen=True)
class MemoryBank(HistoryPolicy):
    """The sink, the bank and the most recent frames, all at absolute positions; a frame may be seen twice (MemFlow).

    sink, window: as of `SinkWindow`. size: frames of the bank. interval: after so many blocks a slot is left as it is
    and the next one is filled; once all are, every block drops the frame of the lowest score. interactive: candidates
    are taken of every interval-th block only, as the released pipeline for several prompts does; the last of them is
    put again at every block, so that a full bank may hold a frame twice.
    """

    sink: int = 3
    window: int = 12
    size: int = 3
    interval: int = 3
    interactive: bool = False

    def __post_init__(self) -> None:
        if self.sink < 0 or self.window <= self.sink:
            raise ValueError(
                f"MemoryBank.window counts the sink and the current block: it must exceed sink={self.sink}, "
                f"got window={self.window}"
            )
        check_counts("MemoryBank.", size=self.size, interval=self.interval)

    @property
    def beside(self) -> SinkWindow:
        """The policy without its bank."""
        return SinkWindow(self.sink, self.window)

    def visible(self, start: int, length: int) -> tuple[int, ...]:
        return self.beside.visible(start, length)

    def positions(self, visible: Sequence[int], start: int, length: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.beside.positions(visible, start, length)

    def retains(self, frame: int, start: int) -> bool:
        return self.beside.retains(frame, start)

    @property
    def remembered(self) -> int:
        return self.size

    def memory(self) -> "Bank":
        return Bank(self)


@dataclass(frozen=True)
class Slot:
    """A remembered frame, another one per layer and row. kv: per layer (rotated k, v) [R, 1, S, heads, head_dim].
    frames: its id [layers, R]."""

    kv: tuple[LayerKV, ...]
    frames: Tensor

    @property
    def rows(self) -> int:
        """R."""
        return self.frames.shape[1]


@dataclass(frozen=True)
class Bank(Memory):
    """The bank of a stream between two blocks.

    slots: as the last block saw them. candidate: what comes next, into slot ``pointer`` − 1 or, behind the last one, in
    place of what scores lowest. blocks: committed so far. unread: rows [R] whose text no block has read yet.
    """

    rule: MemoryBank
    slots: tuple[Slot, ...] = ()
    candidate: Slot | None = None
    pointer: int = 0
    blocks: int = 0
    unread: Tensor | None = None

    @property
    def kv(self) -> tuple[LayerKV, ...]:
        rows = max((slot.rows for slot in self.slots), default=1)
        pairs = [zip(*(slot.kv[layer] for slot in self.slots), strict=True) for layer in range(self._layers)]
        return tuple((_side_by_side(keys, rows), _side_by_side(values, rows)) for keys, values in pairs)

    @property
    def frames(self) -> Tensor:
        rows = max((slot.rows for slot in self.slots), default=1)
        ids = [spread(slot.frames.T, rows).T for slot in self.slots]
        return torch.stack(ids, dim=2) if ids else torch.empty(0, rows, 0, dtype=torch.long)

    def as_stored(self) -> "Bank":
        if self.candidate is None or self.pointer > self.rule.size:
            return self
        return replace(self, slots=(*self.slots[: self.pointer - 1], self.candidate))

    def recall(self, text: Sequence[Tensor]) -> "Bank":
        if self.candidate is None or self.pointer <= self.rule.size:
            return self.as_stored()
        rows = max(*(slot.rows for slot in self.slots), 0 if self.unread is None else len(self.unread))
        kept: list[tuple[LayerKV, Tensor]] = []
        for layer, text_k in enumerate(text):
            k, v = (_side_by_side([slot.kv[layer][which] for slot in self.slots], rows) for which in range(2))
            ids = torch.stack([spread(slot.frames[layer], rows) for slot in self.slots], dim=1)
            scores = frame_scores(text_k, k)
            if self.unread is not None:  # as released: no block has filled the text keys yet, so all scores are equal
                scores = scores.masked_fill(spread(self.unread, rows)[:, None], 0.0)
            best = scores.argsort(dim=1, descending=True, stable=True)[:, : self.rule.size - 1]
            row = torch.arange(rows, device=k.device)[:, None]
            kept.append(((k[row, best], v[row, best]), ids[row, best]))
        slots = [
            Slot(
                tuple((k[:, i : i + 1], v[:, i : i + 1]) for (k, v), _ in kept),
                torch.stack([ids[:, i] for _, ids in kept]),
            )
            for i in range(self.rule.size - 1)
        ]
        return replace(self, slots=(*slots, self.candidate))

    def record(self, kv: Sequence[LayerKV], start: int, rotate: Callable[[Tensor, int], Tensor]) -> "Bank":
        after = replace(self, blocks=self.blocks + 1, unread=None)
        if self.rule.interactive and self.blocks % self.rule.interval:
            return after
        first = tuple((rotate(k[:, :1], start), v[:, :1].clone()) for k, v in kv)  # no view: it would keep the block
        ids = torch.full((len(kv), len(kv[0][0])), start, device=kv[0][0].device)
        return replace(after, candidate=Slot(first, ids), pointer=self.blocks // self.rule.interval + 1)

    def switched(self, rows: Sequence[int] | None, batch: int) -> "Bank":
        unread = torch.zeros(batch, dtype=torch.bool)
        unread[list(range(batch) if rows is None else rows)] = True
        if self.unread is not None:
            unread |= spread(self.unread, batch).cpu()
        return replace(self, unread=unread if self.candidate is None else unread.to(self.candidate.frames.device))

    @property
    def _layers(self) -> int:
        return len(self.slots[0].kv) if self.slots else 0


@torch.no_grad()
def frame_scores(text_k: Tensor, frame_k: Tensor) -> Tensor:
    """How much a prompt asks for frames [R, n]: K_text · K_frame / √d, averaged over both kinds of tokens and heads.

    text_k: [P, L, heads, d], P dividing R. frame_k: rotated, [R, n, S, heads, d]. In float32 or wider. The product of
    the means is the mean of the products.
    """
    wide = torch.promote_types(frame_k.dtype, torch.float32)
    asked = spread(text_k.to(wide).mean(1), len(frame_k))
    return (frame_k.to(wide).mean(2) * asked[:, None]).sum(-1).mean(-1) / frame_k.shape[-1] ** 0.5


def _side_by_side(parts: Sequence[Tensor], rows: int) -> Tensor:
    return torch.cat([spread(part, rows) for part in parts], dim=1)
