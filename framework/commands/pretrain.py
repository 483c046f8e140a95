"""The root that makes a few-step generator from data: stages one after the other, resumable, the same every time."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import torch

from framework.devices import prepare
from framework.evaluation import HeldOut
from framework.interfaces import ClipSource, PretrainingStage, StreamingGenerator
from framework.reporting.metrics import MetricsLogger
from framework.reporting.progress import progress, say
from framework.reporting.runfolder import create_run_folder, resume_run_folder, write_run_files
from framework.reporting.summary import control_lines, headroom, score_line
from framework.rng import Streams
from framework.weights import save_tensors

STATE = "state.pt"


def pretrain(
    *,
    generator: StreamingGenerator,
    data: ClipSource,
    stages: Sequence[PretrainingStage],
    evaluation: HeldOut,
    output_dir: str,
    seed: int = 0,
    save_every: int = 100,
    resume: bool = False,
    threads: int | None = None,
    operative_config: str = "",
) -> Path:
    """Run all stages, evaluate after each, write ``<stage>.safetensors``; returns the run folder.

    The generator's fresh weights are drawn from ``seed``, and every step from (seed, stage, step), so a resumed run
    and an uninterrupted one give the same weights. save_every: steps between saved states. resume: continue the run in
    output_dir instead of starting one there, refused when the configuration differs. It runs on the CPU.
    """
    names = [stage.name for stage in stages]
    if len(set(names)) != len(names) or not names:
        raise ValueError(f"pretrain.stages need distinct names, got {names}")
    prepare(generator.network, "cpu", threads)
    folder = resume_run_folder(output_dir, STATE) if resume else create_run_folder(output_dir)
    if resume:
        check_same_run(folder, operative_config)
    initialise(generator, seed)
    position = PretrainingState(folder / STATE)
    if resume:
        position.load(generator)
        if position.stage >= len(stages):
            raise ValueError(
                f"{folder / STATE} was saved in stage {position.stage + 1}, pretrain.stages has {len(stages)}"
            )
    else:
        write_run_files(folder, operative_config)
    for line in control_lines(evaluation):
        say(line)
    starts = [sum(stage.steps for stage in stages[:i]) for i in range(len(stages))]
    with MetricsLogger(folder, resume_step=starts[position.stage] + position.step if resume else None) as log:
        for index, stage in enumerate(stages):
            if index < position.stage:
                continue
            stage.begin(generator)
            if not position.enter(index, stage):
                position.save(generator, stage)  # what came before is judged and logged: a resumed run starts here
            started = time.process_time() - position.core_s
            for step in progress(range(position.step, stage.steps), stage.name):
                metrics = stage.step(generator, data, Streams(seed).at(stage.name, step), step)
                position.step, position.core_s = step + 1, time.process_time() - started
                if (step + 1) % 10 == 0:
                    values = {f"{stage.name}/{name}": value for name, value in metrics.items()}
                    seen = starts[index] + step + 1
                    log.log(seen, values | {"time/core_s": position.core_s}, samples_seen=seen)
                if (step + 1) % save_every == 0:
                    position.save(generator, stage)
            stage.finish(generator)
            path = folder / f"{stage.name}.safetensors"
            save_tensors(path, generator.network.state_dict(), metadata={"recipe": generator.recipe.name})
            result = evaluation.judge(generator, description=f"evaluating {stage.name}")
            say(score_line(f"{stage.name} ({position.core_s:.0f} core-s)", result))
            say(f"{stage.name}: best of {evaluation.members} minus mean {headroom(result):.3f}")
            seen = starts[index] + stage.steps
            log.log(seen, {f"eval/{stage.name}/{k}": v.mean() for k, v in result.scores.items()}, samples_seen=seen)
    say(f"saved to {folder}")
    return folder


def check_same_run(folder: Path, operative_config: str, root: str = "pretrain") -> None:
    """Raises ValueError when the run in the folder was configured otherwise; its folder and save_every may differ."""
    free = (*(f"{root}.{name}" for name in ("output_dir", "resume", "save_every")), "#")

    def meaning(text: str) -> set[str]:
        return {line for line in text.splitlines() if line.strip() and not line.startswith(free)}

    recorded = folder / "config.gin"
    if not recorded.is_file():
        raise ValueError(f"output_dir={str(folder)!r} holds no config.gin, so its state is not one of `{root}`")
    changed = sorted(meaning(recorded.read_text(encoding="utf-8")) ^ meaning(operative_config))
    if changed:
        raise ValueError(
            f"output_dir={str(folder)!r} holds a run of another configuration, it differs in {changed[0]!r}"
            f"{f' and {len(changed) - 1} more lines' if len(changed) > 1 else ''}; start without --resume elsewhere"
        )


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


def save_state(path: Path, state: dict) -> None:
    """Write a state in one piece: whoever reads the path finds the old one or the new one."""
    staged = path.with_suffix(".partial")
    torch.save(state, staged)
    staged.replace(path)


@contextmanager
def reading_state(path: Path) -> Iterator[None]:
    """Whatever goes wrong with a state inside is a ValueError that names its file."""
    try:
        yield
    except (RuntimeError, LookupError, TypeError, EOFError, UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path} is not a state of this run ({reason}); give another --output_dir and no --resume"
        ) from error


class PretrainingState:
    """Where a run stands: stage, step, weights and the stage's own state, in one file that is replaced atomically."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stage = 0
        self.step = 0
        self.core_s = 0.0
        self._pending: dict | None = None

    def save(self, generator: StreamingGenerator, stage: PretrainingStage) -> None:
        state = {
            "stage": self.stage,
            "step": self.step,
            "core_s": self.core_s,
            "network": generator.network.state_dict(),
            "stage_state": stage.state_dict(),
        }
        save_state(self.path, state)

    def load(self, generator: StreamingGenerator) -> None:
        """Restore the network now; the stage takes its own part in `enter`, after it was built.

        Raises ValueError for a damaged file and for the state of another generator.
        """
        with reading_state(self.path):
            state = torch.load(self.path, weights_only=True)
            self.stage, self.step, self.core_s = state["stage"], state["step"], state["core_s"]
            self._pending = state
            generator.network.load_state_dict(state["network"])

    def enter(self, index: int, stage: PretrainingStage) -> bool:
        """Begin a stage at its first step, or where the loaded state left it: then True.

        Raises ValueError for the state of another stage.
        """
        if self._pending is None:
            self.stage, self.step, self.core_s = index, 0, 0.0
            return False
        with reading_state(self.path):
            stage.load_state_dict(self._pending["stage_state"])
        self._pending = None
        return True
