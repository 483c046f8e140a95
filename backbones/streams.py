"""The state of a stream, and the parts of a batch whose rows see equally much of the past."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from backbones.history import HistoryPolicy, KVHistory, Memory
from backbones.plans import AttentionPlan
from backbones.recache import CleanPast
from backbones.visible import LayerKV, VisibleKV, spread
from backbones.wan.transformer import TextKV


@dataclass(frozen=True)
class WanStream:
    """The state of N clips: their committed K/V, their text K/V, and what the next block sees.

    policy: which history a block sees; a recache may move it. resident: how many recent frames stay in the history
    beyond what the policy shows, for routed blocks. clean: the latents that a recache may read, None for a stream whose
    prompts never switch. memory: what the policy has chosen by content, None for a policy that does not.
    """

    history: KVHistory
    text: TextKV
    batch: int
    policy: HistoryPolicy
    resident: int = 0
    clean: CleanPast | None = None
    memory: Memory | None = None
    memo: dict = field(default_factory=dict, repr=False, compare=False)
    """What the next block sees, by route: all its denoising steps read the same rotated keys."""

    @property
    def next_frame(self) -> int:
        return self.history.next_frame

    def recalled(self) -> Memory | None:
        """The memory as the next block sees it, the same for all its calls."""
        if self.memory is None:
            return None
        key = ("memory", torch.is_grad_enabled())  # what was chosen under no_grad has lost its graph
        if key not in self.memo:
            self.memo[key] = self.memory.recall([k for k, _ in self.text.layers])
        return self.memo[key]


@dataclass(frozen=True)
class Visit:
    """Rows of a batch that see equally many frames, and what they see. rows: None for the whole batch."""

    rows: Tensor | None
    plan: AttentionPlan
    past: VisibleKV
    text: TextKV

    def of(self, x: Tensor) -> Tensor:
        """These rows of a batch."""
        return x if self.rows is None else x[self.rows]


def in_row_order(visits: Sequence[Visit], parts: Sequence[Tensor]) -> Tensor:
    """What was computed for each part of a batch, as one batch."""
    if len(parts) == 1:
        return parts[0]
    joined = torch.cat(list(parts))
    return torch.empty_like(joined).index_copy_(0, torch.cat([v.rows for v in visits if v.rows is not None]), joined)


def rows_of_memory(memory: tuple[LayerKV, ...], rows: Sequence[int] | None, batch: int) -> tuple[LayerKV, ...]:
    """What a memory shows to some rows of a batch, None for all."""
    if rows is None:
        return memory
    return tuple((spread(k, batch)[list(rows)], spread(v, batch)[list(rows)]) for k, v in memory)


def replaced_text(text: TextKV, prompts: Sequence[int], new: TextKV) -> TextKV:
    """A text whose entries ``prompts`` are those of ``new``, in order."""

    def put(old: Tensor, entries: Tensor) -> Tensor:
        return old.index_copy(0, torch.tensor(prompts, device=old.device), entries)

    pairs = zip(text.layers, new.layers, strict=True)
    return TextKV(tuple((put(old[0], entry[0]), put(old[1], entry[1])) for old, entry in pairs))


def rows_of_text(text: TextKV, rows: Sequence[int], batch: int) -> TextKV:
    """The text of some rows of a batch; shared per prompt where every prompt keeps equally many of its rows."""
    each = batch // text.prompts
    owners = [row // each for row in rows]
    counts = {owners.count(prompt) for prompt in range(text.prompts)}
    if len(counts) == 1 and owners == sorted(owners):
        return text
    return TextKV(tuple((k[owners], v[owners]) for k, v in text.layers))
