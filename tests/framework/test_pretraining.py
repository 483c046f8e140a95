"""An interrupted pre-training ends where the uninterrupted one does, bit for bit."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from backbones.embedded.generator import ShapesGenerator
from framework.checkpoint import Checkpoints
from framework.commands.pretrain import initialise, pretrain
from framework.data.scenes import ShapesCaptions
from framework.data.shapes import PreferenceWorld
from framework.evaluation import HeldOut
from rewards.shapes import ShapesReward
from strategies.distillation.dmd import DistributionMatching
from strategies.distillation.teacher_forcing import TeacherForcing
from tests.strategies.test_distillation import same, small_dmd, snapshot
from tests.support import tiny_generator


@dataclass
class Interrupted(TeacherForcing):
    """Teacher forcing in a process that dies."""

    stop: int = 10**9

    def step(self, generator, data, streams, step):
        if step == self.stop:
            raise KeyboardInterrupt
        return super().step(generator, data, streams, step)


@dataclass
class InterruptedMatching(DistributionMatching):
    """Distillation in a process that dies."""

    stop: int = 10**9

    def step(self, generator, data, streams, step):
        if step == self.stop:
            raise KeyboardInterrupt
        return super().step(generator, data, streams, step)


def run(folder: Path, stop: tuple[int, int] = (99, 99), seed: int = 0, **changes: Any) -> Path:
    arguments: dict[str, Any] = {
        "generator": tiny_generator(clip_blocks=2, seed=len(folder.name)),  # fresh weights come from the seed alone
        "data": PreferenceWorld(),
        "stages": [
            Interrupted(steps=10, batch_size=2, warmup=2, stop=stop[0]),
            InterruptedMatching(steps=4, batch_size=2, critic_warmup=1, stop=stop[1]),
        ],
        "evaluation": HeldOut(ShapesCaptions(held_out=True, limit=2), ShapesReward(), members=2),
        "output_dir": str(folder),
        "seed": seed,
        "checkpoint_every": 2,
    } | changes
    return pretrain(**arguments)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("pretrain") / "whole", operative_config="pretrain.seed = 0")


def weights(folder: Path, stage: str) -> dict[str, Tensor]:
    return load_file(folder / f"{stage}.safetensors")


def metrics(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def test_a_run_writes_the_weights_of_every_stage(uninterrupted: Path):
    assert (uninterrupted / "config.gin").read_text() == "pretrain.seed = 0"
    base, student = weights(uninterrupted, "base"), weights(uninterrupted, "student")
    assert base.keys() == student.keys() == tiny_generator().network.state_dict().keys()
    assert not same(base, student)
    tags = {tag for line in metrics(uninterrupted) for tag in line}
    assert {"base/loss", "base/grad_norm", "eval/base/TA", "eval/student/VQ"} <= tags


@pytest.mark.parametrize("stop", [(0, 99), (5, 99), (6, 99), (99, 0), (99, 1), (99, 3)], ids=str)
def test_an_interrupted_run_ends_where_the_uninterrupted_one_did(uninterrupted: Path, tmp_path: Path, stop):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop)
    run(tmp_path / "cut")
    for stage in ("base", "student"):
        assert same(weights(tmp_path / "cut", stage), weights(uninterrupted, stage))
    assert metrics(tmp_path / "cut") == metrics(uninterrupted)


def test_the_interruption_check_sees_another_seed(uninterrupted: Path, tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", (99, 3))
    run(tmp_path / "cut", seed=1)
    assert not same(weights(tmp_path / "cut", "student"), weights(uninterrupted, "student"))


def test_fresh_weights_come_from_the_seed_alone():
    networks = []
    for given, seed in ((1, 0), (2, 0), (2, 1)):
        generator = tiny_generator(seed=given)
        for parameter in generator.network.parameters():
            parameter.data.zero_() if parameter.ndim != 1 else None
        torch.manual_seed(given)
        initialise(generator, seed)
        networks.append({n: p for n, p in snapshot(generator.network).items() if p.ndim > 1})
    assert same(networks[0], networks[1]) and not same(networks[1], networks[2])


def test_finished_runs_and_foreign_states_are_refused(uninterrupted: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"holds another run already, a finished one"):
        run(uninterrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", (99, 1))
    newest = Checkpoints(tmp_path / "cut" / "checkpoints").folders()[-1]
    with pytest.raises(ValueError, match=rf"{newest.name} does not fit this run: Error.* in loading state_dict"):
        run(tmp_path / "cut", generator=ShapesGenerator())
    with pytest.raises(ValueError, match=rf"{newest.name} does not fit this run"):
        run(tmp_path / "cut", stages=[small_dmd(name="base"), TeacherForcing(name="student")])
    with pytest.raises(ValueError, match=r"saved in stage 2, pretrain\.stages has 1"):
        run(tmp_path / "cut", stages=[small_dmd()])
    state = newest / "shared.safetensors"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"shared\.safetensors is truncated: 1,000 bytes of .* before it is whole"):
        run(tmp_path / "cut")


def test_stages_of_one_name_and_no_stage_at_all_are_refused(tmp_path: Path):
    for stages in ([], [small_dmd(), small_dmd()]):
        with pytest.raises(ValueError, match=r"pretrain\.stages need distinct names"):
            run(tmp_path / "never", stages=stages)
    assert not (tmp_path / "never").exists()


def test_a_run_of_another_configuration_is_not_resumed(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", (5, 99), operative_config="pretrain.seed = 0\n")
    with pytest.raises(
        ValueError, match=r"another configuration: there 'pretrain\.seed = 0'; here 'pretrain\.seed = 2'"
    ):
        run(tmp_path / "cut", operative_config="pretrain.seed = 2\n")
