"""The root that distils a few-step student on its own rollouts: resumable, the same every time, judged twice."""

from functools import partial
from pathlib import Path

from framework.arguments import check_counts
from framework.block_weights import BlockWeights
from framework.checkpoint import Checkpoints
from framework.commands.resumption import open_run, resume_command
from framework.commands.training_run import TrainingRun, log_evaluation
from framework.devices import prepare
from framework.distillation_interfaces import DistributionGradient, ScoreLevels, StudentHistory
from framework.distiller import Distiller
from framework.evaluation import HeldOut, evaluation_plans
from framework.interfaces import StreamingGenerator
from framework.interruption import Interruption
from framework.kernels import Consistency
from framework.optimization import AdamW
from framework.records import Predictions
from framework.reporting.progress import say
from framework.reporting.summary import RunReport, control_lines, write_report
from framework.rng import check_seed
from framework.rollout import roll_out
from framework.selfchecks import check_replay
from framework.weights import save_tensors, start_hash

STUDENT = "student.safetensors"


def distill(
    *,
    generator: StreamingGenerator,
    teacher: StreamingGenerator,
    critic: StreamingGenerator,
    history: StudentHistory,
    gradient: DistributionGradient,
    levels: ScoreLevels,
    weights: BlockWeights,
    optimizer: AdamW,
    critic_optimizer: AdamW,
    evaluation: HeldOut,
    output_dir: str | None = None,
    seed: int = 0,
    max_steps: int = 260,
    batch_size: int = 16,
    critic_warmup: int = 0,
    generator_every: int = 1,
    average_decay: float = 0.97,
    history_grad: bool = True,
    checkpoint_every: int = 50,
    keep_checkpoints: int = 2,
    replay_tolerance: float = 1e-3,
    device: str = "cpu",
    threads: int | None = None,
    resume: str = "auto",
    dry_run: bool = False,
    operative_config: str = "",
) -> Path | None:
    """Distil a student; returns the run folder with ``student.safetensors``, or None for a dry run.

    generator: the student, from the weights it starts with. teacher: what it is to be like. critic: a network of its
    own that learns what the student makes. history: the clean past that the student is asked behind.
    gradient: where two scores move it. levels: at which noise they are asked. weights: of the blocks in its loss.
    output_dir: a new folder, None for a fresh one under runs/. max_steps: rollouts, each one critic update.
    batch_size: clips of a rollout. critic_warmup: critic updates before the student's first. generator_every: critic
    updates per student update after that. average_decay: of the averaged weights, which are the result.
    history_grad: whether gradient reaches the student through the encoding of its clean past too.
    checkpoint_every: steps between checkpoints. keep_checkpoints: how many stay. replay_tolerance: relative; see
    `selfchecks`. threads: CPU threads, None for torch's choice. resume: "auto" also continues the unfinished run that
    output_dir holds, "never" takes a new folder only, a path continues from that checkpoint. dry_run: build everything,
    check it, do one step, write nothing. Every step depends on (seed, step), so a resumed run and an uninterrupted one
    give the same bytes.
    """
    check_counts(
        "distill.", max_steps=max_steps, batch_size=batch_size, generator_every=generator_every,
        checkpoint_every=checkpoint_every, keep_checkpoints=keep_checkpoints,
    )  # fmt: skip
    check_seed(seed, "distill.seed")
    if critic_warmup < 0 or not 0 <= average_decay < 1:
        raise ValueError(
            f"distill.critic_warmup must be at least 0 and average_decay lie in [0, 1), got {critic_warmup} "
            f"and {average_decay}"
        )
    for role in (generator, teacher, critic):
        prepare(role.network, device, threads)
    distiller = Distiller(
        generator, teacher, critic, history, gradient, levels, weights, optimizer, critic_optimizer, seed, batch_size,
        critic_warmup, generator_every, average_decay, history_grad,
    )  # fmt: skip
    for line in start_lines(distiller, evaluation, max_steps, replay_tolerance):
        say(line)
    if dry_run:
        distiller.step()
        say(f"dry run: one step done, nothing written; {max_steps} steps would roll out {max_steps * batch_size} clips")
        return None

    start = open_run(
        "distill", output_dir, resume, operative_config, partial(Checkpoints, keep=keep_checkpoints), max_steps
    )
    folder, origin = start.folder, start_hash(generator.network, teacher.network, critic.network)
    start.check_weights(origin)
    with Interruption(resume_command("distill", folder, operative_config)) as stop, start.log() as log:
        run = TrainingRun(
            distiller, partial(evaluation.judge, generator), distiller.averaged, evaluation.every, checkpoint_every,
            log, start.checkpoints, stop, operative_config, origin,
        )  # fmt: skip
        before = run.begin(start)
        run.train(max_steps, "distilling")
        with distiller.averaged():
            save_tensors(folder / STUDENT, generator.network.state_dict(), metadata={"recipe": generator.recipe.name})
            after = evaluation.judge(generator, "held-out evaluation after")
        log_evaluation(log, max_steps, distiller.samples_seen, after)
        log.videos("samples/video", max_steps, after.videos.frames[:8], after.videos.fps)
        controls = tuple(control_lines(evaluation))
        samples = distiller.samples_seen
        write_report(RunReport(folder, before, after, run.spent, samples, max_steps, controls, STUDENT, run.earlier))
    say(f"saved to {folder}")
    return folder


def start_lines(distiller: Distiller, evaluation: HeldOut, max_steps: int, tolerance: float) -> list[str]:
    """What a run proves and says before it starts. Raises what the checks raise."""
    generator = distiller.generator
    recipe = generator.recipe
    plans = evaluation_plans(evaluation.scenes.scenes()[:1], 2, distiller.seed, recipe.clip_blocks)
    replay = check_replay(generator, roll_out(generator, plans, Consistency(), frozenset({Predictions})), tolerance)
    updates = max(0, max_steps - distiller.critic_warmup) // distiller.generator_every
    frames = [recipe.block_frames] * recipe.clip_blocks
    return [
        f"updates: {max_steps} of the critic, {updates} of the student, "
        f"{'attached' if distiller.history_grad else 'detached'} history of {type(distiller.history).__name__}",
        f"sampler: σ {', '.join(f'{sigma:.4f}' for sigma in recipe.schedule.sigmas)}; "
        f"block weights {', '.join(f'{w:.3f}' for w in distiller.weights(frames))}",
        replay,
    ]
