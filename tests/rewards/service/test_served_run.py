"""A run whose reward is a service is the run: the same numbers to the last bit, a restart in the middle included."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from framework.cli import main
from framework.commands.resumption import check_same_config
from framework.config.load import load_config
from framework.optimization import AdamW
from framework.serving.service import ProbeClip, RewardService
from rewards.composite import CompositeReward
from rewards.failure import Mask
from rewards.service.calling import Patience
from rewards.service.client import AnotherModel, HttpReward
from rewards.shapes import ShapesReward
from rewards.shapes_proxies import Smoothness
from tests.framework.test_trainer import make_trainer, moved, timeless, weights
from tests.rewards.service.serving import Listening, free_port
from tests.support import PROMPTS

HOME = Path(__file__).resolve().parents[3]
PROBE = ProbeClip(9, 16, 16, 8.0, PROMPTS[0])
SMALL = (
    "train.max_steps = 3", "noise_endpoint.NoiseEndpoint.group_size = 3", "train.prompts_per_step = 2",
    "noise_endpoint.NoiseEndpoint.stream_blocks = 2", "evaluation.HeldOut.members = 1",
    "evaluation.HeldOut.blocks = 2", "scenes.ShapesCaptions.limit = 6", "evaluation.HeldOut.controls = None",
)  # fmt: skip


def start(port: int, model: ShapesReward | CompositeReward | None = None) -> Listening:
    service = RewardService(model or ShapesReward(), PROBE)
    listening = Listening(service, port)
    listening.thread.join(0)
    return listening


def served(port: int) -> HttpReward:
    return HttpReward([f"http://127.0.0.1:{port}"], patience=Patience(backoff_s=0.05), timeout_s=20.0)


def check_survives(restarted: ShapesReward | CompositeReward | None, groups_at_once: int | None = None) -> None:
    """Three steps, the service killed after the first and started again when the client has noticed."""
    expected = make_trainer(optimizer=AdamW(1e-3), groups_at_once=groups_at_once)
    reward, port = served(port := free_port()), port
    trainer = make_trainer(optimizer=AdamW(1e-3), reward=reward, groups_at_once=groups_at_once)
    service = [start(port)]
    noticed = threading.Event()

    def restart(seconds: float) -> None:
        if not noticed.is_set():
            noticed.set()
            service.append(start(port, restarted))

    reward.wire = replace(reward.wire, sleep=restart)
    try:
        for step in range(3):
            if step == 1:
                service[0].stop()
            ours, theirs = timeless(trainer.step()), timeless(expected.step())
            assert {n: v for n, v in ours.items() if n in theirs} == theirs
            assert moved(weights(expected), weights(trainer)) == 0
        assert noticed.is_set() and len(service) == 2, "the service was gone in between"
    finally:
        for listening in service:
            listening.stop()


@pytest.mark.parametrize("groups_at_once", [None, 1])
def test_a_run_survives_a_restart_of_its_service_without_a_wrong_or_zero_reward(groups_at_once: int | None) -> None:
    check_survives(ShapesReward(), groups_at_once)


def test_a_restart_with_another_reward_ends_the_run_before_anything_moves() -> None:
    with pytest.raises(AnotherModel, match="another reward model"):
        check_survives(CompositeReward((ShapesReward(), Smoothness())))


def test_a_service_that_stays_away_ends_the_run_or_costs_steps_and_never_gives_a_score() -> None:
    port = free_port()
    service = start(port)
    reward = served(port)
    reward.patience = Patience(backoff_s=0.0)
    assert reward.unavailable() is None
    service.stop()
    trainer = make_trainer(reward=Mask(reward, patience=1))
    before = weights(trainer)
    with pytest.raises(ValueError, match=r"100% of the clips have no score.*ConnectError"):
        trainer.step()
    assert moved(before, weights(trainer)) == 0


# as a user starts it


@contextmanager
def serve_rewards(*arguments: str) -> Iterator[str]:
    """``armillary serve-rewards`` in a process; its URL."""
    command = [sys.executable, "-m", "framework", "serve-rewards", "--port", "0", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(HOME), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            said = [process.stdout.readline(), process.stdout.readline()]
            found = re.search(r"listening on (http://127\.0\.0\.1:\d+)", said[1])
            assert found is not None, said
            yield found[1]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(20)


def metrics(folder: Path) -> list[dict[str, float]]:
    """What a run logged, without what may differ between equal runs."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{n: v for n, v in line.items() if not n.startswith(("time/", "memory/"))} for line in lines]


def run(folder: Path, *arguments: str) -> list[dict[str, float]]:
    small = [part for line in SMALL for part in ("--gin_param", line)]
    code = main(["train", "--gin_file", "embedded/nft.gin", "--output_dir", str(folder), *arguments, *small])
    assert code == 0
    return metrics(folder)


@pytest.mark.slow
def test_the_embedded_demo_gives_the_same_numbers_with_its_reward_behind_http(tmp_path: Path) -> None:
    here = run(tmp_path / "here")
    token = tmp_path / "token"
    token.write_text("0123456789abcdef")
    with serve_rewards("--gin_file", "rewards/serve_shapes.gin", "--token_file", str(token)) as url:
        params = [f"client.HttpReward.urls = ['{url}']", f"client.HttpReward.token_file = '{token}'",
                  "evaluation.HeldOut.reward = %REWARD"]  # fmt: skip
        changes = [part for line in params for part in ("--gin_param", line)]
        there = run(tmp_path / "there", "--gin_file", "rewards/served.gin", *changes)
    assert len(here) == 5 and there == here
    lines = [json.loads(line) for line in (tmp_path / "there" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["time/reward_p50_s"] <= line["time/reward_p95_s"] for line in lines if "reward/total" in line)
    config = (tmp_path / "there" / "config.gin").read_text()
    assert "0123456789abcdef" not in config and str(token) in config, "the token is not written down"


def test_a_run_goes_on_with_a_service_that_moved_and_not_with_another_way_of_asking() -> None:
    def configured(*params: str) -> str:
        files = ["embedded/nft.gin", "rewards/served.gin"]
        return load_config("train", gin_files=files, gin_params=params).operative_config()

    here = configured()
    moved_to = ("client.HttpReward.urls = ['http://other:1', 'http://other:2']", "calling.Patience.backoff_s = 1.0")
    assert check_same_config("train", here, configured(*moved_to), "") == []
    assert "equal up to rounding" in check_same_config("train", here, configured("train.groups_at_once = 1"), "")[0]
    with pytest.raises(ValueError, match=r"client\.HttpReward\.megabytes = 8"):
        check_same_config("train", here, configured("client.HttpReward.megabytes = 8"), "x")


def test_what_a_service_refuses_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    serve = ["serve-rewards", "--gin_file", "rewards/serve_shapes.gin"]
    assert main([*serve, "--host", "192.0.2.1"]) == 1
    assert "is reached from other machines: give a --token_file" in capsys.readouterr().err
    assert main([*serve, "--token_file", str(tmp_path / "none")]) == 1
    assert "cannot be read" in capsys.readouterr().err
    assert main([*serve, "--gin_param", "serving.ProbeClip.height = 20"]) == 1
    assert "ShapesReward cannot score the clip of the self-test" in capsys.readouterr().err
    port = free_port()
    listening = start(port)
    try:
        assert main([*serve, "--port", str(port)]) == 1
        assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err
    finally:
        listening.stop()
    with torch.no_grad():
        nobody = f"client.HttpReward.urls = ['http://127.0.0.1:{port}']"
        arguments = ["--gin_file", "embedded/nft.gin", "--gin_file", "rewards/served.gin", "--gin_param", nobody]
        assert main(["train", *arguments, "--output_dir", str(tmp_path / "run")]) == 1
    assert "HttpReward cannot score: http://127.0.0.1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_evaluate_and_score_ask_a_service_that_is_down_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Patience, "pause", lambda *_: pytest.fail("it is asked once more"))
    urls = f"client.HttpReward.urls = ['http://127.0.0.1:{free_port()}']"
    nobody = ["--gin_file", "rewards/served.gin", "--gin_param", urls]
    judged = ["evaluate", "--gin_file", "embedded/evaluate.gin", "--gin_param", "evaluation.HeldOut.reward = %REWARD"]
    for command in (judged, ["score", "some.mp4", "--prompt", "a"]):
        assert main([*command, *nobody, "--output_dir", str(tmp_path / "out")]) == 1
        assert "HttpReward cannot score: http://127.0.0.1" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
