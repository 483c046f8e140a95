"""An interrupted distillation ends where the uninterrupted one does, byte for byte, and says what it did."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from backbones.embedded.generator import packaged_base, packaged_generator
from framework.block_weights import FutureParticipation
from framework.cli import main
from framework.commands.distill import STUDENT, distill
from framework.config.load import load_config
from framework.config.registry import ConfigError
from framework.data.scenes import ShapesCaptions
from framework.distiller import Distiller
from framework.evaluation import HeldOut
from framework.optimization import AdamW
from framework.weights import read_tensors
from rewards.shapes import ShapesReward
from strategies.distillation.dmd import DMD
from strategies.distillation.score_levels import Floored
from strategies.distillation.student_history import SelfRolled
from tests.strategies.test_distillation import same, snapshot
from tests.support import perturb, tiny_generator

CONFIG = "distill.seed = 0"


def run(folder: Path | None, **changes: Any) -> Path | None:
    critic = tiny_generator(clip_blocks=2)
    perturb(critic.network, 1, std=0.02)
    arguments: dict[str, Any] = {
        "generator": tiny_generator(clip_blocks=2),
        "teacher": tiny_generator(clip_blocks=2),
        "critic": critic,
        "history": SelfRolled(ShapesCaptions()),
        "gradient": DMD(),
        "levels": Floored(),
        "weights": FutureParticipation(),
        "optimizer": AdamW(1e-3),
        "critic_optimizer": AdamW(1e-3),
        "evaluation": HeldOut(ShapesCaptions(held_out=True, limit=2), ShapesReward(), members=2, every=3),
        "output_dir": None if folder is None else str(folder),
        "max_steps": 5,
        "batch_size": 2,
        "critic_warmup": 1,
        "generator_every": 2,
        "checkpoint_every": 2,
        "operative_config": CONFIG,
    } | changes
    return distill(**arguments)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = run(tmp_path_factory.mktemp("distill") / "whole")
    assert folder is not None
    return folder


def metrics(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def cut(folder: Path, stop: int, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """The same run in a process that dies before step ``stop``."""
    step = Distiller.step

    def dies(self: Distiller):
        if self.steps_done == stop:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Distiller, "step", dies)
        run(folder, **changes)


def test_a_run_writes_the_student_the_scores_and_the_pictures(uninterrupted: Path, capsys: pytest.CaptureFixture[str]):
    for name in (STUDENT, "config.gin", "gains.md", "before_after.png", "before_after.mp4", "reward_curve.png"):
        assert (uninterrupted / name).stat().st_size > 0, name
    tags = {tag for line in metrics(uninterrupted) for tag in line}
    assert {"train/critic_loss", "train/gradient_rms", "train/grad_norm", "eval/reward/total"} <= tags
    updates = [line["train/student_updates"] for line in metrics(uninterrupted) if "train/student_updates" in line]
    assert updates == [0, 0, 1, 1, 2]
    assert [line["step"] for line in metrics(uninterrupted) if "eval/reward/total" in line] == [0, 3, 5]
    facts = json.loads((uninterrupted / "summary.json").read_text())
    assert (facts["steps"], facts["samples"]) == (5, 10)


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 4])
def test_an_interrupted_run_writes_the_same_bytes(uninterrupted: Path, tmp_path: Path, stop: int, monkeypatch):
    cut(tmp_path / "cut", stop, monkeypatch)
    run(tmp_path / "cut")
    for name in (STUDENT, "evaluation.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (uninterrupted / name).read_bytes(), name
    assert metrics(tmp_path / "cut") == metrics(uninterrupted)


@pytest.mark.parametrize("forgotten", ["optimizer", "critic_optimizer", "critic", "average", "student"])
def test_the_bytes_check_sees_a_state_that_forgets(uninterrupted: Path, tmp_path: Path, forgotten: str, monkeypatch):
    # after step 4 every part of the state has moved away from what a new process begins with
    cut(tmp_path / "cut", 4, monkeypatch)
    load = Distiller.load_state_dict

    def forgets(self: Distiller, state: dict[str, Any]) -> None:
        load(self, {**state, forgotten: copy.deepcopy(self.state_dict()[forgotten])})

    with monkeypatch.context() as patch:
        patch.setattr(Distiller, "load_state_dict", forgets)
        run(tmp_path / "cut")
    assert (tmp_path / "cut" / STUDENT).read_bytes() != (uninterrupted / STUDENT).read_bytes()


def test_the_written_student_is_the_average_and_loads_as_a_checkpoint(tmp_path: Path, monkeypatch):
    saved: dict[str, torch.Tensor] = {}
    init = Distiller.__post_init__

    def watched(self: Distiller) -> None:
        init(self)
        saved["weights"] = self.average.weights  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(Distiller, "__post_init__", watched)
    three = {role: packaged_base() for role in ("generator", "teacher", "critic")}
    run(tmp_path / "run", max_steps=2, critic_warmup=0, generator_every=1, **three)
    loaded = packaged_generator(str(tmp_path / "run" / STUDENT))
    assert same(dict(loaded.network.state_dict()), dict(saved["weights"]))
    assert not same(snapshot(loaded.network), snapshot(packaged_base().network))


def test_a_dry_run_does_one_step_and_writes_nothing(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    assert run(None, dry_run=True) is None
    assert not list(tmp_path.iterdir())
    out = capsys.readouterr().out
    assert "dry run: one step done, nothing written; 5 steps would roll out 10 clips" in out
    assert "updates: 5 of the critic, 2 of the student, attached history of SelfRolled" in out
    assert "block weights 0.667, 1.333" in out and "replay of a stored rollout" in out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_steps": 0}, r"distill\.max_steps must be at least 1, got 0"),
        ({"generator_every": 0}, r"distill\.generator_every must be at least 1"),
        ({"average_decay": 1.0}, r"average_decay lie in \[0, 1\)"),
        ({"critic_warmup": -1}, r"distill\.critic_warmup must be at least 0"),
        ({"device": "nonsense"}, r"device='nonsense' cannot be used here"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_written(tmp_path: Path, change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "never", **change)
    assert not (tmp_path / "never").exists()


def test_other_runs_and_broken_states_are_not_resumed(uninterrupted: Path, tmp_path: Path, monkeypatch):
    with pytest.raises(ValueError, match="holds another run already, a finished one"):
        run(uninterrupted)
    cut(tmp_path / "cut", 3, monkeypatch)
    with pytest.raises(ValueError, match=r"another configuration.*distill\.seed"):
        run(tmp_path / "cut", operative_config="distill.seed = 1")
    teacher = tiny_generator(clip_blocks=2)
    perturb(teacher.network, 3)
    with pytest.raises(ValueError, match="started from other weights"):
        run(tmp_path / "cut", teacher=teacher)
    state = next((tmp_path / "cut" / "checkpoints").glob("step-*3/shared.safetensors"))
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"shared\.safetensors is truncated: 1,000 bytes of .*step-000002 before it"):
        run(tmp_path / "cut")


# the configurations


def test_the_packaged_configuration_gives_three_networks_of_their_own():
    arguments = load_config("distill", gin_files=["embedded/distill.gin"]).build()
    networks = [arguments[role].network for role in ("generator", "teacher", "critic")]
    assert len({id(network) for network in networks}) == 3
    assert all(same(snapshot(network), snapshot(packaged_base().network)) for network in networks)
    rates = arguments["optimizer"].learning_rate, arguments["critic_optimizer"].learning_rate
    assert rates == (1e-4, 4e-4) and arguments["optimizer"].beta1 == 0.0


def test_the_papers_configuration_lacks_only_networks_prompts_and_a_judge():
    given = [
        *(f"{role} = @embedded.packaged_base()" for role in ("GENERATOR", "TEACHER", "CRITIC")),
        "scenes.PromptFile.path = 'prompts.txt'",
        "include 'embedded/held_out.gin'",
    ]
    arguments = load_config("distill", gin_files=["papers/raven_distill.gin"], gin_params=given).build()
    assert arguments["weights"] == FutureParticipation(-1.0) and arguments["history_grad"] is True
    assert (arguments["generator_every"], arguments["average_decay"]) == (2, 0.9675)
    student, critic = arguments["optimizer"], arguments["critic_optimizer"]
    assert (student.learning_rate, critic.learning_rate) == (2e-6, 4e-7)
    assert {(o.beta1, o.beta2, o.weight_decay, o.max_grad_norm) for o in (student, critic)} == {
        (0.0, 0.999, 0.0, 1000.0)
    }
    for missing in range(3):
        with pytest.raises(ConfigError, match="is required and not set"):
            load_config("distill", gin_files=["papers/raven_distill.gin"], gin_params=given[:missing] + given[3:])


def test_the_command_line_distils(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    small = ("distill.batch_size = 2", "distill.critic_warmup = 0", "evaluation.HeldOut.members = 1",
             "held_out/scenes.ShapesCaptions.limit = 2")  # fmt: skip
    params = [word for line in small for word in ("--gin_param", line)]
    arguments = ["distill", "--gin_file", "embedded/distill.gin", *params, "--output_dir", str(tmp_path / "run")]
    assert main([*arguments, "--max_steps", "1"]) == 0
    assert f"saved to {tmp_path / 'run'}" in capsys.readouterr().out
    before = read_tensors(tmp_path / "run" / STUDENT)
    assert before.keys() == packaged_base().network.state_dict().keys()
    assert main([*arguments, "--max_steps", "2"]) == 1
    assert "holds another run already, a finished one" in capsys.readouterr().err
    assert main([*arguments, "--max_steps", "2", "--resume", str(tmp_path / "run")]) == 0
    after = read_tensors(tmp_path / "run" / STUDENT)
    assert not same(before, after) and same(before, read_tensors(tmp_path / "run" / "earlier-results" / STUDENT))
