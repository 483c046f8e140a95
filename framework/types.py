"""The values of one training step, in the order in which they appear.

    scenes ─plan→ GroupPlan ─roll_out→ Tape ─decode→ VideoBatch ─score→ Scores ─rule→ Advantage
                                         └─probes→ Probes ─network→ Views ─statistics→ Statistics ─objective→ Objective

Shapes: P prompts (groups), B branches a group, N = P·B clips in group order, F latent frames, S noisy streams.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from framework.records import Record

R = TypeVar("R", bound="Record")


@dataclass(frozen=True)
class Segment:
    """A prompt and the latent frame from which it is asked for."""

    prompt: str
    start: int = 0


@dataclass(frozen=True)
class Scene:
    """What to generate: one prompt, or several that switch at given frames. ``key`` names its evaluation noise.

    A switch takes effect with the first block that starts at or after its frame, see `on_blocks`. Raises ValueError
    unless the segments start at frame 0 and each one after the one before it.
    """

    key: str
    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        starts = [segment.start for segment in self.segments]
        if not starts or starts[0] != 0 or any(b <= a for a, b in itertools.pairwise(starts)):
            raise ValueError(
                f"the segments of a scene must start at frame 0 and then each after the one before it, got {starts}"
            )

    @classmethod
    def single(cls, prompt: str, key: str | None = None) -> "Scene":
        return cls(prompt if key is None else key, (Segment(prompt),))

    @property
    def prompt(self) -> str:
        """The prompt in force at frame 0."""
        return self.segments[0].prompt

    def segment_at(self, frame: int) -> Segment:
        """The segment that a latent frame belongs to."""
        return [segment for segment in self.segments if segment.start <= frame][-1]

    def on_blocks(self, block_frames: int) -> "Scene":
        """The scene as blocks of ``block_frames`` show it: every segment starts at the block that it takes effect with.

        Where several would start at one block, the last of them does.
        """
        starts = {-(-s.start // block_frames) * block_frames: s.prompt for s in self.segments}
        return replace(self, segments=tuple(Segment(prompt, start) for start, prompt in sorted(starts.items())))

    def switch_at(self, frame: int) -> str | None:
        """The prompt of the segment that starts at a frame > 0, None where none does."""
        return next((s.prompt for s in self.segments[1:] if s.start == frame), None)


Visible = Sequence[tuple[int, ...] | None]
"""Per clip, the ids of the frames that its next block sees, ascending; None for what the generator's policy shows."""


@dataclass(frozen=True)
class Route:
    """A history of a branch's own, by frame id: sink, routed frames, most recent frames.

    frames: ascending ids of routed frames, fixed for the whole window. sink: leading frames kept as they are. recent:
    most recent frames kept (history only; the current block comes on top). blocks: how many blocks of the window are
    routed, from its first. steps: which sampler steps are. clean_write: whether the clean pass that commits a routed
    block sees the route too.
    """

    frames: tuple[int, ...]
    sink: int
    recent: int
    blocks: int
    steps: tuple[bool, ...]
    clean_write: bool = False

    def visible(self, start: int) -> tuple[int, ...]:
        """Ids of the frames that the block at ``start`` sees, ascending."""
        return (*range(self.sink), *self.frames, *range(start - self.recent, start))


@dataclass(frozen=True)
class BranchPlan:
    """How one branch is generated. Branches of a group that have equal seeds share their noise.

    route: the history it is shown in place of the canonical one. anchor: it explores nothing; rewards are compared with
    it, and it takes no part in the update.
    """

    noise_seed: int
    route: Route | None = None
    anchor: bool = False


@dataclass(frozen=True)
class GroupPlan:
    """One prompt's group. Blocks [0, first_block) are generated once, with the prefix seed, and shared.

    group: id that is unique over all ranks of a step; advantages are taken inside it.
    """

    group: int
    scene: Scene
    first_block: int
    blocks: int
    prefix_seed: int
    branches: tuple[BranchPlan, ...]


@dataclass(frozen=True)
class Tape:
    """What a rollout left behind: the plans it followed and the records somebody asked for, clips in group order."""

    plans: tuple[GroupPlan, ...]
    records: Mapping[type, "Record"]

    def __getitem__(self, kind: type[R]) -> R:
        """The record of a kind, or of a subclass of it. Raises KeyError that names the missing record."""
        for written, record in self.records.items():
            if issubclass(written, kind):
                return record  # pyright: ignore[reportReturnType]
        raise KeyError(f"the rollout kept no {kind.__name__}; it kept {[k.__name__ for k in self.records]}")

    @property
    def groups(self) -> Tensor:
        """Group id of every clip [N]."""
        return torch.tensor([plan.group for plan in self.plans for _ in plan.branches])

    @property
    def anchors(self) -> Tensor:
        """Which clips explored nothing, bool [N]."""
        return torch.tensor([branch.anchor for plan in self.plans for branch in plan.branches])

    @property
    def scenes(self) -> list[Scene]:
        """Scene of every clip [N]."""
        return [plan.scene for plan in self.plans for _ in plan.branches]


@dataclass(frozen=True)
class Window:
    """A span of frames with the prompt it is judged by."""

    start: int
    stop: int
    prompt: str


@dataclass(frozen=True)
class VideoBatch:
    """Decoded clips as a viewer sees them.

    frames: uint8 [N, T, 3, H, W]. fps: true frames per second. windows: per clip, the spans and prompts it is judged
    by; spans count pixel frames of this batch. Every clip has at least one window.
    """

    frames: Tensor
    fps: float
    windows: tuple[tuple[Window, ...], ...]

    def __post_init__(self) -> None:
        if self.frames.dtype != torch.uint8 or self.frames.ndim != 5 or self.frames.shape[2] != 3:
            raise ValueError(
                f"VideoBatch.frames must be uint8 [N, T, 3, H, W], got {self.frames.dtype} {tuple(self.frames.shape)}"
            )
        if not 0 < self.fps < math.inf:
            raise ValueError(f"VideoBatch.fps must be positive and finite, got {self.fps}; scores depend on true time")
        if len(self.windows) != len(self.frames) or not all(self.windows):
            raise ValueError("VideoBatch.windows needs at least one window for each clip")
        for window in {window for windows in self.windows for window in windows}:
            if not 0 <= window.start < window.stop <= self.frames.shape[1]:
                raise ValueError(
                    f"VideoBatch.windows must lie in 0 … {self.frames.shape[1]}, got {window.start} … {window.stop}"
                )

    @classmethod
    def from_signed(cls, frames: Tensor, fps: float, prompts: Sequence[str]) -> "VideoBatch":
        """From floats in [−1, 1], [N, T, 3, H, W]; values outside are clamped as a decoder's are. NaN is refused."""
        if not bool(torch.isfinite(frames).all()):
            raise ValueError(
                "the generator made non-finite pixels; if its policy diverged in training, lower the optimiser's "
                "learning_rate"
            )
        pixels = ((frames.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return cls(pixels, fps, tuple((Window(0, frames.shape[1], prompt),) for prompt in prompts))

    @property
    def prompts(self) -> list[str]:
        """The first window's prompt of each clip."""
        return [windows[0].prompt for windows in self.windows]

    def __len__(self) -> int:
        return len(self.frames)


@dataclass(frozen=True)
class Scores:
    """What a reward model says. A failed score is invalid; it is never a zero.

    values: per signal float32 [N] (the mean over windows). valid: per signal bool [N]. windows: per signal [N, W],
    where the model scored windows apart.
    """

    values: Mapping[str, Tensor]
    valid: Mapping[str, Tensor]
    windows: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in self.values.items():
            if name not in self.valid or self.valid[name].shape != value.shape:
                raise ValueError(f"the reward signal {name!r} needs a validity flag for each of its values")
            if bool((~torch.isfinite(value) & self.valid[name]).any()):
                raise ValueError(f"the reward signal {name!r} is non-finite but marked valid")

    @classmethod
    def of(cls, values: Mapping[str, Tensor]) -> "Scores":
        """All finite values are valid, all others are not."""
        return cls(values, {name: torch.isfinite(value) for name, value in values.items()})

    def __or__(self, other: "Scores") -> "Scores":
        """Signals of both. Raises ValueError when a name occurs twice."""
        twice = set(self.values) & set(other.values)
        if twice:
            raise ValueError(f"two reward models give the same signal {sorted(twice)}; rename one")
        return Scores({**self.values, **other.values}, {**self.valid, **other.valid}, {**self.windows, **other.windows})


@dataclass(frozen=True)
class Advantage:
    """How much better each clip was than its siblings.

    values: float32 [N]. active: bool [N]; False drops the clip and every penalty on it from the update, whose losses
    are averaged over the active clips; an anchor is never active. groups: id [N] of each clip's group, equal ids side
    by side. metrics: scalars to log.
    """

    values: Tensor
    active: Tensor
    groups: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> "Advantage":
        """The same on another device; metrics stay where they are."""
        return Advantage(self.values.to(device), self.active.to(device), self.groups.to(device), self.metrics)

    def __getitem__(self, rows: Tensor) -> "Advantage":
        """The clips of some rows, without the metrics."""
        return Advantage(self.values[rows], self.active[rows], self.groups[rows])


@dataclass(frozen=True)
class Marks:
    """What a regularizer decided about each clip of a rollout.

    per_clip: float32 [N], e.g. 1 where the penalty is paid. metrics: scalars to log.
    """

    per_clip: Tensor
    metrics: Mapping[str, Tensor | float] = field(default_factory=dict)

    def to(self, device: torch.device) -> "Marks":
        """The same on another device; metrics stay where they are."""
        return Marks(self.per_clip.to(device), self.metrics)


@dataclass(frozen=True)
class Probes:
    """Where the policies are asked for their velocity: noisy versions of blocks behind a clean context.

    noisy: [N, S, C, F, H, W], S versions of the F window frames that start at frame ``start``.
    sigma: noise level per frame [N, S, F]. clean: the window's clean latents [N, C, F, H, W]; a block is asked behind
    the clean blocks before it. prefix: clean latents [P, C, start, H, W] before the window, shared by the N/P
    consecutive clips of a group. scenes: one per group [P]; their switches up to frame ``start`` are repeated, and one
    inside the window is refused. rows: which clips of the tape these are [N].
    history_grad: whether gradient reaches the weights through the encoding of the clean context (RAVEN) or only
    through the noisy blocks. extra: tensors [N, …] that the objective needs beside the views.
    """

    noisy: Tensor
    sigma: Tensor
    clean: Tensor
    start: int
    prefix: Tensor | None
    scenes: tuple[Scene, ...]
    rows: Tensor
    history_grad: bool = False
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        stop = self.start + self.clean.shape[2]
        inside = sorted({s.start for scene in self.scenes for s in scene.segments if self.start < s.start < stop})
        if inside:
            raise ValueError(
                f"a prompt switches at frame {inside[0]}, inside the trained window {self.start} … {stop - 1}; "
                f"a window is trained under one prompt and may start at a switch: move or shorten it "
                f"(NoiseEndpoint.layout and window_blocks, CausalHistoryRouting.routed_blocks and tail_blocks)"
            )

    def __len__(self) -> int:
        return len(self.noisy)

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompt of each group that the window is asked under [P]."""
        return tuple(scene.segment_at(self.start).prompt for scene in self.scenes)

    def split(self, clips: int) -> Iterator["Probes"]:
        """Micro-batches of whole groups where possible, else of equal parts of a group; order is kept."""
        branches = len(self) // len(self.scenes)
        clips = min(clips, len(self))
        step = clips - clips % branches if clips >= branches else clips
        if clips < branches and branches % clips:
            raise ValueError(f"micro_batch_size={clips} must divide the group size {branches} or be a multiple of it")
        for first in range(0, len(self), step):
            part = slice(first, first + step)
            groups = slice(first // branches, -(-min(first + step, len(self)) // branches))
            yield replace(
                self,
                noisy=self.noisy[part],
                sigma=self.sigma[part],
                clean=self.clean[part],
                prefix=None if self.prefix is None else self.prefix[groups],
                scenes=self.scenes[groups],
                rows=self.rows[part],
                extra={name: value[part] for name, value in self.extra.items()},
            )


Views = Mapping[str, Tensor]
"""Velocities [N, S, C, F, H, W] at the probes, by policy name: "current", "behaviour", "reference"."""


@dataclass(frozen=True)
class Objective:
    """A loss as data: per-clip values [N] still to be averaged over the active clips of the world.

    written: records for the regularizer. metrics: per-clip values [N] to log, averaged like the loss.
    """

    per_clip: Tensor
    written: Mapping[type, Any] = field(default_factory=dict)
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


Statistics = Mapping[str, Tensor]
"""What a surrogate measures of each clip [n, …]: the only thing that leaves a micro-batch, a handful of scalars."""


@dataclass(frozen=True)
class Loss:
    """What is differentiated: measured in micro-batches, judged over whole groups.

    views: the policies that are asked. measure: per-clip statistics of one micro-batch. judge: the objective of the
    statistics of some rows of the tape. coupled: whether a clip's loss depends on its siblings' statistics.
    """

    views: frozenset[str]
    measure: Callable[[Views, "Probes"], Statistics]
    judge: Callable[[Statistics, Tensor], Objective]
    coupled: bool = False
