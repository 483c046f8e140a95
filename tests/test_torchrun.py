"""The command as torchrun starts it: one run of several processes, and the traceback of the one that fails."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from framework.cli import main
from framework.reporting.metrics import read_metrics

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "--gin_file", "embedded/astrolabe.gin",
    "--gin_param", "evaluation.HeldOut.members = 1",
    "--gin_param", "evaluation.HeldOut.every = 0",
    "--gin_param", "held_out/scenes.ShapesCaptions.limit = 3",
    "--gin_param", "noise_endpoint.NoiseEndpoint.window_blocks = 2",
    "--gin_param", "noise_endpoint.NoiseEndpoint.group_size = 2",
    "--gin_param", "train.prompts_per_step = 3",
    "--gin_param", "train.distribution = @distribution.Distribution()",
]  # fmt: skip
REWARD = '''
import os
from dataclasses import dataclass
from framework.interfaces import RewardModel
from rewards.shapes import ShapesReward

calls = []

@dataclass(frozen=True)
class Failing(RewardModel):
    """A reward that fails on rank 1, once training has begun."""

    signals = ShapesReward.signals

    def score(self, videos):
        calls.append(1)
        if os.environ["RANK"] == "1" and len(calls) == 3:
            raise ZeroDivisionError("planted in rank 1")
        return ShapesReward().score(videos)
'''


def torchrun(*arguments: str, ranks: int = 2) -> list[str]:
    # standalone: the agent's own store listens on a port that it holds, so that no other test can take it in between
    where = ["--standalone", "--local_addr", "127.0.0.1", "--nproc_per_node", str(ranks)]
    return [sys.executable, "-m", "torch.distributed.run", *where, "-m", "framework", *arguments]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ARMILLARY_PROGRESS": "0"}


def run(*arguments: str, ranks: int = 2, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        torchrun(*arguments, ranks=ranks), env=environment(), capture_output=True, text=True, timeout=timeout
    )


def record(folder: Path) -> list[dict[str, float]]:
    lines = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in line.items() if not name.startswith("time/")} for line in lines]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert main(["train", *SMALL, "--max_steps", "2", "--output_dir", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("shard", [False, True], ids=["whole", "sharded"])
def test_two_processes_are_one_run(alone: Path, tmp_path: Path, shard: bool):
    """Equal to float32's rounding in everything that is not divided by itself."""
    more = ["--gin_param", f"distribution.Distribution.shard_base = {shard}"]
    done = run("train", *SMALL, *more, "--max_steps", "2", "--output_dir", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ranks: 2 × 2 prompts, 1 of them repeated with weight 0") == 1
    assert {path.name for path in (tmp_path / "run").iterdir()} == {path.name for path in alone.iterdir()}
    assert (tmp_path / "run" / "command.txt").read_text().count("\n") == 1
    for one, other in zip(record(alone), record(tmp_path / "run"), strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert other[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_the_traceback_of_the_rank_that_failed_is_the_root_cause(tmp_path: Path):
    plugin = tmp_path / "failing.py"
    plugin.write_text(REWARD)
    started = time.monotonic()
    done = run(
        "train", *SMALL, "--plugin", str(plugin), "--gin_param", "REWARD = @failing.Failing()",
        "--gin_param", "distribution.Distribution.timeout_s = 60.0", "--output_dir", str(tmp_path / "run"),
    )  # fmt: skip
    assert done.returncode != 0 and time.monotonic() - started < 150
    assert "rank 1 of 2 failed:" in done.stderr
    cause = done.stderr[done.stderr.index("Root Cause") :]
    assert "rank      : 1" in cause and "failing.py" in cause and "ZeroDivisionError: planted in rank 1" in cause


def test_a_stopped_run_of_two_goes_on_as_one(alone: Path, tmp_path: Path):
    """SIGTERM to torchrun stops both ranks after the same step; any number of ranks continues their checkpoint."""
    folder = tmp_path / "run"
    arguments = ["train", *SMALL, "--output_dir", str(folder)]
    with subprocess.Popen(
        torchrun(*arguments, "--max_steps", "500"), env=environment(), stderr=subprocess.PIPE, text=True
    ) as process:
        metrics = folder / "metrics.jsonl"
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and not (metrics.is_file() and metrics.read_text().count("\n") >= 3):
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode != 0 and "stopped by SIGTERM, saved" in said, said
    steps = [int(line["step"]) for line in record(folder)]
    last = str(max(steps) + 1)
    # how ranks work together is no part of what a run is
    assert main([*arguments, "--max_steps", last, "--gin_param", "distribution.Distribution.checksum_every = 7"]) == 0
    assert [int(line["step"]) for line in record(folder) if "train/loss" in line] == list(range(1, int(last) + 1))
    for one, other in zip(record(alone)[:3], record(folder)[:3], strict=True):
        for name in one.keys() & other.keys():
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name


def test_a_command_that_is_one_process_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["evaluate", "--gin_file", "embedded/evaluate.gin"]) == 2
    assert "evaluate is one process and was started as 2; start it without torchrun" in capsys.readouterr().err
