"""What is sharded over ranks is written in parts, read back by any number of ranks, and never unpickled."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from framework.adapters import FullFineTuning
from framework.checkpoint import CheckpointError, read_part
from framework.commands.train import train
from framework.distributed import Distribution, World, any_sharded
from framework.optimization import AdamW
from framework.sharded_state import PLACE, parted, restored
from framework.weights import read_tensors
from tests.framework.test_checkpoint import flip
from tests.ranks import results, run_ranks
from tests.resumed import of_config
from tests.support import tiny_generator

pytestmark = pytest.mark.slow


def some_steps(world: World, folder: Path, steps: int, shard: bool = True, resume: str = "auto") -> None:
    """Full fine-tuning of a tiny generator up to a step, as `train` does it."""
    arguments: dict[str, Any] = of_config("embedded/nft.gin")() | {
        "generator": tiny_generator(), "adaptation": FullFineTuning(), "optimizer": AdamW(1e-4), "prompts_per_step": 2,
        "distribution": Distribution(timeout_s=60, shard_base=shard and world.size > 1), "output_dir": str(folder),
        "max_steps": steps, "checkpoint_every": 2, "resume": resume,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("framework.commands.train.write_report", lambda report: None)
        train(**arguments)


def losses_of(folder: Path) -> list[float]:
    """The losses that a job has written: read after its end, for only the first rank writes and none waits for it."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``whole``: four steps of two ranks; ``cut``: two of them, the checkpoint of which others continue."""
    root = tmp_path_factory.mktemp("sharded")
    results(2, root / "ranks-whole", some_steps, root / "whole", 4)
    results(2, root / "ranks-cut", some_steps, root / "cut", 2)
    return root


def final(folder: Path) -> dict[str, torch.Tensor]:
    return read_tensors(folder / "adapter" / "model.safetensors")


def resumed_by(size: int, runs: Path, folder: Path, shard: bool = True) -> list[float]:
    shutil.copytree(runs / "cut", folder)
    results(size, folder.with_name("ranks"), some_steps, folder, 4, shard, str(folder))
    return losses_of(folder)


def test_a_sharded_run_goes_on_bit_for_bit(runs: Path, tmp_path: Path):
    losses = resumed_by(2, runs, tmp_path / "run")
    assert losses == losses_of(runs / "whole") and len(losses) == 4
    one, other = final(runs / "whole"), final(tmp_path / "run")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    files = sorted(path.name for path in (runs / "whole" / "checkpoints" / "step-000004").iterdir())
    assert [name for name in files if name.startswith("shard-")] == [
        f"shard-0000{rank}-model-00001-of-00001.safetensors" for rank in (1, 2)
    ]
    for name in (name for name in files if name.startswith("shard-")):
        parts = [load_file(root / "checkpoints" / "step-000004" / name) for root in (runs / "whole", tmp_path / "run")]
        assert parts[0].keys() == parts[1].keys() and all(torch.equal(parts[0][k], parts[1][k]) for k in parts[0])


@pytest.mark.parametrize("size", [1, 2], ids=["one process", "two whole ranks"])
def test_whole_ranks_go_on_with_what_sharded_ones_wrote(size: int, runs: Path, tmp_path: Path):
    losses = resumed_by(size, runs, tmp_path / "run", shard=False)
    one, other = final(runs / "whole"), final(tmp_path / "run")
    assert len(losses) == 4
    # the order of sums differs, and Adam divides small gradients by their size: close, not equal
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 2e-4


def test_sharded_ranks_go_on_with_what_one_process_wrote(runs: Path, tmp_path: Path):
    folder = tmp_path / "run"
    results(1, tmp_path / "first", some_steps, folder, 2)
    assert not list(folder.glob("checkpoints/*/shard-*"))
    results(2, tmp_path / "second", some_steps, folder, 4, True, str(folder))
    assert len(losses_of(folder)) == 4 and len(list(folder.glob("checkpoints/step-000004/shard-*"))) == 2
    one, other = final(runs / "whole"), final(folder)
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 2e-4


def test_the_part_that_all_ranks_share_holds_notes_and_every_byte_is_hashed(runs: Path, tmp_path: Path):
    checkpoint = runs / "cut" / "checkpoints" / "step-000002"
    shared = read_part(checkpoint / "shared.safetensors")
    assert "$sharded" in json.dumps(next(iter(shared["trained"]["policies"]["current"].values())))
    assert {path.suffix for path in checkpoint.iterdir()} == {".safetensors", ".gin", ".json"}  # nothing is pickled
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert sum(name.startswith("shard-") for name in manifest["files"]) == 2
    shutil.copytree(runs / "cut", tmp_path / "run")
    flip(next((tmp_path / "run" / "checkpoints" / "step-000002").glob("shard-00002*")))
    with pytest.raises(CheckpointError, match=r"shard-00002-\S+ is damaged"):
        some_steps(World(), tmp_path / "run", 4, resume=str(tmp_path / "run"))


def test_a_checkpoint_that_lacks_a_rank_s_file_is_refused(runs: Path, tmp_path: Path):
    shutil.copytree(runs / "cut", tmp_path / "run")
    next((tmp_path / "run" / "checkpoints" / "step-000002").glob("shard-00001*")).unlink()
    outcomes = run_ranks(2, tmp_path / "ranks", some_steps, tmp_path / "run", 4, True, str(tmp_path / "run"))
    assert all(outcome.code == 1 for outcome in outcomes) and "is missing" in outcomes[0].error


def test_what_a_rank_cannot_read_or_write_is_one_line_and_nothing_stays_zero(runs: Path, tmp_path: Path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(runs / "cut" / "checkpoints" / "step-000002", folder)
    state = read_part(folder / "shared.safetensors")["trained"]
    lost = next(folder.glob("shard-00001*"))
    lost.rename(tmp_path / lost.name)
    with pytest.raises(ValueError, match=r"holds \d+ of the .* numbers of policies/current/.*a shard file is missing"):
        restored(state, folder, None)
    (tmp_path / lost.name).rename(lost)
    whole = restored(state, folder, None)["policies"]["current"]
    assert all(bool(value.any()) for value in whole.values())

    outcomes = run_ranks(2, tmp_path / "ranks", some_steps_on_a_full_disk, tmp_path / "run")
    for outcome in outcomes:
        assert outcome.code == 1
        assert "OSError: " in outcome.error and "rank 1: [Errno 28] no space" in outcome.error.splitlines()[-1]
    assert not list((tmp_path / "run" / "checkpoints").glob("*")), "nothing half written is left"


def some_steps_on_a_full_disk(world: World, folder: Path) -> list[float]:
    """`some_steps` whose second rank has no room."""

    def full(*_: Any) -> None:
        raise OSError(28, "no space")

    with pytest.MonkeyPatch.context() as patch:
        if world.rank:
            patch.setattr("framework.sharded_state.HuggingFaceStorageWriter.write_data", full)
        return some_steps(world, folder, 2)


def test_a_state_without_sharded_tensors_is_left_as_it_is(tmp_path: Path):
    state = {"a": [torch.ones(2), (1, None)], "b": {3: "text"}}
    rest, tensors = parted(state)
    assert tensors == {} and not any_sharded(state) and PLACE not in rest
    again = restored(rest, tmp_path, None)
    assert torch.equal(again["a"][0], torch.ones(2)) and again["a"][1] == (1, None) and again["b"] == {3: "text"}
