"""Held-out evaluation: fixed scenes, fixed noise per (seed, scene, member), so two policies are compared in pairs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from framework.data.scenes import SceneSource
from framework.distributed import World
from framework.interfaces import ControlVideos, GeneratorRecipe, RewardModel, StreamingGenerator
from framework.kernels import Consistency, TransitionKernel
from framework.records import Endpoints
from framework.reporting.progress import progress
from framework.rng import check_seed, derive_seed
from framework.rollout import roll_out
from framework.types import BranchPlan, GroupPlan, Scene, Scores, Tape, VideoBatch, Window

Watch = Callable[[int, VideoBatch, Scores], None]
"""Shown every batch as it is scored: the number of its first clip, scene · members + member, the clips, the scores."""


@dataclass(frozen=True)
class EvaluationResult:
    """scores: per signal [scenes, members], NaN where a score was invalid. videos: the first member of each scene, on
    ranks other than the first of this rank's scenes."""

    scores: dict[str, Tensor]
    videos: VideoBatch

    @property
    def total(self) -> Tensor:
        """Mean over signals [scenes, members]."""
        return torch.stack(list(self.scores.values())).mean(0)


@dataclass(frozen=True)
class HeldOut:
    """How a run is judged: scenes that RL never sees, a reward of its own, and fixed noise.

    members: clips per scene. blocks: judged of a clip, None for the recipe's clip length. first_block: where the judged
    window starts in the stream; what comes before it is generated but neither decoded nor scored. seed: of the
    evaluation noise, apart from the run's seed so that all runs are judged on the same clips. every: also evaluate
    every so many steps (0: only before and after). clips_per_batch: a throughput knob that changes no result.
    controls: videos of known quality whose scores are printed beside every result.
    """

    scenes: SceneSource
    reward: RewardModel
    members: int = 8
    blocks: int | None = None
    first_block: int = 0
    seed: int = 20260
    every: int = 0
    clips_per_batch: int = 48
    controls: ControlVideos | None = None

    def __post_init__(self) -> None:
        if len(self.scenes.scenes()) < 2:
            raise ValueError("HeldOut.scenes needs at least 2 scenes: intervals are clustered by scene")
        check_seed(self.seed, "HeldOut.seed")
        if self.blocks is not None and self.blocks < 1:
            raise ValueError(f"HeldOut.blocks must be at least 1, or None for the recipe's clip, got {self.blocks}")
        for name, low in (("members", 1), ("clips_per_batch", 1), ("every", 0), ("first_block", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"HeldOut.{name} must be at least {low}, got {getattr(self, name)}")

    def judge(
        self,
        generator: StreamingGenerator,
        description: str = "evaluating",
        world: World | None = None,
        watch: Watch | None = None,
    ) -> EvaluationResult:
        """Evaluate the policy in force. world: whose ranks share the scenes; all of them get all scores."""
        return evaluate_policy(
            generator, self.reward, self.scenes.scenes(), self.members, self.seed, self.blocks, self.first_block,
            clips_per_batch=self.clips_per_batch, description=description, world=world, watch=watch,
        )  # fmt: skip


def evaluation_plans(
    scenes: Sequence[Scene], members: int, seed: int, blocks: int, first_block: int = 0
) -> list[GroupPlan]:
    """One group per scene; the noise of a member depends on (seed, scene key, member) alone.

    With blocks before the window every member is a group of its own: each has its own past, from its own noise.
    """
    if first_block:
        return [
            GroupPlan(
                group=i * members + m,
                scene=scene,
                first_block=first_block,
                blocks=blocks,
                prefix_seed=derive_seed(seed, "evaluation-prefix", scene.key, m),
                branches=(BranchPlan(derive_seed(seed, "evaluation", scene.key, m)),),
            )
            for i, scene in enumerate(scenes)
            for m in range(members)
        ]
    return [
        GroupPlan(
            group=i,
            scene=scene,
            first_block=0,
            blocks=blocks,
            prefix_seed=0,
            branches=tuple(BranchPlan(derive_seed(seed, "evaluation", scene.key, m)) for m in range(members)),
        )
        for i, scene in enumerate(scenes)
    ]


def decode_tape(generator: StreamingGenerator, tape: Tape) -> VideoBatch:
    """What a viewer sees of the windows of a tape, judged by each scene's prompts, every one on its own span."""
    ends = tape[Endpoints]
    pixels = generator.decode(ends.latents, ends.prefix)
    videos = VideoBatch.from_signed(pixels, generator.recipe.fps, [scene.prompt for scene in tape.scenes])
    frames = ends.latents.shape[2]
    windows = tuple(segment_windows(scene, ends.start, frames, generator.recipe) for scene in tape.scenes)
    return replace(videos, windows=windows)


def segment_windows(scene: Scene, start: int, frames: int, recipe: GeneratorRecipe) -> tuple[Window, ...]:
    """What each segment of a scene shows of the latent frames [start, start + frames), in pixel frames of that span."""
    stops = [segment.start for segment in scene.segments[1:]] + [start + frames]
    offset = recipe.pixels_before(start)
    return tuple(
        Window(recipe.pixels_before(first) - offset, recipe.pixels_before(last) - offset, segment.prompt)
        for segment, stop in zip(scene.segments, stops, strict=True)
        if (first := max(segment.start, start)) < (last := min(stop, start + frames))
    )


@torch.no_grad()
def evaluate_policy(
    generator: StreamingGenerator,
    reward: RewardModel,
    scenes: Sequence[Scene],
    members: int,
    seed: int,
    blocks: int | None = None,
    first_block: int = 0,
    kernel: TransitionKernel | None = None,
    clips_per_batch: int = 48,
    description: str = "evaluating",
    world: World | None = None,
    watch: Watch | None = None,
) -> EvaluationResult:
    """Generate ``members`` clips per scene under the policy in force and score them. Equal for any batch size.

    watch: sees all clips of this rank, whose number counts from the rank's first scene; nothing else keeps them.
    """
    blocks = generator.recipe.clip_blocks if blocks is None else blocks
    world = world or World()
    own = world.own(scenes)
    plans = evaluation_plans(own, members, seed, blocks, first_block)
    groups = len(plans) // len(own)  # of a scene
    per_batch = clips_per_batch // members * groups or min(clips_per_batch, groups)
    batches: list[Scores] = []
    shown: list[VideoBatch] = []
    for first in progress(range(0, len(plans), per_batch), description):
        batch = plans[first : first + per_batch]
        tape = roll_out(generator, batch, kernel or Consistency(), branches_at_once=clips_per_batch)
        videos = decode_tape(generator, tape)
        batches.append(reward.score(videos))
        if watch is not None:
            watch(first * len(plans[0].branches), videos, batches[-1])
        rows = slice(-first * len(plans[0].branches) % members, None, members)  # of the first members
        if len(videos.frames[rows]):
            shown.append(VideoBatch(videos.frames[rows].cpu().clone(), videos.fps, videos.windows[rows]))
    scores = {
        name: torch.cat([torch.where(s.valid[name], s.values[name], torch.nan) for s in batches]).view(-1, members)
        for name in reward.signals
    }
    scores = {name: world.gather(value, len(scenes)) for name, value in scores.items()}
    frames, seen = torch.cat([v.frames for v in shown]), own
    if (everything := world.gather_on_first(frames, len(scenes))) is not None:
        frames, seen = everything, scenes
    size = generator.recipe.block_frames
    span = first_block * size, blocks * size, generator.recipe
    windows = tuple(segment_windows(scene.on_blocks(size), *span) for scene in seen)
    return EvaluationResult(scores, VideoBatch(frames, shown[0].fps, windows))
