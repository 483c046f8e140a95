"""The one training step: explore, judge, improve. Every method is a choice of parts; there are no subclasses."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from framework.accounting import GroupCount, Scalars, Stopwatch, add_scalars, collect_metrics
from framework.data.scenes import draw_scenes
from framework.distributed import World
from framework.interfaces import (
    AdvantageRule,
    ExplorationStrategy,
    Regularizer,
    RewardModel,
    StreamingGenerator,
    SurrogatePolicy,
)
from framework.judging import Judging
from framework.nonfinite import (
    NonFinite,
    NonFiniteRule,
    Stop,
    all_finite,
    check_advantages,
    check_latents,
    check_scores,
    terms,
)
from framework.optimization import AdamW
from framework.policies import BEHAVIOUR, FrozenViews, Policies
from framework.records import Endpoints, Record
from framework.reference import Frozen, ReferenceSchedule, advance_reference, shift_metrics
from framework.rng import Streams
from framework.rollout import check_windows, device_of
from framework.types import GroupPlan, Loss, Objective, Scene, Statistics, Tape

COUNTS = ("steps_done", "updates_done", "samples_seen")
STATEFUL = ("policies", "torch_optimizer", "regularizer", "reference", "reward", "advantage", "nonfinite")
"""Fields of a trainer that remember something from step to step."""


@dataclass
class Trainer:
    """What one step needs. ``keep`` holds the record types that the parts read.

    checksum_every: steps between comparisons of the policies over the ranks of the world, 0 for never. groups_at_once:
    groups that are rolled out together and scored while the next are, None for all and then scored; see `judging`.
    branches_at_once: of a group, rolled out together, None for all.
    """

    generator: StreamingGenerator
    exploration: ExplorationStrategy
    surrogate: SurrogatePolicy
    reward: RewardModel
    advantage: AdvantageRule
    regularizer: Regularizer
    policies: Policies
    optimizer: AdamW
    scenes: tuple[Scene, ...]
    keep: frozenset[type[Record]]
    seed: int
    prompts_per_step: int
    updates_per_rollout: int
    micro_batch_size: int
    reference: ReferenceSchedule = field(default_factory=Frozen)
    world: World = field(default_factory=World)
    checksum_every: int = 0
    nonfinite: NonFiniteRule = field(default_factory=Stop)
    groups_at_once: int | None = None
    branches_at_once: int | None = None

    def __post_init__(self) -> None:
        self.torch_optimizer = self.optimizer.build(self.policies.parameters.values())
        self.view_names = self.surrogate.views | self.regularizer.views
        self.steps_done = 0
        self.updates_done = 0
        self.samples_seen = 0

    @property
    def clips_per_step(self) -> int:
        """Clips that a step rolls out, anchors included."""
        streams = Streams(self.seed).at("count")
        (plan,) = self.exploration.plan(self.scenes[:1], [0], self.generator.recipe, streams)
        return self.prompts_per_step * GroupCount.of(plan).clips

    def plans_at(self, step: int) -> tuple[GroupPlan, ...]:
        """What a step rolls out, of all ranks together. Raises what `check_windows` raises."""
        scenes, groups = draw_scenes(self.scenes, step, self.prompts_per_step, self.seed)
        plans = self.exploration.plan(scenes, groups, self.generator.recipe, Streams(self.seed).at("step", step))
        check_windows(plans, self.generator.recipe)
        return tuple(plans)

    def step(self) -> Scalars:
        """One step of training, or none where something in it is not finite and ``nonfinite`` lets the run go on."""
        try:
            metrics = self.explore_judge_improve()
        except NonFinite as found:
            self.nonfinite.answer(found)
            self.torch_optimizer.zero_grad(set_to_none=True)
            self.steps_done += 1
            self.samples_seen += self.clips_per_step
            return dict(self.nonfinite.metrics())
        self.nonfinite.passed()
        return {**metrics, **self.nonfinite.metrics()}

    def explore_judge_improve(self) -> Scalars:
        """One step: roll out, score, update. Returns metrics; tensors stay on the device. Raises NonFinite."""
        streams = Streams(self.seed).at("step", self.steps_done)
        clock, recipe = Stopwatch(), self.generator.recipe

        # Explore: how do the branches of each group differ?
        plans = self.plans_at(self.steps_done)
        share, whole = self.world.share(plans), Tape(plans, {})
        with Judging(self.generator, self.reward, self.groups_at_once, self.branches_at_once) as judging:
            with self.policies.use(BEHAVIOUR):
                tape = judging.roll_out(share.plans, self.exploration.kernel, self.keep)
            check_latents(not self.world.any(not all_finite(tape[Endpoints].latents)), self.steps_done)
            clock.lap("rollout_s")

            # Judge: which branches were better than their siblings?
            scores = self.world.gather_scores(judging.scores(), len(whole.groups))
        judged = self.reward.settle(scores, whole.groups)
        check_scores(judged, self.steps_done)
        advantage = self.advantage(judged, whole.groups, whole.anchors)
        check_advantages(advantage, self.steps_done)
        marks = self.regularizer.prepare(judged, whole.groups, whole.anchors)
        active = int(advantage.active.sum())
        device = device_of(self.generator)
        on_device = share.of(advantage).to(device)
        paying = None if marks is None else marks.per_clip[share.rows].to(device)
        clock.lap("reward_s")

        # Improve: towards the better ones, not too far.
        def judge(statistics: Statistics, rows: Tensor) -> Objective:
            part = on_device[rows]
            loss = self.surrogate.objective(statistics, part)
            chosen = None if paying is None else paying[rows]
            return combine(loss, self.regularizer.penalty(loss, chosen), part.active, chosen)

        loss = Loss(self.view_names, self.surrogate.statistics, judge, self.surrogate.coupled)
        metrics: Scalars = {}
        frozen = FrozenViews(reused=self.surrogate.fixed_probes and self.updates_per_rollout > 1)
        for update in range(self.updates_per_rollout if active else 0):
            metrics = {}
            frozen.rewind()
            for probes in self.surrogate.probes(tape, recipe, streams.at("probes", update)):
                add_scalars(metrics, self.policies.backward(loss, probes, self.micro_batch_size, active, frozen))
            metrics = self.world.sum_update(metrics, self.policies.parameters)
            metrics |= self.optimizer.step(
                self.torch_optimizer, self.policies.parameters, self.updates_done, terms(metrics)
            )
            self.policies.stepped()
            self.updates_done += 1
        self.policies.advance(self.steps_done)
        metrics |= advance_reference(self.reference, self.policies, metrics)
        metrics |= {} if marks is None else marks.metrics
        clock.lap("update_s")

        self.steps_done += 1
        self.samples_seen += len(whole.groups)
        if self.checksum_every and self.steps_done % self.checksum_every == 0:
            self.world.check_equal(self.policies.tensors(), f"step {self.steps_done}")
        measured = collect_metrics(metrics, scores, judged.values, advantage, active, clock.laps | judging.laps)
        return {**measured, **self.reward.metrics()}

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on beside the parts' parameters and the frozen weights."""
        counts = {name: getattr(self, name) for name in COUNTS}
        stateful = {name: getattr(self, name).state_dict() for name in STATEFUL}
        return {"counts": counts} | stateful

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`; what is missing raises KeyError."""
        for name in COUNTS:
            setattr(self, name, state["counts"][name])
        for name in STATEFUL:
            getattr(self, name).load_state_dict(state[name])


def combine(loss: Objective, penalty: Tensor, active: Tensor, marks: Tensor | None = None) -> Objective:
    """Policy term plus penalty, zero for inactive clips: a gated clip must not move the policy through its penalty."""
    gate = active.to(loss.per_clip)
    measured = {"policy_loss": loss.per_clip, "penalty": penalty, **loss.metrics, **shift_metrics(loss, marks)}
    metrics = {name: value * gate for name, value in measured.items()}
    return Objective((loss.per_clip + penalty) * gate, loss.written, metrics)
