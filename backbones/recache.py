"""What a stream does with its stored past when the prompt changes: keys and values were made under the old one.

A *recache* is a pure rule on integers, as a history policy is: which clean passes run under the new prompt, what they
see, and which stored frames they replace. LongLive (2509.22622, sec. 3.1) calls it KV-recache.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from backbones.history import FullHistory, HistoryPolicy, SinkWindow
from backbones.memory_bank import MemoryBank
from backbones.plans import AttentionPlan, Segment, block_plan


@dataclass(frozen=True)
class CleanPass:
    """One pass over the clean latents of some frames, at σ = 0 and under the new prompt.

    frames: ids that go through the network, ascending. past: ids of stored frames that they see as these are by then.
    plan: who sees whom in [past | frames]. stored: those of the frames whose keys and values replace the stored ones; a
    frame that no later block is shown is not among them.
    """

    frames: tuple[int, ...]
    past: tuple[int, ...]
    plan: AttentionPlan
    stored: tuple[int, ...]


class Recache(ABC):
    """How the stored past is brought under a new prompt."""

    @abstractmethod
    def passes(self, policy: HistoryPolicy, start: int, block: int) -> tuple[CleanPass, ...]:
        """What runs, in order, before the block of ``block`` frames at frame ``start`` > 0."""

    @abstractmethod
    def reads(self, policy: HistoryPolicy, frame: int, start: int) -> bool:
        """Whether the latent of a committed frame may go through a pass of a switch at or after ``start``."""

    def moved(self, policy: HistoryPolicy, start: int) -> HistoryPolicy:
        """The policy from the switch on."""
        return policy


@dataclass(frozen=True)
class NoRecache(Recache):
    """Only the text changes; the past stays encoded under the old prompt, and so pulls towards it."""

    def passes(self, policy: HistoryPolicy, start: int, block: int) -> tuple[CleanPass, ...]:
        return ()

    def reads(self, policy: HistoryPolicy, frame: int, start: int) -> bool:
        return False


@dataclass(frozen=True)
class BlockwiseRecache(Recache):
    """The frames that the next block sees, sink included, are committed again, block by block under the new prompt.

    Each sees those before it that its own history policy shows it. While nothing has left the window this is the
    stream that would have been opened with the new prompt and given the same frames.
    """

    def passes(self, policy: HistoryPolicy, start: int, block: int) -> tuple[CleanPass, ...]:
        shown = policy.visible(start, block)
        passes: list[CleanPass] = []
        for number, frames in groupby(shown, lambda frame: frame // block):
            piece, first = tuple(frames), number * block  # not always whole: its middle may have left the window
            past = tuple(frame for frame in policy.visible(first, block) if frame in shown)
            at, _ = policy.positions((*past, *piece), first, block)
            plan = block_plan(at[: len(past)], at[len(past) :])
            passes.append(CleanPass(piece, past, plan, piece))
        return tuple(passes)

    def reads(self, policy: HistoryPolicy, frame: int, start: int) -> bool:
        return policy.retains(frame, start)


@dataclass(frozen=True)
class JointRecache(Recache):
    """The last R = min(window, frames so far) frames go through one pass, together and seeing each other both ways.

    LongLive as released. Once frames have left the window the sink keeps what it is, under the old prompt, and the pass
    sees [sink | its own last window − sink frames]. A memory bank is seen by the pass and stays under the old prompt.
    """

    def passes(self, policy: HistoryPolicy, start: int, block: int) -> tuple[CleanPass, ...]:
        sink, window = extent(policy, "JointRecache")
        if window is None or start <= window:
            return (whole(policy, policy, range(start)),)
        frames, own = range(start - window, start), range(start - (window - len(sink)), start)
        seen, at = policy.positions(tuple(sink), own.start, len(own))
        queries = policy.positions((), frames.start, len(frames))[1]
        keys = (*range(len(sink)), *(len(sink) + frame - frames.start for frame in own))
        segment = Segment(tuple(range(len(frames))), keys, queries, (*seen, *at))
        stored = tuple(frame for frame in own if policy.retains(frame, start))
        return (CleanPass(tuple(frames), tuple(sink), AttentionPlan(len(sink), len(frames), (segment,)), stored),)

    def reads(self, policy: HistoryPolicy, frame: int, start: int) -> bool:
        return in_window(policy, frame, start, "JointRecache")


@dataclass(frozen=True)
class MovedSinkRecache(Recache):
    """`JointRecache` whose pass sees its own R frames only, the first of which become the new sink (LongLive's option).

    For streams whose clips all switch at once, for histories that are not routed, and for policies without a memory.
    """

    def passes(self, policy: HistoryPolicy, start: int, block: int) -> tuple[CleanPass, ...]:
        _, window = extent(policy, "MovedSinkRecache")
        frames = range(0 if window is None else max(0, start - window), start)
        return (whole(policy, self.moved(policy, start), frames),)

    def reads(self, policy: HistoryPolicy, frame: int, start: int) -> bool:
        return in_window(policy, frame, start, "MovedSinkRecache")

    def moved(self, policy: HistoryPolicy, start: int) -> HistoryPolicy:
        if not isinstance(policy, SinkWindow):
            return policy
        return replace(policy, sink_start=max(0, start - policy.window))


def whole(policy: HistoryPolicy, after: HistoryPolicy, frames: range) -> CleanPass:
    """Frames that all see each other and nothing else; those that the policy from then on may show are stored."""
    stored = tuple(frame for frame in frames if after.retains(frame, frames.stop))
    return CleanPass(tuple(frames), (), block_plan((), policy.positions((), frames.start, len(frames))[1]), stored)


def extent(policy: HistoryPolicy, recache: str) -> tuple[range, int | None]:
    """(the sink's frames, the window in frames or None). Raises ValueError for a policy that is neither."""
    if isinstance(policy, SinkWindow):
        return range(policy.sink_start, policy.sink_start + policy.sink), policy.window
    if isinstance(policy, MemoryBank) and recache == "JointRecache":
        return range(policy.sink), policy.window
    if isinstance(policy, FullHistory):
        return range(0), None
    raise ValueError(
        f"{recache} knows the window of {'SinkWindow, MemoryBank' if recache == 'JointRecache' else 'SinkWindow'} and "
        f"FullHistory, not of {type(policy).__name__}; set recache of the generator to BlockwiseRecache or NoRecache"
    )


def in_window(policy: HistoryPolicy, frame: int, start: int, recache: str) -> bool:
    """Whether a frame is among the last ``window`` before ``start``."""
    _, window = extent(policy, recache)
    return window is None or frame >= start - window


@dataclass(frozen=True)
class CleanPast:
    """The clean latents that a recache may still read: (first frame, latents [N, C, f, H, W]) per committed block."""

    blocks: tuple[tuple[int, Tensor], ...] = ()

    @property
    def batch(self) -> int:
        """N; 0 while nothing is kept."""
        return len(self.blocks[0][1]) if self.blocks else 0

    def append(self, start: int, x0: Tensor, needed: Callable[[int], bool]) -> "CleanPast":
        """With a committed block at ``start``, without the blocks that hold no ``needed`` frame."""
        blocks = (*self.blocks, (start, x0.detach()))
        return CleanPast(tuple((f, x) for f, x in blocks if any(needed(i) for i in range(f, f + x.shape[2]))))

    def fork(self, branches: int) -> "CleanPast":
        """Each row becomes ``branches`` consecutive rows. Latents are small; they are copied."""
        return CleanPast(tuple((f, x.repeat_interleave(branches, 0)) for f, x in self.blocks))

    def read(self, frames: Sequence[int]) -> Tensor:
        """Latents of frames, in this order. Raises KeyError for one that is not kept."""
        place = {first + i: (x, i) for first, x in self.blocks for i in range(x.shape[2])}
        missing = [frame for frame in frames if frame not in place]
        if missing:
            raise KeyError(f"the clean latents of frames {missing} are not kept; those of {list(place)} are")
        return torch.stack([x[:, :, i] for x, i in (place[frame] for frame in frames)], dim=2)
