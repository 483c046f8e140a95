"""The extension points: what a new exploration, surrogate, reward, regularizer or generator has to provide.

    ExplorationStrategy × SurrogatePolicy × RewardModel × Regularizer   on a   StreamingGenerator

A class is either an interface (here) or final. Requirements are types: `writes` and `reads` name records, and
`framework.compatibility.check_recipe` refuses a combination in which something read was never written.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, Protocol, TypeVar

from torch import Tensor, nn

from framework.kernels import TransitionKernel
from framework.memory_estimate import NetworkDimensions
from framework.records import Record
from framework.rng import Streams
from framework.schedules import FewStepSchedule
from framework.types import (
    Advantage,
    GroupPlan,
    Marks,
    Objective,
    Probes,
    Scene,
    Scores,
    Statistics,
    Tape,
    VideoBatch,
    Views,
    Visible,
)


@dataclass(frozen=True)
class GeneratorRecipe:
    """How a checkpoint is meant to be run; a checkpoint file does not say it.

    block_frames: latent frames denoised together. clip_blocks: blocks of a training clip. latent: (C, H, W).
    schedule: the sampler's σ grid. prediction: what the network outputs, "velocity" or "x0". fps: of decoded video.
    temporal_stride: pixel frames per latent frame; the first latent frame of a stream is one pixel frame all the same.
    first_schedule: the grid of a stream's first block, where it is another one (frame-wise Causal-Forcing takes more
    steps there). name: for logs and weight files. source, licence: of the weights, for model cards; empty: not known.
    """

    name: str
    block_frames: int
    clip_blocks: int
    latent: tuple[int, int, int]
    schedule: FewStepSchedule
    prediction: str = "velocity"
    fps: float = 16.0
    temporal_stride: int = 1
    first_schedule: FewStepSchedule | None = None
    source: str = ""
    licence: str = ""

    def schedule_at(self, frame: int) -> FewStepSchedule:
        """The σ grid of the block that starts at ``frame``."""
        return self.schedule if frame or self.first_schedule is None else self.first_schedule

    @property
    def latent_fps(self) -> float:
        """Latent frames per second."""
        return self.fps / self.temporal_stride

    def pixels_before(self, frame: int) -> int:
        """Pixel frames of a stream before latent frame ``frame``: 0, 1, 1 + stride, 1 + 2 stride, …"""
        return 1 + self.temporal_stride * (frame - 1) if frame > 0 else 0

    def __post_init__(self) -> None:
        if self.prediction not in ("velocity", "x0"):
            raise ValueError(f"GeneratorRecipe.prediction must be 'velocity' or 'x0', got {self.prediction!r}")


class Stream(Protocol):
    """An immutable streaming state: the clean past and the text of N clips."""

    @property
    def next_frame(self) -> int:
        """Id of the next frame to be generated."""
        ...

    @property
    def batch(self) -> int:
        """N."""
        ...


S = TypeVar("S", bound=Stream)


class StreamingGenerator(ABC, Generic[S]):
    """A causal video generator, seen from training: states are opaque, keys and values never leave it."""

    recipe: GeneratorRecipe
    network: nn.Module
    """The module that adapters are put on and gradients reach."""
    forward_methods: ClassVar[tuple[str, ...]] = ()
    """Methods of the network and its blocks that use weights and run outside of ``forward``; sharding asks for them."""

    @abstractmethod
    def open(self, prompts: Sequence[str], resident: int = 0, switches: bool = False) -> S:
        """An empty stream per prompt. Its text keys belong to the policy in force now.

        resident: how many recent frames stay addressable beyond what the history policy shows. switches: whether
        `switch` may be called later, for which a stream keeps the clean latents that it needs.
        """

    @abstractmethod
    def switch(self, stream: S, prompts: Sequence[str | None]) -> S:
        """The stream under new prompts, its recent history re-encoded under them where the generator does that.

        prompts: one per prompt of the stream, None where it stays; the clips of those are unchanged, bit for bit.
        """

    def follow(self, stream: S, scenes: Sequence[Scene]) -> S:
        """The stream once the segments that start at its next frame are in force; scenes: as `Scene.on_blocks` cuts."""
        prompts = [scene.switch_at(stream.next_frame) for scene in scenes]
        return stream if all(prompt is None for prompt in prompts) else self.switch(stream, prompts)

    def check_plan(self, plan: GroupPlan) -> None:
        """Raises ValueError for a route that a stream of the plan's scene cannot show; a generator without such: never.

        A switch after the window's first frame is not looked at: the window never meets it.
        """
        return None

    @abstractmethod
    def predict(self, x: Tensor, sigma: float, stream: S, visible: Visible | None = None) -> Tensor:
        """Velocity [N, C, f, H, W] of the next block at one noise level; the stream is not changed.

        visible: per clip, the frames to see in place of what the policy shows. Raises KeyError for a frame that is no
        longer resident.
        """

    @abstractmethod
    def commit(self, x0: Tensor, stream: S, visible: Visible | None = None) -> S:
        """The stream with a clean block [N, C, f, H, W] appended, encoded behind the frames of ``visible``."""

    @abstractmethod
    def fork(self, stream: S, branches: int) -> S:
        """Each row becomes ``branches`` consecutive rows; the past is shared, not copied."""

    @abstractmethod
    def replay(self, probes: Probes) -> Tensor:
        """Velocities [N, S, C, F, H, W] of all probed blocks behind their clean context.

        Equal to `predict` on a stream with the same clean past. Gradient reaches the weights through the noisy blocks
        and, iff ``probes.history_grad``, through the encoding of the window's clean blocks.
        """

    @abstractmethod
    def decode(self, latents: Tensor, prefix: Tensor | None = None) -> Tensor:
        """Pixels [N, T, 3, H, W] in [−1, 1] of latents [N, C, F, H, W].

        prefix: the clean latents [P, C, start, H, W] before them, one row per N/P consecutive clips, for decoders that
        need their past; its own pixels are not returned.
        """

    def decoder(self) -> Callable[[Tensor], Tensor]:
        """A decoder of its own for N streams, called with their latents [N, C, f, H, W] block after block from frame 0:
        pixels [N, T, 3, H, W] of each. It may remember what it has decoded, a bounded amount; this one does not."""
        return self.decode

    def encode(self, pixels: Tensor) -> Tensor:
        """Clean latents [N, C, F, H, W] of the first pixels [N, T, 3, H, W] in [−1, 1] of streams, to continue them.

        Raises ValueError for a generator without an encoder.
        """
        raise ValueError(f"{type(self).__name__} has no encoder, so it cannot continue given frames")

    def dimensions(self, prompt: str) -> NetworkDimensions | None:
        """The sizes that a memory estimate needs, with a prompt of usual length; None where they are not known."""
        return None


class ExplorationStrategy(ABC):
    """How the branches of a group differ. Calls no network: a plan is data."""

    kernel: TransitionKernel
    group_size: int
    """Branches of a group that take part in the update."""

    @abstractmethod
    def writes(self) -> frozenset[type[Record]]:
        """Record types that a rollout of this strategy can leave behind."""

    @abstractmethod
    def plan(
        self, scenes: Sequence[Scene], groups: Sequence[int], recipe: GeneratorRecipe, streams: Streams
    ) -> tuple[GroupPlan, ...]:
        """One group per scene. ``groups`` are ids unique over all ranks; a plan depends on (seed, step, group) only."""


class SurrogatePolicy(ABC):
    """What is optimised in place of the reward. Never calls a network."""

    reads: ClassVar[frozenset[type[Record]]] = frozenset()
    writes: ClassVar[frozenset[type[Record]]] = frozenset()
    views: ClassVar[frozenset[str]] = frozenset({"current"})
    """Policies whose velocities `statistics` reads; others are never computed."""
    coupled: ClassVar[bool] = False
    """Whether a clip's loss depends on its siblings' statistics; then whole groups are gathered before `objective`."""
    has_ratio: ClassVar[bool] = False
    """Whether clips are weighed by an importance ratio to the behaviour policy, which is logged as ``ratio_mean``."""
    on_policy: ClassVar[bool] = False
    """Whether it is right only for clips of the very policy that is updated: it has no ratio to the one that made them.
    Then a rollout serves one update, and the behaviour policy may not lag."""

    @property
    def fixed_probes(self) -> bool:
        """Whether every update of a rollout asks at the same places; then frozen policies are asked once a rollout."""
        return False

    @abstractmethod
    def probes(self, tape: Tape, recipe: GeneratorRecipe, streams: Streams) -> Iterator[Probes]:
        """Where to ask the policies. Each item becomes one part of the same optimiser step.

        What is random about a clip comes from a stream of its own, named by its group and branch, so that it does not
        depend on how clips are placed in batches or on ranks.
        """

    @abstractmethod
    def statistics(self, views: Views, probes: Probes) -> Statistics:
        """What is measured of each probed clip, a pure function of tensors → {name: [n, …]}."""

    @abstractmethod
    def objective(self, statistics: Statistics, advantage: Advantage) -> Objective:
        """The loss per clip, a pure function of the statistics. ``advantage`` holds exactly the measured clips."""

    def loss(self, views: Views, probes: Probes, advantage: Advantage) -> Objective:
        """`objective` of `statistics`: the whole loss where everything fits at once."""
        return self.objective(self.statistics(views, probes), advantage)


class Remembering:
    """What a part remembers from step to step; most remember nothing. A checkpoint holds it, so what is not here is
    lost when a run is resumed."""

    def state_dict(self) -> dict:
        """Tensors, numbers, texts, None, and dicts, lists and tuples of them."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict`."""
        if state:
            raise ValueError(f"{type(self).__name__} remembers nothing, but the state to load has {sorted(state)}")


class RewardFailed(ValueError):
    """A reward model can score nothing now, e.g. its service does not answer; the message is one line that says why."""


class RewardModel(Remembering, ABC):
    """What people want to see more of."""

    @property
    @abstractmethod
    def signals(self) -> tuple[str, ...]:
        """Names of the scores it gives."""

    @abstractmethod
    def score(self, videos: VideoBatch) -> Scores:
        """Score clips; no gradient. A clip that cannot be scored is invalid, not zero. Raises RewardFailed where no
        clip can be."""

    def settle(self, scores: Scores, groups: Tensor) -> Scores:
        """What a step learns from, of the scores of all its clips on all ranks; groups: id per clip [N].

        The same on every rank. What failed scores lead to, beyond their own clips being left out, is decided here; may
        raise RewardFailed.
        """
        return scores

    def metrics(self) -> Mapping[str, float]:
        """Numbers to log with every step, e.g. how long a service takes to answer."""
        return {}

    def unavailable(self) -> str | None:
        """Why it cannot score now, e.g. a service that does not answer, in one line; None where it can."""
        return None


class ControlVideos(ABC):
    """Videos whose score is known in advance: the ceiling and the floors that results are printed between."""

    @abstractmethod
    def videos(self, scenes: Sequence[Scene]) -> Mapping[str, VideoBatch]:
        """Control videos by name, one clip per scene each."""


class AdvantageRule(Remembering, ABC):
    """From scores to advantages: inside groups, never across prompts."""

    reads: ClassVar[frozenset[type[Record]]] = frozenset()

    @abstractmethod
    def __call__(self, scores: Scores, groups: Tensor, anchors: Tensor | None = None) -> Advantage:
        """scores: values [N] per signal; groups: id per clip [N]; anchors: which clips [N] explored nothing.

        Anchors are never active. A rule that does not read `Anchors` must give what it would give without them.
        """


class Regularizer(Remembering, ABC):
    """What keeps the policy near a reference."""

    reads: ClassVar[frozenset[type[Record]]] = frozenset()
    views: ClassVar[frozenset[str]] = frozenset()

    @property
    def signals(self) -> frozenset[str]:
        """Reward signals that `prepare` reads."""
        return frozenset()

    def prepare(self, scores: Scores, groups: Tensor, anchors: Tensor | None = None) -> Marks | None:
        """Once per rollout: per-clip marks such as the selective mask, handed back to `penalty` for its clips.

        Scores are those of all clips of the step. Anchors and clips with a failed score are never marked.
        """
        return None

    @abstractmethod
    def penalty(self, objective: Objective, marks: Tensor | None) -> Tensor:
        """Per-clip penalty [N], already weighted, added to the objective's per-clip loss."""


class Schedule(ABC):
    """A number per optimiser step, e.g. the decay of an averaged policy."""

    @abstractmethod
    def __call__(self, step: int) -> float:
        """Value at optimiser step ``step``, counted from 0."""
