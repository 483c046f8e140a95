"""Held-out evaluation: fixed scenes, fixed noise per (seed, scene, member), so two policies are compared in pairs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from framework.data.scenes import SceneSource
from framework.interfaces import ControlVideos, RewardModel, StreamingGenerator
from framework.kernels import Consistency, TransitionKernel
from framework.records import Endpoints
from framework.reporting.progress import progress
from framework.rng import derive_seed
from framework.rollout import roll_out
from framework.types import BranchPlan, GroupPlan, Scene, Scores, Tape, VideoBatch


@dataclass(frozen=True)
class EvaluationResult:
    """scores: per signal [scenes, members], NaN where a score was invalid. videos: the first member of each scene."""

    scores: dict[str, Tensor]
    videos: VideoBatch

    @property
    def total(self) -> Tensor:
        """Mean over signals [scenes, members]."""
        return torch.stack(list(self.scores.values())).mean(0)


@dataclass(frozen=True)
class HeldOut:
    """How a run is judged: scenes that RL never sees, a reward of its own, and fixed noise.

    members: clips per scene. seed: of the evaluation noise, apart from the run's seed so that all runs are judged on
    the same clips. every: also evaluate every so many steps (0: only before and after). clips_per_batch: a throughput
    knob that changes no result. controls: videos of known quality whose scores are printed beside every result.
    """

    scenes: SceneSource
    reward: RewardModel
    members: int = 8
    seed: int = 20260
    every: int = 0
    clips_per_batch: int = 48
    controls: ControlVideos | None = None

    def __post_init__(self) -> None:
        if len(self.scenes.scenes()) < 2:
            raise ValueError("HeldOut.scenes needs at least 2 scenes: intervals are clustered by scene")
        if self.members < 1 or self.clips_per_batch < 1 or self.every < 0:
            raise ValueError(
                f"HeldOut.members and clips_per_batch must be at least 1 and every at least 0, got {self.members}, "
                f"{self.clips_per_batch}, {self.every}"
            )

    def judge(self, generator: StreamingGenerator, description: str = "evaluating") -> EvaluationResult:
        """Evaluate the policy in force."""
        return evaluate_policy(
            generator, self.reward, self.scenes.scenes(), self.members, self.seed,
            clips_per_batch=self.clips_per_batch, description=description,
        )  # fmt: skip


def evaluation_plans(scenes: Sequence[Scene], members: int, seed: int, blocks: int) -> list[GroupPlan]:
    """One group per scene; the noise of a member depends on (seed, scene key, member) alone."""
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
    """What a viewer sees of the windows of a tape, judged by each scene's prompts."""
    ends = tape[Endpoints]
    pixels = generator.decode(ends.latents, ends.prefix)
    return VideoBatch.from_signed(pixels, generator.recipe.fps, [scene.prompt for scene in tape.scenes])


@torch.no_grad()
def evaluate_policy(
    generator: StreamingGenerator,
    reward: RewardModel,
    scenes: Sequence[Scene],
    members: int,
    seed: int,
    blocks: int | None = None,
    kernel: TransitionKernel | None = None,
    clips_per_batch: int = 48,
    description: str = "evaluating",
) -> EvaluationResult:
    """Generate ``members`` clips per scene under the policy in force and score them. Equal for any batch size."""
    plans = evaluation_plans(scenes, members, seed, generator.recipe.clip_blocks if blocks is None else blocks)
    per_batch = max(1, clips_per_batch // members)
    batches: list[Scores] = []
    shown: list[VideoBatch] = []
    for first in progress(range(0, len(plans), per_batch), description):
        tape = roll_out(generator, plans[first : first + per_batch], kernel or Consistency())
        videos = decode_tape(generator, tape)
        batches.append(reward.score(videos))
        shown.append(VideoBatch(videos.frames[::members].cpu().clone(), videos.fps, videos.windows[::members]))
    scores = {
        name: torch.cat([torch.where(s.valid[name], s.values[name], torch.nan) for s in batches]).view(-1, members)
        for name in reward.signals
    }
    frames = torch.cat([v.frames for v in shown])
    windows = tuple(window for videos in shown for window in videos.windows)
    return EvaluationResult(scores, VideoBatch(frames, shown[0].fps, windows))
