"""The root that gin configures: build a run from parts, prove what can be proved before it starts, train, report."""

import time
from pathlib import Path

from framework.accounting import Scalars
from framework.adapters import Adaptation
from framework.compatibility import check_recipe, check_reference, check_signals
from framework.data.scenes import SceneSource, draw_scenes
from framework.devices import prepare
from framework.evaluation import EvaluationResult, HeldOut, decode_tape
from framework.interfaces import (
    AdvantageRule,
    ExplorationStrategy,
    Regularizer,
    RewardModel,
    Schedule,
    StreamingGenerator,
    SurrogatePolicy,
)
from framework.optimization import AdamW
from framework.policies import AVERAGE, BEHAVIOUR, Policies
from framework.records import Predictions
from framework.reference import Frozen, ReferenceSchedule
from framework.reporting.memory import write_memory
from framework.reporting.metrics import MetricsLogger
from framework.reporting.progress import progress, say
from framework.reporting.runfolder import create_run_folder, fresh_folder, write_run_files
from framework.reporting.summary import RunReport, control_lines, write_report
from framework.rng import Streams
from framework.rollout import canonical, roll_out
from framework.selfchecks import check_replay
from framework.trainer import Trainer


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
    seed: int = 0,
    max_steps: int = 60,
    prompts_per_step: int = 6,
    updates_per_rollout: int = 1,
    micro_batch_size: int = 48,
    average_decay: float = 0.9,
    reference: ReferenceSchedule | None = None,
    replay_tolerance: float = 1e-3,
    device: str = "cpu",
    threads: int | None = None,
    dry_run: bool = False,
    operative_config: str = "",
) -> Path | None:
    """Align a generator with a reward; returns the run folder, or None for a dry run.

    output_dir: a new folder, None for a fresh one under runs/. adaptation: what is trained.
    behaviour_decay: how far the rollout policy lags behind. scenes: what RL trains on. evaluation: what judges it.
    prompts_per_step: groups P of a step, each of the exploration's group size.
    updates_per_rollout: optimiser steps on one rollout. micro_batch_size: clips per backward pass; changes no result.
    average_decay: of the averaged weights that are evaluated and saved. reference: when the reference policy moves,
    None for never. replay_tolerance: relative; see `selfchecks`.
    threads: CPU threads, None for torch's choice. dry_run: build everything, check it, train one step, write nothing.
    """
    for name, value in (("max_steps", max_steps), ("updates_per_rollout", updates_per_rollout),
                        ("micro_batch_size", micro_batch_size)):  # fmt: skip
        if value < 1:
            raise ValueError(f"train.{name} must be at least 1, got {value}")
    keep = check_recipe(exploration, surrogate, advantage, regularizer)
    reference = reference or Frozen()
    check_reference(reference, surrogate, regularizer)
    check_signals(regularizer, reward)
    train_scenes, judged = scenes.scenes(), evaluation.scenes.scenes()
    shared = {s.segments for s in train_scenes} & {s.segments for s in judged}
    if shared:
        example = min(segments[0].prompt for segments in shared)
        raise ValueError(f"{len(shared)} prompts are both trained on and judged, e.g. {example!r}; "
                         f"change train.scenes or HeldOut.scenes")  # fmt: skip
    draw_scenes(train_scenes, 0, prompts_per_step, seed)
    prepare(generator.network, device, threads)
    policies = Policies(generator, adaptation, behaviour_decay, average_decay, seed)
    trainer = Trainer(
        generator, exploration, surrogate, reward, advantage, regularizer, policies, optimizer, train_scenes, keep,
        seed, prompts_per_step, updates_per_rollout, micro_batch_size, reference,
    )  # fmt: skip
    for line in start_lines(trainer, replay_tolerance):
        say(line)
    if dry_run:
        trainer.step()
        say(f"dry run: one step done, nothing written; {max_steps} steps would train on "
            f"{max_steps * trainer.clips_per_step} clips")  # fmt: skip
        return None

    folder = create_run_folder(fresh_folder("train") if output_dir is None else output_dir)
    write_run_files(folder, operative_config)
    with MetricsLogger(folder) as log:
        log.text("config/operative", operative_config)
        before = evaluation.judge(generator, description="held-out evaluation before")
        log_evaluation(log, 0, 0, before)
        started = time.process_time()
        spent = 0.0
        for step in progress(range(max_steps), "training"):
            metrics = trainer.step()
            spent += time.process_time() - started
            log.log(step + 1, metrics | {"time/core_s": spent}, samples_seen=trainer.samples_seen)
            if evaluation.every and (step + 1) % evaluation.every == 0 and step + 1 < max_steps:
                with policies.use(AVERAGE):
                    middle = evaluation.judge(generator, "held-out curve")
                log_evaluation(log, step + 1, trainer.samples_seen, middle)
            started = time.process_time()
        with policies.use(AVERAGE):
            adaptation.save(generator.network, folder / "adapter")
            after = evaluation.judge(generator, description="held-out evaluation after")
        log_evaluation(log, max_steps, trainer.samples_seen, after)
        log.videos("samples/video", max_steps, after.videos.frames[:8], after.videos.fps)
    write_memory(folder)
    controls = tuple(control_lines(evaluation))
    write_report(RunReport(folder, before, after, spent, trainer.samples_seen, max_steps, controls))
    return folder


def log_evaluation(log: MetricsLogger, step: int, samples: int, result: EvaluationResult) -> None:
    """Held-out rewards under their tags."""
    values: Scalars = {f"eval/reward/{name}": value.nanmean() for name, value in result.scores.items()}
    values["eval/reward/total"] = result.total.nanmean()
    values["eval/members"] = result.total.shape[1]
    log.log(step, values, samples_seen=samples)


def start_lines(trainer: Trainer, tolerance: float) -> list[str]:
    """What a run proves and says before it starts. Raises what the checks raise."""
    policies, generator = trainer.policies, trainer.generator
    trained = sum(p.numel() for p in policies.parameters.values())
    total = sum(p.numel() for p in generator.network.parameters())
    plans = trainer.exploration.plan(trainer.scenes[:1], [0], generator.recipe, Streams(trainer.seed).at("selfcheck"))
    with policies.use(BEHAVIOUR):
        tape = roll_out(generator, plans, trainer.exploration.kernel, trainer.keep)
        visited = roll_out(generator, canonical(plans), trainer.exploration.kernel, frozenset({Predictions}))
        replay = check_replay(generator, visited, tolerance)
    # what only a rollout can show to be wrong is better found now than after the first evaluation
    trainer.advantage(trainer.reward.score(decode_tape(generator, tape)), tape.groups, tape.anchors)
    for probes in trainer.surrogate.probes(tape, generator.recipe, Streams(trainer.seed).at("selfcheck")):
        list(probes.split(trainer.micro_batch_size))
    group, kernel, schedule = trainer.exploration.group_size, trainer.exploration.kernel, generator.recipe.schedule
    return [
        f"trainable: {trained:,} of {total:,} parameters ({100 * trained / total:.1f} %), "
        f"{trainer.policies.adaptation.describe(policies.parameters)}",
        f"step: {trainer.prompts_per_step} prompts × {group} branches = {trainer.clips_per_step} clips, "
        f"micro-batches of {min(trainer.micro_batch_size, trainer.clips_per_step)}, "
        f"{trainer.updates_per_rollout} update(s) per rollout",
        f"sampler: σ {', '.join(f'{sigma:.4f}' for sigma in schedule.sigmas)}; "
        f"std of its steps {', '.join(f'{kernel.std(*pair):.4f}' for pair in schedule.transitions)}",
        replay,
    ]
