"""A training run from its first step to its last: what it logs, when it judges, what it saves and goes on from."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from framework.accounting import Scalars
from framework.checkpoint import SHARED, Checkpoints, file_hash, rank_part, read_part, write_part
from framework.commands.ranks import NoLog
from framework.commands.resumption import Start, fitting
from framework.distributed import any_sharded
from framework.evaluation import EvaluationResult
from framework.interruption import Interruption
from framework.random_state import random_state, restore_random_state
from framework.reporting.metrics import MetricsLogger
from framework.reporting.progress import progress, say
from framework.types import VideoBatch, Window

BEFORE = "before.safetensors"
SHARDED_FILES = "shard-*.safetensors"
"""How torch.distributed.checkpoint names the files of what ranks hold in parts."""


class Steps(Protocol):
    """What is trained, one step after the other."""

    steps_done: int

    @property
    def samples_seen(self) -> int: ...
    def step(self) -> Scalars: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class TrainingRun:
    """The steps of one run.

    judge: evaluates the policy in force, described in one phrase. averaged: puts the averaged weights in force.
    judge_every: steps between points of the held-out curve, 0 for none. checkpoint_every: steps between checkpoints.
    weights: what `start_hash` says of the weights that the run starts from. spent: process time of its steps, earlier:
    of all that the processes before this one did, in core-seconds.
    """

    trained: Steps
    judge: Callable[[str], EvaluationResult]
    averaged: Callable[[], AbstractContextManager[None]]
    judge_every: int
    checkpoint_every: int
    log: MetricsLogger | NoLog
    checkpoints: Checkpoints
    stop: Interruption
    config: str
    weights: str
    spent: float = 0.0
    earlier: float = 0.0

    def __post_init__(self) -> None:
        self.folder = self.checkpoints.root.parent
        self.before_hash = ""

    def begin(self, start: Start) -> EvaluationResult:
        """Judge the start, or put everything back as the checkpoint has it; the evaluation of the start."""
        if start.shared is None:
            self.log.text("config/operative", self.config)
            before = self.judge_start()
            log_evaluation(self.log, 0, 0, before)
            self.save()
            return before
        path, before = self.folder / BEFORE, None
        with fitting(start):
            shared = start.shared
            if path.is_file() and file_hash(path) == shared["before"]:
                before, self.before_hash = result_of(read_part(path)), shared["before"]
        if before is None:
            say(f"{path} is missing or damaged; the start is judged again")
            before = self.judge_start()  # now, before the weights of the checkpoint take its place
        with fitting(start):
            self.trained.load_state_dict(sharded_again(self.trained, shared.pop("trained"), start.source))
            self.spent, self.earlier = shared["core_s"], shared["process_core_s"]
            if start.own is not None:
                restore_random_state(start.own["random"])
        return before

    def judge_start(self) -> EvaluationResult:
        """Evaluate the policy in force and keep the result with the run."""
        before = self.judge("held-out evaluation before")
        for name, value in before.scores.items():
            if failed := int((~value.isfinite()).sum()):
                raise ValueError(
                    f"the held-out evaluation before training has no {name!r} for {failed} of {value.numel()} clips, "
                    f"and no gain could be told at the end; see why HeldOut.reward cannot score them"
                )
        if self.checkpoints.rank > 0:
            return before
        staged, path = self.folder / f"{BEFORE}.partial", self.folder / BEFORE
        write_part(staged, result_state(before))
        staged.replace(path)
        self.before_hash = file_hash(path)
        return before

    def train(self, max_steps: int, description: str) -> None:
        """All steps that are left. A signal waits for the end of a step and its checkpoint."""
        for done in progress(range(self.trained.steps_done, max_steps), description):
            if self.judged_after(done):
                self.stop.check()
                with self.averaged():
                    middle = self.judge("held-out curve")
                log_evaluation(self.log, done, self.trained.samples_seen, middle)
            with self.stop.deferred():
                started = time.process_time()
                metrics = self.trained.step()
                self.spent += time.process_time() - started
                self.log.log(done + 1, metrics | {"time/core_s": self.spent}, samples_seen=self.trained.samples_seen)
                due = (done + 1) % self.checkpoint_every == 0 or self.judged_after(done + 1) or done + 1 == max_steps
                if self.stop.poll() or due:
                    self.save()
        self.stop.check()

    def judged_after(self, step: int) -> bool:
        """Whether the held-out curve has a point there; a run that goes on from that step makes it again."""
        return step > 0 and self.judge_every > 0 and step % self.judge_every == 0

    def save(self) -> None:
        """Write a checkpoint of where the run stands."""
        parts: dict[str, Any] = {rank_part(self.checkpoints.rank): {"random": random_state()}}
        trained, together = apart(self.trained)
        if self.checkpoints.rank == 0:
            parts[SHARED] = {
                "trained": trained,
                "core_s": self.spent,
                "process_core_s": self.earlier + time.process_time(),
                "log": self.log.position(),
                "before": self.before_hash,
                "weights": self.weights,
            }
        path = self.checkpoints.write(self.trained.steps_done, parts, self.config, together)
        self.stop.saved = f"saved {path}"


def apart(trained: Steps) -> tuple[dict[str, Any], Callable[[Path], None] | None]:
    """The state of what is trained, and who writes the part of it that is sharded, None where nothing is."""
    state = trained.state_dict()
    if not any_sharded(state):
        return state, None
    from framework.sharded_state import parted, write_sharded  # takes a second to import

    rest, tensors = parted(state)
    return rest, partial(write_sharded, tensors=tensors)


def sharded_again(trained: Steps, state: dict[str, Any], source: Path | None) -> dict[str, Any]:
    """A state as `apart` left it, with what was written apart, sharded as what is trained is now."""
    now = trained.state_dict()
    if source is None or not (any_sharded(now) or any(source.glob(SHARDED_FILES))):
        return state
    from framework.sharded_state import mesh_of, restored

    return restored(state, source, mesh_of(now))


def log_evaluation(log: MetricsLogger | NoLog, step: int, samples: int, result: EvaluationResult) -> None:
    """Held-out rewards under their tags."""
    values: Scalars = {f"eval/reward/{name}": value.nanmean() for name, value in result.scores.items()}
    values["eval/reward/total"] = result.total.nanmean()
    values["eval/members"] = result.total.shape[1]
    log.log(step, values, samples_seen=samples)


def result_state(result: EvaluationResult) -> dict[str, Any]:
    """An evaluation as a checkpoint can hold it."""
    windows = [[(window.start, window.stop, window.prompt) for window in clip] for clip in result.videos.windows]
    return {"scores": result.scores, "frames": result.videos.frames, "fps": result.videos.fps, "windows": windows}


def result_of(state: dict[str, Any]) -> EvaluationResult:
    """The evaluation of `result_state`."""
    windows = tuple(tuple(Window(*window) for window in clip) for clip in state["windows"])
    return EvaluationResult(state["scores"], VideoBatch(state["frames"], state["fps"], windows))
