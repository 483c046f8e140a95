"""Runs that end early and go on, from the command line: signals, kill −9, damaged checkpoints, other configurations."""

import multiprocessing
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from framework.adapters import LoRA
from framework.checkpoint import Checkpoints
from framework.cli import main
from framework.commands import training_run
from framework.commands.resumption import check_same_config, checkpoint_at, resume_command
from framework.commands.runs import check_folder, train_one
from framework.commands.train import train
from framework.commands.training_run import TrainingRun
from framework.config.load import load_config, packaged_configs
from framework.evaluation import HeldOut
from framework.trainer import Trainer
from tests.framework.test_checkpoint import cut, flip, newer
from tests.resumed import (  # noqa: F401
    Died,
    check_same_run,
    die_before,
    everything,
    finish,
    lines,
    small_evaluation,
    without_pictures,
    write_numbers,
)
from tests.support import perturb, tiny_generator

SMALL = (
    "evaluation.HeldOut.members = 1",
    "evaluation.HeldOut.every = 0",
    "evaluation.HeldOut.blocks = 1",
    "held_out/scenes.ShapesCaptions.limit = 2",
    "noise_endpoint.NoiseEndpoint.window_blocks = 1",
    "noise_endpoint.NoiseEndpoint.group_size = 2",
    "adapters.LoRA.rank = 2",
    "train.prompts_per_step = 1",
    "train.checkpoint_every = 2",
)


def command(folder: Path, *more: str, steps: int = 4) -> list[str]:
    params = [word for line in SMALL for word in ("--gin_param", line)]
    return ["train", "--gin_file", "embedded/nft.gin", "--output_dir", str(folder), "--max_steps", str(steps), *params,
            *more]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happens to."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("framework.commands.train.write_report", write_numbers)
        assert main(command(folder)) == 0
    return folder


def interrupted(folder: Path, step: int, *signals: int, code: int, more: tuple[str, ...] = ()) -> None:
    """The run, with signals that arrive while a step is computed."""
    take = Trainer.step

    def step_with_signals(trainer: Trainer):
        if trainer.steps_done == step and folder.exists():
            for number in signals:
                signal.raise_signal(number)
        return take(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", step_with_signals)
        assert main(command(folder, *more)) == code


def failure(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The one line of a refused command."""
    capsys.readouterr()
    code = main(arguments)
    out, err = capsys.readouterr()
    said = [line for line in err.splitlines() if line.strip()]
    assert code == 1 and len(said) == 1 and "Traceback" not in out + err, err
    return said[0]


def steps_saved(folder: Path) -> list[str]:
    return [path.name for path in Checkpoints(folder / "checkpoints").folders()]


# signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_a_checkpoint_and_prints_the_command_that_goes_on(
    number: int, code: int, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "a run"
    interrupted(folder, 2, number, code=code)
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"stopped by {number.name}, saved {folder / 'checkpoints' / 'step-000003'}; go on with: " in said
    words = shlex.split(said.split("go on with: ")[1])
    assert words[:3] == ["python", "-m", "framework"] and main(words[3:]) == 0
    assert "after step 3" in capsys.readouterr().out
    check_same_run(folder, whole)


def test_a_second_interrupt_saves_nothing_more(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "run"
    interrupted(folder, 3, signal.SIGINT, signal.SIGINT, code=130)
    assert capsys.readouterr().err.endswith("armillary: interrupted\n") and steps_saved(folder)[-1] == "step-000002"
    assert main(command(folder)) == 0
    check_same_run(folder, whole)


def test_a_signal_during_an_evaluation_stops_at_once(whole: Path, tmp_path: Path, monkeypatch, capsys):
    folder = tmp_path / "run"
    judge = HeldOut.judge
    for place, saved in (("before", []), ("after", ["step-000002", "step-000004"])):

        def judge_with_signal(self, generator, description="", world=None, place=place):
            if description.endswith(place):
                signal.raise_signal(signal.SIGTERM)
            return judge(self, generator, description, world)

        with monkeypatch.context() as patch:
            patch.setattr(HeldOut, "judge", judge_with_signal)
            assert main(command(folder)) == 143
        assert steps_saved(folder) == saved
        assert "go on with: python -m framework train" in capsys.readouterr().err
    assert main(command(folder)) == 0
    check_same_run(folder, whole)


def test_a_signal_while_the_last_checkpoint_is_written_stops_before_the_evaluation(whole: Path, tmp_path: Path, capsys):
    folder = tmp_path / "run"
    save = TrainingRun.save

    def save_with_signal(run: TrainingRun) -> None:
        save(run)
        if run.trained.steps_done == 4:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingRun, "save", save_with_signal)
        assert main(command(folder)) == 143
    assert "step-000004; go on with" in capsys.readouterr().err and not (folder / "adapter").exists()
    assert main(command(folder)) == 0
    check_same_run(folder, whole)


@pytest.mark.slow
def test_a_scheduler_that_ends_the_process_can_start_the_printed_command(tmp_path: Path):
    folder, home = tmp_path / "run", Path(__file__).resolve().parent.parent
    words = [sys.executable, "-m", "framework", *command(folder, steps=300)]
    with subprocess.Popen(words, cwd=home, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while newest(folder) < 2:
            assert process.poll() is None
            time.sleep(0.02)
        process.terminate()
        said = process.stderr.read() if process.stderr else ""
    assert process.returncode == 143, said
    done = newest(folder)
    again = shlex.split(said.splitlines()[-1].split("go on with: ")[1])
    finished = subprocess.run(
        [sys.executable, *again[1:], "--max_steps", str(done + 1)], cwd=home, capture_output=True, text=True
    )
    assert finished.returncode == 0 and f"after step {done}" in finished.stdout, finished.stderr
    assert [line["step"] for line in lines(folder) if "train/loss" in line] == list(range(1, done + 2))


def test_the_installed_program_names_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/armillary", "train"])
    assert resume_command("train", Path("runs/it's"), "x") == (
        """armillary train --gin_file 'runs/it'"'"'s/config.gin' --output_dir 'runs/it'"'"'s' --resume auto"""
    )
    assert resume_command("train", Path("runs/a"), "") == "train(…, output_dir='runs/a', resume='auto')"


# kill −9

LONG = 70
"""Steps of the run that is killed again and again."""


def train_quietly(folder: Path, last: int) -> None:
    """One process of the chain. At step ``last`` it waits for its kill, so that no machine is too fast for the test."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    take = Trainer.step

    def step_or_wait(trainer: Trainer):
        while trainer.steps_done >= last:
            time.sleep(0.01)
        return take(trainer)

    Trainer.step = step_or_wait
    train(**chained(folder))


def chained(folder: Path) -> dict:
    """A run of many small steps."""
    evaluation = replace(small_evaluation(every=10), blocks=1)
    return everything() | {
        "output_dir": str(folder), "max_steps": LONG, "prompts_per_step": 1, "evaluation": evaluation,
        "checkpoint_every": 2, "threads": 1,
    }  # fmt: skip


def kill_chain(folder: Path, kills: int, seed: int) -> list[int]:
    """Start the run and kill it at a random point, again and again; the steps that were saved at each kill.

    Processes are forked from this one, which has imported everything; what SIGKILL does to them is what it always does.
    """
    draw = random.Random(seed)
    saved = []
    for _ in range(kills):
        first, further = newest(folder), draw.randrange(5)
        last = min(max(first, 0) + further + 4, LONG - 2)
        process = multiprocessing.get_context("fork").Process(target=train_quietly, args=(folder, last))
        process.start()
        deadline = time.monotonic() + 120
        while newest(folder) < min(first + further, last - 1) and process.is_alive():
            time.sleep(0.002)
            assert time.monotonic() < deadline, "the run makes no steps"
        time.sleep(draw.random() * 0.2)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run ended before it was killed"
        saved.append(newest(folder))
    return saved


def newest(folder: Path) -> int:
    return max((int(path.name[5:]) for path in folder.glob("checkpoints/step-*")), default=-1)


@pytest.mark.slow
def test_a_run_that_is_killed_twenty_times_ends_where_the_others_do(tmp_path: Path):
    saved = kill_chain(tmp_path / "killed", 20, seed=int(time.time()))
    assert saved == sorted(saved) and len(set(saved)) > 5, "a chain that moves"
    whole = train(**chained(tmp_path / "whole"))
    check_same_run(train(**chained(tmp_path / "killed")), whole)
    assert [line["step"] for line in lines(whole) if "train/loss" in line] == list(range(1, LONG + 1))


# which checkpoint


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """A run with checkpoints after two and four of six steps."""
    die_before(5, tmp_path / "run", everything, max_steps=6)
    assert steps_saved(tmp_path / "run") == ["step-000002", "step-000004"]
    return tmp_path / "run"


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("framework.commands.train.write_report", write_numbers)
        return finish(tmp_path_factory.mktemp("six") / "whole", everything, max_steps=6)


@pytest.mark.parametrize("named", ["checkpoints/step-000002", "."])
def test_a_path_goes_on_from_a_checkpoint_or_the_newest_of_a_run(named: str, stopped: Path, six: Path):
    finish(stopped, everything, max_steps=6, resume=str(stopped / named), output_dir=None)
    check_same_run(stopped, six)
    aside = stopped / "checkpoints" / "set-aside"
    assert [path.name for path in aside.glob("*")] == (["step-000004"] if named != "." else [])


@pytest.mark.parametrize(("harm", "cause"), [(cut, "truncated"), (flip, "damaged"), (None, "newer armillary")])
def test_a_bad_checkpoint_is_refused_and_the_offered_one_gives_the_same_end(harm, cause: str, stopped: Path, six: Path):
    last = stopped / "checkpoints" / "step-000004"
    newer(last) if harm is None else harm(last / "shared.safetensors")
    before = contents(stopped)
    with pytest.raises(ValueError, match=cause) as refused:
        finish(stopped, everything, max_steps=6)
    assert contents(stopped) == before
    offered = str(refused.value).split("--resume ")[1]
    finish(stopped, everything, max_steps=6, resume=offered)
    check_same_run(stopped, six)


def test_a_finished_run_is_extended_by_its_path_and_its_results_are_kept(tmp_path: Path, six: Path):
    folder = finish(tmp_path / "run", everything, max_steps=4)
    adapter = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"holds another run already, a finished one.*--resume .*step-000004"):
        finish(folder, everything, max_steps=6)
    finish(folder, everything, max_steps=6, resume=str(folder))
    check_same_run(folder, six)
    assert (folder / "earlier-results" / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    with pytest.raises(ValueError, match=r"is after step 6, max_steps=4; give more --max_steps"):
        finish(folder, everything, max_steps=4, resume=str(folder))


def test_the_start_is_judged_once_and_again_only_when_its_record_is_lost(stopped: Path, six: Path, monkeypatch):
    judged: list[str] = []
    judge = HeldOut.judge

    def counted(self, generator, description="", world=None):
        judged.append(description)
        return judge(self, generator, description, world)

    monkeypatch.setattr(HeldOut, "judge", counted)
    die_before(5, stopped, everything, max_steps=6)
    assert not any("before" in description for description in judged)
    flip(stopped / training_run.BEFORE)
    finish(stopped, everything, max_steps=6)
    assert sum("before" in description for description in judged) == 1
    check_same_run(stopped, six)


def test_other_weights_to_start_from_are_refused(stopped: Path):
    generator = tiny_generator(clip_blocks=2)
    perturb(generator.network, 5)
    before = contents(stopped)
    with pytest.raises(ValueError, match="it started from other weights than the configuration gives now"):
        finish(stopped, everything, max_steps=6, generator=generator)
    assert contents(stopped) == before


def test_a_state_of_another_shape_is_refused_by_its_name(stopped: Path):
    with pytest.raises(ValueError, match=r"step-000004 does not fit this run: the saved current policy does not fit"):
        finish(stopped, everything, max_steps=6, adaptation=LoRA(3))


def test_a_record_that_is_gone_is_not_begun_anew(stopped: Path):
    record = (stopped / "metrics.jsonl").read_text()
    (stopped / "metrics.jsonl").write_text(record[: len(record) // 2])
    before = contents(stopped)
    with pytest.raises(ValueError, match=r"metrics\.jsonl is not what this run wrote"):
        finish(stopped, everything, max_steps=6, resume=str(stopped / "checkpoints" / "step-000004"))
    assert contents(stopped) == before


def test_what_is_no_checkpoint_is_refused_as_a_path(stopped: Path, tmp_path: Path):
    for path in (tmp_path, tmp_path / "missing", stopped / "tb"):
        with pytest.raises(ValueError, match="is neither a run with checkpoints nor"):
            finish(stopped, everything, resume=str(path))
    with pytest.raises(ValueError, match=r"continues the run in .*run, output_dir=.*other"):
        finish(tmp_path / "other", everything, resume=str(stopped))
    assert checkpoint_at(stopped / "checkpoints" / "latest") == stopped / "checkpoints" / "step-000004"


# which folder


def test_never_takes_a_new_folder_only(stopped: Path):
    with pytest.raises(ValueError, match="holds another run already"):
        finish(stopped, everything, resume="never")


@pytest.mark.parametrize("place", ["judge_start", "save"])
def test_a_run_that_ended_before_its_first_checkpoint_starts_again(place: str, tmp_path: Path, six: Path):
    def dies(*_):
        raise Died

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Died):
        patch.setattr(TrainingRun, place, dies)
        finish(tmp_path / "run", everything, max_steps=6)
    assert steps_saved(tmp_path / "run") == []
    check_same_run(finish(tmp_path / "run", everything, max_steps=6), six)


def test_a_run_that_has_done_steps_and_lost_its_checkpoints_is_left_alone(stopped: Path):
    shutil.rmtree(stopped / "checkpoints")
    before = contents(stopped)
    with pytest.raises(ValueError, match="an unfinished one without a checkpoint"):
        finish(stopped, everything, max_steps=6)
    assert contents(stopped) == before


def test_another_configuration_is_refused_with_the_first_lines_that_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "run"
    interrupted(folder, 0, signal.SIGTERM, code=143)
    said = failure(capsys, command(folder, "--seed", "3"))
    assert "there 'train.seed = 0'; here 'train.seed = 3'" in said and "nothing was changed" in said
    more = ("--gin_param", "nft.NFT.beta = 0.5", "--gin_param", "optimization.AdamW.beta1 = 0.5")
    assert "'nft.NFT.beta = 1.0'; here 'nft.NFT.beta = 0.5', and 2 more lines" in failure(
        capsys, command(folder, *more)
    )


def test_steps_and_checkpoints_may_differ_and_threads_are_said_aloud():
    config = "# a\ntrain.seed = 0\ntrain.max_steps = 4\ntrain.checkpoint_every = 1\ntrain.threads = 1\n"
    other = config.replace("steps = 4", "steps = 9").replace("every = 1", "every = 7").replace("# a", "# b")
    assert check_same_config("train", config, other, "") == []
    (note,) = check_same_config("train", config, config.replace("threads = 1", "threads = 2"), "")
    assert note == "train.threads = 2 in place of train.threads = 1: from here on equal up to rounding"
    with pytest.raises(ValueError, match=r"there 'other\.seed = 1'"):
        check_same_config("train", config + "other.seed = 1\n", config, "x holds a run")


TRAINED = [c for c in packaged_configs() if c.startswith(("embedded/", "crosses/")) and "%GENERATOR" not in c]


@pytest.mark.parametrize("config", [c for c in TRAINED if c.split("/")[-1].split(".")[0] not in (
    "world", "held_out", "evaluate", "generate", "pretrain", "distill", "selective")])  # fmt: skip
def test_the_config_of_a_run_is_the_configuration_of_the_run_that_goes_on(config: str, tmp_path: Path):
    flags = {"output_dir": "runs/a", "max_steps": 3}
    given = load_config("train", gin_files=[config], flags=flags).operative_config()
    (tmp_path / "config.gin").write_text(given)
    again = load_config("train", gin_files=[str(tmp_path / "config.gin")], flags={"output_dir": "b", "resume": "auto"})
    assert check_same_config("train", given, again.operative_config(), "") == []


# many runs


@dataclass(frozen=True)
class Planned:
    """A run of a comparison."""

    folder: Path
    arguments: tuple[str, ...]


@pytest.mark.slow
def test_a_comparison_goes_on_with_an_unfinished_run(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "nft-0"
    interrupted(folder, 2, signal.SIGTERM, code=143)
    assert train_one(Planned(folder, tuple(command(folder)))) is None
    assert "nft-0: unfinished, goes on from its newest checkpoint" in capsys.readouterr().out
    assert "after step 3" in (tmp_path / "nft-0.log").read_text()
    check_same_run(folder, whole)


def test_a_comparison_refuses_an_unfinished_run_of_another_configuration(tmp_path: Path):
    folder = tmp_path / "nft-0"
    interrupted(folder, 0, signal.SIGTERM, code=143)
    recorded = (folder / "config.gin").read_text()
    check_folder(folder, "train", lambda: recorded.replace("train.max_steps = 4", "train.max_steps = 9"))
    with pytest.raises(ValueError, match=r"nft-0 holds a run of another configuration: there 'train\.seed = 0'"):
        check_folder(folder, "train", lambda: recorded.replace("train.seed = 0", "train.seed = 1"))
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(ValueError, match="holds a run of another configuration"):
        check_folder(folder, "train", lambda: recorded.replace("train.seed = 0", "train.seed = 1"))


@pytest.mark.slow
def test_a_comparison_leaves_a_run_alone_that_lost_its_checkpoints(tmp_path: Path):
    folder = tmp_path / "nft-0"
    interrupted(folder, 1, signal.SIGTERM, code=143)
    shutil.rmtree(folder / "checkpoints")
    before = contents(folder)
    failure = train_one(Planned(folder, tuple(command(folder))))
    assert failure is not None and "an unfinished one without a checkpoint" in failure.line
    assert contents(folder) == before
