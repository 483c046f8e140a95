"""The one distillation step: roll out, teach the critic, move the student. Every variant is a choice of parts.

It stands in the framework beside `Trainer`, and the DMD formula reaches it as a part, because rollouts, packed replay,
optimisers and averages are the framework's and a method is one gradient formula and four choices around it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from framework.accounting import Scalars, Stopwatch
from framework.averaging import WeightAverage
from framework.block_weights import BlockWeights
from framework.distillation import (
    StudentRollout,
    flow_matching_loss,
    matching_loss,
    noised_probes,
    predict_x0,
    roll_out_student,
    visited_probes,
)
from framework.distillation_interfaces import DistributionGradient, ScoreLevels, StudentHistory
from framework.interfaces import StreamingGenerator
from framework.optimization import AdamW
from framework.rng import Streams
from framework.types import Probes


@dataclass
class Distiller:
    """What one step needs: three networks, the parts, and how often whom is updated.

    generator: the student. teacher: never changes. critic: keeps learning what the student makes. All three are asked
    behind the same clean past, in packed passes. The other fields are those of `framework.commands.distill.distill`.
    """

    generator: StreamingGenerator
    teacher: StreamingGenerator
    critic: StreamingGenerator
    history: StudentHistory
    gradient: DistributionGradient
    levels: ScoreLevels
    weights: BlockWeights
    optimizer: AdamW
    critic_optimizer: AdamW
    seed: int
    batch_size: int
    critic_warmup: int
    generator_every: int
    average_decay: float
    history_grad: bool

    def __post_init__(self) -> None:
        check_networks(self.generator, self.teacher, self.critic)
        self.teacher.network.requires_grad_(False)
        self.parameters = dict(self.generator.network.named_parameters())
        self.critic_parameters = dict(self.critic.network.named_parameters())
        self.torch_optimizer = self.optimizer.build(self.parameters.values())
        self.torch_critic_optimizer = self.critic_optimizer.build(self.critic_parameters.values())
        self.average = WeightAverage(self.generator.network.state_dict())
        recipe = self.generator.recipe
        per_frame = self.weights.per_frame([recipe.block_frames] * recipe.clip_blocks)
        self.frame_weights = torch.tensor(per_frame).view(-1, 1, 1)  # over [.., F, H, W]
        self.steps_done = self.updates_done = 0

    @property
    def samples_seen(self) -> int:
        """Clips rolled out so far."""
        return self.steps_done * self.batch_size

    def step(self) -> Scalars:
        """One step of distillation. Returns metrics; tensors stay on the device."""
        streams, clock = Streams(self.seed).at("distill", self.steps_done), Stopwatch()
        # What does the student do now? One rollout serves both phases.
        prompts, past = self.history.draw(self.batch_size, self.steps_done, self.generator.recipe, streams)
        rollout = roll_out_student(self.generator, prompts, streams("rollout"), past)
        clock.lap("rollout_s")
        # The critic first, its step included: the student is moved by a critic that has seen these clips.
        metrics = self.teach_critic(rollout, streams)
        clock.lap("critic_s")
        if self.student_is_due():
            metrics |= self.move_student(rollout, streams)
            self.average.update(self.generator.network.state_dict(), self.average_decay)
            self.updates_done += 1
        clock.lap("student_s")
        self.steps_done += 1
        laps = {f"time/{name}": seconds for name, seconds in clock.laps.items()}
        return metrics | {"train/student_updates": self.updates_done} | laps

    def student_is_due(self) -> bool:
        """Every ``generator_every``-th step after the critic's warm-up."""
        ready = self.steps_done - self.critic_warmup + 1
        return ready > 0 and ready % self.generator_every == 0

    def teach_critic(self, rollout: StudentRollout, streams: Streams) -> Scalars:
        """One flow-matching update of the critic on the student's clips."""
        probes = self.noised(rollout, rollout.clips.unsqueeze(1), streams("critic"))
        loss = flow_matching_loss(self.critic, probes)
        loss.backward()
        done = self.critic_optimizer.step(self.torch_critic_optimizer, self.critic_parameters, self.steps_done)
        return {"train/critic_loss": loss.detach(), "train/critic_grad_norm": done["grad_norm"]}

    def move_student(self, rollout: StudentRollout, streams: Streams) -> Scalars:
        """One update of the student, asked at the states of one level k per clip; the scores have their own levels."""
        recipe = self.generator.recipe
        k = torch.randint(len(recipe.schedule.sigmas), (len(rollout.clips), 1, 1), generator=streams("level"))
        x0 = predict_x0(self.generator, visited_probes(rollout, k, recipe.schedule.sigmas, self.history_grad))
        with torch.no_grad():
            asked = self.noised(rollout, x0, streams("score"))
            gradient = self.gradient(x0, predict_x0(self.critic, asked), predict_x0(self.teacher, asked))
        matching_loss(x0, gradient, self.frame_weights.to(x0)).backward()
        done = self.optimizer.step(self.torch_optimizer, self.parameters, self.updates_done)
        return {"train/gradient_rms": gradient.square().mean().sqrt(), "train/grad_norm": done["grad_norm"]}

    def noised(self, rollout: StudentRollout, x0: Tensor, random: torch.Generator) -> Probes:
        """x0 at drawn levels, behind the rollout's history: what critic and teacher are asked."""
        recipe = self.generator.recipe
        sigma = self.levels.draw(len(x0), recipe.clip_blocks, recipe.schedule.shift, random)
        return noised_probes(rollout, x0, sigma, random)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in the student's place: what is evaluated and saved."""
        network = self.generator.network
        current = {name: value.clone() for name, value in network.state_dict().items()}
        network.load_state_dict(dict(self.average.weights))
        try:
            yield
        finally:
            network.load_state_dict(current)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a step depends on and the configuration does not say."""
        return {
            "steps_done": self.steps_done,
            "updates_done": self.updates_done,
            "student": self.generator.network.state_dict(),
            "critic": self.critic.network.state_dict(),
            "average": dict(self.average.weights),
            "optimizer": self.torch_optimizer.state_dict(),
            "critic_optimizer": self.torch_critic_optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.generator.network.load_state_dict(state["student"])
        self.critic.network.load_state_dict(state["critic"])
        self.torch_optimizer.load_state_dict(state["optimizer"])
        self.torch_critic_optimizer.load_state_dict(state["critic_optimizer"])
        self.average = WeightAverage(state["average"])
        self.steps_done, self.updates_done = state["steps_done"], state["updates_done"]


def check_networks(generator: StreamingGenerator, teacher: StreamingGenerator, critic: StreamingGenerator) -> None:
    """Raises ValueError where two roles share a parameter, or are not asked about the same clips."""
    roles = {"generator": generator, "teacher": teacher, "critic": critic}
    for (one, left), (two, right) in combinations(roles.items(), 2):
        if {p.data_ptr() for p in left.network.parameters()} & {p.data_ptr() for p in right.network.parameters()}:
            raise ValueError(f"distill.{one} and distill.{two} share weights; give each a network of its own")
        shapes = [(g.recipe.latent, g.recipe.block_frames, g.recipe.clip_blocks) for g in (left, right)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"distill.{one} and distill.{two} work on other clips: (latent, frames of a block, blocks) are "
                f"{shapes[0]} and {shapes[1]}; choose checkpoints of one recipe"
            )
