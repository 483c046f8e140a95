"""The root that makes a few-step generator from data: stages one after the other, resumable, the same every time."""

import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from framework.arguments import check_counts
from framework.checkpoint import SHARED, CheckpointError, Checkpoints, rank_part
from framework.commands.resumption import Start, fitting, open_run, resume_command
from framework.devices import prepare
from framework.distillation_interfaces import ClipSource, PretrainingStage
from framework.evaluation import HeldOut
from framework.interfaces import StreamingGenerator
from framework.interruption import Interruption
from framework.random_state import random_state, restore_random_state
from framework.reporting.metrics import MetricsLogger
from framework.reporting.progress import progress, say
from framework.reporting.runfolder import FINISHED
from framework.reporting.summary import control_lines, headroom, score_line
from framework.rng import Streams
from framework.weights import save_tensors


def pretrain(
    *,
    generator: StreamingGenerator,
    data: ClipSource,
    stages: Sequence[PretrainingStage],
    evaluation: HeldOut,
    output_dir: str,
    seed: int = 0,
    checkpoint_every: int = 100,
    keep_checkpoints: int = 2,
    resume: str = "auto",
    threads: int | None = None,
    operative_config: str = "",
) -> Path:
    """Run all stages, evaluate after each, write ``<stage>.safetensors``; returns the run folder.

    The generator's fresh weights are drawn from ``seed``, and every step from (seed, stage, step), so a resumed run
    and an uninterrupted one give the same weights. checkpoint_every: steps between checkpoints. keep_checkpoints: how
    many stay. resume: "auto" also continues the unfinished run that output_dir holds, "never" takes a new folder only,
    a path continues from that checkpoint. It runs on the CPU.
    """
    names = [stage.name for stage in stages]
    if len(set(names)) != len(names) or not names:
        raise ValueError(f"pretrain.stages need distinct names, got {names}")
    prepare(generator.network, "cpu", threads)
    check_counts("pretrain.", checkpoint_every=checkpoint_every, keep_checkpoints=keep_checkpoints)
    start = open_run("pretrain", output_dir, resume, operative_config, partial(Checkpoints, keep=keep_checkpoints))
    folder = start.folder
    initialise(generator, seed)
    for line in control_lines(evaluation):
        say(line)
    starts = [sum(stage.steps for stage in stages[:i]) for i in range(len(stages))]
    with Interruption(resume_command("pretrain", folder, operative_config)) as stop, start.log() as log:
        position = Position(generator, tuple(stages), log, stop, operative_config, start)
        for index, stage in enumerate(stages):
            if index < position.stage:
                continue
            stage.begin(generator)
            if not position.enter(index):
                position.save()  # what came before is judged and logged: a resumed run starts here
            for step in progress(range(position.step, stage.steps), stage.name):
                with stop.deferred():
                    started = time.process_time()
                    metrics = stage.step(generator, data, Streams(seed).at(stage.name, step), step)
                    position.step, position.core_s = step + 1, position.core_s + time.process_time() - started
                    if (step + 1) % 10 == 0:
                        values = {f"{stage.name}/{name}": value for name, value in metrics.items()}
                        seen = starts[index] + step + 1
                        log.log(seen, values | {"time/core_s": position.core_s}, samples_seen=seen)
                    if stop.poll() or (step + 1) % checkpoint_every == 0:
                        position.save()
            stage.finish(generator)
            path = folder / f"{stage.name}.safetensors"
            save_tensors(path, generator.network.state_dict(), metadata={"recipe": generator.recipe.name})
            result = evaluation.judge(generator, description=f"evaluating {stage.name}")
            say(score_line(f"{stage.name} ({position.core_s:.0f} core-s)", result))
            say(f"{stage.name}: best of {evaluation.members} minus mean {headroom(result):.3f}")
            seen = starts[index] + stage.steps
            log.log(seen, {f"eval/{stage.name}/{k}": v.mean() for k, v in result.scores.items()}, samples_seen=seen)
    (folder / FINISHED).write_text(json.dumps({"steps": starts[-1] + stages[-1].steps}) + "\n", encoding="utf-8")
    say(f"saved to {folder}")
    return folder


def initialise(generator: StreamingGenerator, seed: int) -> None:
    """Draw fresh weights from the seed, whatever the process drew before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in generator.network.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv3d):
                module.reset_parameters()
        for name, parameter in generator.network.named_parameters():
            if name.endswith("scale_shift_table"):
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)


class Position:
    """Where a run stands: stage, step, core-seconds of the stage; with the weights and the stage's own state it is
    what a checkpoint holds."""

    def __init__(
        self, generator: StreamingGenerator, stages: tuple[PretrainingStage, ...], log: MetricsLogger,
        stop: Interruption, config: str, start: Start,
    ) -> None:  # fmt: skip
        self.generator, self.stages, self.log, self.stop, self.config = generator, stages, log, stop, config
        self.start = start
        self.stage = self.step = 0
        self.core_s = 0.0
        self._pending: dict | None = None
        if start.shared is None:
            log.text("config/operative", config)
        else:
            with fitting(start):
                self._restore(start.shared)

    def _restore(self, state: dict) -> None:
        """Put the network back now; the stage takes its own part in `enter`, after it was built."""
        self.stage, self.step, self.core_s = state["stage"], state["step"], state["core_s"]
        if self.stage >= len(self.stages):
            raise CheckpointError(f"saved in stage {self.stage + 1}, pretrain.stages has {len(self.stages)}")
        self._pending = state
        self.generator.network.load_state_dict(state["network"])

    def enter(self, index: int) -> bool:
        """Begin a stage at its first step, or where the loaded state left it: then True.

        Raises CheckpointError for the state of another stage.
        """
        if self._pending is None:
            self.stage, self.step, self.core_s = index, 0, 0.0
            return False
        with fitting(self.start):
            self.stages[index].load_state_dict(self._pending["stage_state"])
            if self.start.own is not None:
                restore_random_state(self.start.own["random"])
        self._pending = self.start.shared = None
        return True

    def save(self) -> None:
        """Write a checkpoint of here."""
        state = {
            "stage": self.stage,
            "step": self.step,
            "core_s": self.core_s,
            "network": self.generator.network.state_dict(),
            "stage_state": self.stages[self.stage].state_dict(),
            "log": self.log.position(),
        }
        done = sum(stage.steps for stage in self.stages[: self.stage]) + self.step
        parts = {SHARED: state, rank_part(0): {"random": random_state()}}
        self.stop.saved = f"saved {self.start.checkpoints.write(done, parts, self.config)}"
