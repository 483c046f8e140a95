"""The root that gin configures: build a run from parts, prove what can be proved before it starts, train, report."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from framework.adapters import Adaptation
from framework.arguments import check_counts
from framework.checkpoint import Checkpoints
from framework.commands.ranks import NoLog, open_run_together
from framework.commands.resumption import resume_command
from framework.commands.training_run import TrainingRun, log_evaluation
from framework.compatibility import check_recipe, check_reference, check_signals, check_updates
from framework.data.scenes import SceneSource, draw_scenes
from framework.devices import META, prepare
from framework.distributed import Distribution, current_world, on_every_rank
from framework.evaluation import HeldOut, decode_tape
from framework.interfaces import (
    AdvantageRule,
    ExplorationStrategy,
    Regularizer,
    RewardModel,
    Schedule,
    StreamingGenerator,
    SurrogatePolicy,
)
from framework.interruption import Interruption
from framework.judging import check_available, scored
from framework.nonfinite import NonFiniteRule, Stop
from framework.optimization import AdamW
from framework.policies import AVERAGE, BEHAVIOUR, Policies
from framework.records import Predictions
from framework.reference import Frozen, ReferenceSchedule
from framework.reporting.memory import write_memory
from framework.reporting.mirrors import Mirror
from framework.reporting.progress import say
from framework.reporting.summary import RunReport, control_lines, write_report
from framework.rng import Streams, check_seed
from framework.rollout import canonical, check_routes, roll_out
from framework.run_shape import StepParts, describe_step, plan_lines
from framework.selfchecks import check_ratio, check_replay
from framework.trainer import Trainer
from framework.types import Scene, Scores
from framework.weights import start_hash


@on_every_rank
def train(
    *,
    generator: StreamingGenerator,
    exploration: ExplorationStrategy,
    surrogate: SurrogatePolicy,
    reward: RewardModel,
    advantage: AdvantageRule,
    regularizer: Regularizer,
    adaptation: Adaptation,
    optimizer: AdamW,
    behaviour_decay: Schedule,
    scenes: SceneSource,
    evaluation: HeldOut,
    output_dir: str | None = None,
    resume: str = "auto",
    checkpoint_every: int = 10,
    keep_checkpoints: int = 2,
    seed: int = 0,
    max_steps: int = 60,
    prompts_per_step: int = 6,
    updates_per_rollout: int = 1,
    micro_batch_size: int = 48,
    groups_at_once: int | None = None,
    branches_at_once: int | None = None,
    average_decay: float = 0.9,
    reference: ReferenceSchedule | None = None,
    replay_tolerance: float = 1e-3,
    device: str = "cpu",
    threads: int | None = None,
    distribution: Distribution | None = None,
    nonfinite: NonFiniteRule | None = None,
    mirrors: Sequence[Mirror] = (),
    dry_run: bool = False,
    operative_config: str = "",
) -> Path | None:
    """Align a generator with a reward; returns the run folder, or None for a dry run.

    output_dir: a new folder, None for a fresh one under runs/. resume: "auto" also continues the unfinished run that
    output_dir holds, "never" takes a new folder only, a path continues from that checkpoint; see `resumption`.
    checkpoint_every: steps between checkpoints. keep_checkpoints: how many stay. adaptation: what is trained.
    behaviour_decay: how far the rollout policy lags behind. scenes: what RL trains on. evaluation: what judges it.
    prompts_per_step: groups P of a step, each of the exploration's group size.
    updates_per_rollout: optimiser steps on one rollout. micro_batch_size: clips per backward pass; changes no result.
    groups_at_once: groups rolled out together, and scored while the next ones are; None: all, then scored.
    branches_at_once: branches of a group rolled out together, None for all; fewer need less memory.
    average_decay: of the averaged weights that are evaluated and saved. reference: when the reference policy moves,
    None for never. replay_tolerance: relative; see `selfchecks`.
    threads: CPU threads, None for torch's choice. distribution: how the ranks work together that torchrun started, if
    it did. nonfinite: what NaN or infinity in a step leads to, None to stop. mirrors: where scalars are shown beside
    metrics.jsonl and TensorBoard. dry_run: build everything, check it, train one step, write nothing; with device
    "meta" no weights are read and no step is taken, and sizes, memory and files are told.
    """
    check_counts(
        "train.", max_steps=max_steps, updates_per_rollout=updates_per_rollout, micro_batch_size=micro_batch_size,
        checkpoint_every=checkpoint_every, keep_checkpoints=keep_checkpoints, groups_at_once=groups_at_once,
        branches_at_once=branches_at_once,
    )  # fmt: skip
    world, distribution = current_world(), distribution or Distribution()
    world.check_text(operative_config, "the configuration")
    check_seed(seed, "train.seed")
    if not 0 <= average_decay < 1:
        raise ValueError(f"train.average_decay must lie in [0, 1), got {average_decay}")
    if not 0 <= replay_tolerance < float("inf"):
        raise ValueError(f"train.replay_tolerance must be 0 or more and finite, got {replay_tolerance}")
    keep = check_recipe(exploration, surrogate, advantage, regularizer)
    reference = reference or Frozen()
    check_reference(reference, surrogate, regularizer)
    if device != META:
        check_available(reward, evaluation.reward)
    check_signals(regularizer, reward)
    check_updates(surrogate, updates_per_rollout, behaviour_decay, max_steps)
    train_scenes, judged = scenes.scenes(), evaluation.scenes.scenes()
    check_apart(train_scenes, judged)
    draw_scenes(train_scenes, 0, prompts_per_step, seed)
    if device == META and dry_run:
        parts = StepParts(
            generator, exploration, surrogate, regularizer, train_scenes, keep, seed, prompts_per_step,
            updates_per_rollout, micro_batch_size, groups_at_once, branches_at_once,
        )  # fmt: skip
        check_routes(generator, parts.first_plan(), train_scenes)
        for line in plan_lines(parts, adaptation):
            say(line)
        say("dry run without weights: no self-check and no step, which need numbers; nothing written")
        return None
    prepare(generator.network, device, threads)
    policies = Policies(generator, adaptation, behaviour_decay, average_decay, seed)
    world.check_equal(dict(generator.network.named_parameters()), "the start")
    weights = start_hash(generator.network)
    if distribution.shard_base:
        from framework.sharding import check_symmetric, shard_base  # takes a second to import

        check_symmetric(train_scenes, generator.recipe.block_frames)
        check_symmetric(judged, generator.recipe.block_frames)
        policies.spread(partial(shard_base, generator, world))
    trainer = Trainer(
        generator, exploration, surrogate, reward, advantage, regularizer, policies, optimizer, train_scenes, keep,
        seed, prompts_per_step, updates_per_rollout, micro_batch_size, reference, world, distribution.checksum_every,
        nonfinite or Stop(), groups_at_once, branches_at_once,
    )  # fmt: skip
    for step in range(max_steps) if generator.recipe.first_schedule is not None else ():
        trainer.plans_at(step)  # a window that is drawn may start at block 0 in one step of many
    for line in start_lines(trainer, replay_tolerance):
        say(line)
    if dry_run:
        trainer.step()
        say(f"dry run: one step done, nothing written; {max_steps} steps would train on "
            f"{max_steps * trainer.clips_per_step} clips")  # fmt: skip
        return None

    ranks = {"rank": world.rank, "world": world.size, "barrier": partial(world.most, 0)}
    store = partial(Checkpoints, keep=keep_checkpoints, **ranks)
    start = open_run_together(world, "train", output_dir, resume, operative_config, store, max_steps)
    start.check_weights(weights)
    folder, own_log = start.folder, start.log() if world.first else NoLog()
    with Interruption(resume_command("train", folder, operative_config), world.most) as stop, own_log as log:
        log.mirror_to(mirrors, operative_config)
        run = TrainingRun(
            trainer, partial(evaluation.judge, generator, world=world), partial(policies.use, AVERAGE),
            evaluation.every, checkpoint_every, log, start.checkpoints, stop, operative_config, weights,
        )  # fmt: skip
        before = run.begin(start)
        run.train(max_steps, "training")
        with policies.use(AVERAGE):
            adaptation.save(generator.network, folder / "adapter", write=world.first)
            after = evaluation.judge(generator, "held-out evaluation after", world)
        if not world.first:
            return folder
        log_evaluation(log, max_steps, trainer.samples_seen, after)
        log.videos("samples/video", max_steps, after.videos.frames[:8], after.videos.fps)
        write_memory(folder)
        controls = tuple(control_lines(evaluation))
        samples = trainer.samples_seen
        write_report(
            RunReport(folder, before, after, run.spent, samples, max_steps, controls, earlier_core_s=run.earlier)
        )
    return folder


def check_apart(trained: Sequence[Scene], judged: Sequence[Scene]) -> None:
    """Raises ValueError where a scene is both trained on and judged."""
    shared = {scene.segments for scene in trained} & {scene.segments for scene in judged}
    if shared:
        example = min(segments[0].prompt for segments in shared)
        raise ValueError(
            f"{len(shared)} prompts are both trained on and judged, e.g. {example!r}; change train.scenes or "
            f"HeldOut.scenes"
        )


def check_settled(regularizer: Regularizer, judged: Scores) -> None:
    """Raises ValueError where the reward's failure policy keeps from learning all signals, or one that the regularizer
    reads."""
    if not judged.values:
        raise ValueError(
            "a step has no reward signal to learn from: failure.SkipComponent only shows its signals; take it away, "
            "use failure.Mask, or put another reward beside it in composite.CompositeReward"
        )
    kept = sorted(regularizer.signals - set(judged.values))
    if kept:
        raise ValueError(
            f"{type(regularizer).__name__} reads the reward signals {kept}, which a step does not learn from: "
            f"failure.SkipComponent only shows its signals; take it away or use failure.Mask"
        )


def start_lines(trainer: Trainer, tolerance: float) -> list[str]:
    """What a run proves and says before it starts. Raises what the checks raise."""
    policies, generator = trainer.policies, trainer.generator
    plans = trainer.exploration.plan(trainer.scenes[:1], [0], generator.recipe, Streams(trainer.seed).at("selfcheck"))
    check_routes(generator, plans[0], trainer.scenes)
    with policies.use(BEHAVIOUR):
        kernel, at_once = trainer.exploration.kernel, trainer.branches_at_once
        tape = roll_out(generator, plans, kernel, trainer.keep, at_once)
        visited = roll_out(generator, canonical(plans), kernel, frozenset({Predictions}), at_once)
        replay = check_replay(generator, visited, tolerance, trainer.micro_batch_size)
    # what only a rollout can show to be wrong is better found now than after the first evaluation
    # all ranks score the same clips and settle what the first one found: a policy must not remember different failures
    scores = trainer.world.gather_scores(scored(trainer.reward, decode_tape(generator, tape)), len(tape.groups))
    judged = trainer.reward.settle(scores, tape.groups)
    check_settled(trainer.regularizer, judged)
    trainer.advantage(judged, tape.groups, tape.anchors)
    for probes in trainer.surrogate.probes(tape, generator.recipe, Streams(trainer.seed).at("selfcheck")):
        list(probes.split(trainer.micro_batch_size))
    streams = Streams(trainer.seed).at("selfcheck")
    ratio = check_ratio(generator, trainer.surrogate, tape, streams, trainer.micro_batch_size)
    said = describe_step(
        StepParts.of(trainer), policies.adaptation, policies.parameters, trainer.prompts_per_step, trainer.world
    )
    return [*said, replay, *ratio]
