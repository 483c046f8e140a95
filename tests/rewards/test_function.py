"""A plain function becomes a reward: what it gives is checked, what it cannot score is invalid, and never a zero."""

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from framework.cli import main
from framework.config.load import load_config
from framework.config.registry import ConfigError
from framework.conformance import check_reward
from framework.types import VideoBatch, Window
from rewards.function import FunctionReward, WindowFunction
from tests.rewards.tiny_encoders import batch, noise_clips
from tests.support import close

CLIPS = batch(noise_clips(4, 6, 3, 5, 5))
STILL = batch(CLIPS.frames[:2, :1])


def brightness(videos: VideoBatch) -> Tensor:
    mean = videos.frames.float().mean((1, 2, 3, 4))
    return mean if videos.frames.shape[1] > 1 else mean * torch.nan


def two(videos: VideoBatch) -> dict[str, Tensor]:
    pixels = videos.frames.float()
    return {"red": pixels[:, :, 0].mean((1, 2, 3)), "blue": pixels[:, :, 2].mean((1, 2, 3))}


def of_window(frames: Tensor, fps: float, prompt: str) -> float:
    return float(frames.float().mean()) + len(prompt) + fps if len(frames) > 1 else math.nan


def test_a_function_of_clips_is_a_reward():
    check_reward(FunctionReward(brightness), CLIPS, unscorable=STILL)
    check_reward(FunctionReward(two, ("blue", "red")), CLIPS)
    assert FunctionReward(two, ("blue", "red")).signals == ("blue", "red")


def test_a_function_of_windows_is_a_reward():
    windows = ((Window(0, 4, "a"), Window(4, 6, "long")), *CLIPS.windows[1:])
    check_reward(WindowFunction(of_window, ("w",)), VideoBatch(CLIPS.frames, 8.0, windows), unscorable=STILL)
    scores = WindowFunction(of_window, ("w",)).score(VideoBatch(CLIPS.frames, 8.0, windows))
    each = [of_window(CLIPS.frames[0, a:b], 8.0, text) for a, b, text in ((0, 4, "a"), (4, 6, "long"))]
    close(scores.values["w"][0], torch.tensor(sum(each) / 2), atol=1e-4)
    close(scores.windows["w"][0], torch.tensor(each), atol=1e-4)


def test_a_gradient_and_another_precision_do_not_get_out():
    weight = torch.ones(1, requires_grad=True)
    score = FunctionReward(lambda videos: brightness(videos).double() * weight).score(CLIPS).values["reward"]
    assert not score.requires_grad and score.dtype == torch.float32


def refusal(reward: Any, videos: VideoBatch = CLIPS) -> str:
    with pytest.raises(ValueError) as caught:
        reward.score(videos)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("given", "names", "message"),
    [
        (lambda v: torch.zeros(3), ("reward",), "must give reward as a tensor [4], got a tensor [3]"),
        (lambda v: torch.zeros(4, 1), ("reward",), "must give reward as a tensor [4], got a tensor [4, 1]"),
        (lambda v: [0.0] * 4, ("reward",), "must give reward as a tensor [4], got list"),
        (lambda v: None, ("reward",), "must give reward as a tensor [4], got NoneType None"),
        (lambda v: torch.zeros(4), ("a", "b"), "must give {name: scores} for ['a', 'b'], got a tensor [4]"),
        (lambda v: {"a": torch.zeros(4)}, ("a", "b"), "gives ['a'], but its names are ['a', 'b']"),
        (lambda v: {"a": torch.zeros(4), "c": torch.zeros(4)}, ("a",), "gives ['a', 'c'], but its names are ['a']"),
        (lambda v: torch.full((4,), torch.inf), ("reward",), "gives an infinite reward; give NaN for a clip"),
    ],
)
def test_any_other_result_is_refused_in_one_line(given: Callable, names: Sequence[str], message: str):
    assert message in refusal(FunctionReward(given, names))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda f, fps, p: "good", "must give w as one number, got str 'good'"),
        (lambda f, fps, p: torch.zeros(2), "must give w as one number, got a tensor [2]"),
        (lambda f, fps, p: True, "must give w as one number, got bool True"),
        (lambda f, fps, p: {"v": 1.0}, "gives ['v'], but its names are ['w']"),
        (lambda f, fps, p: -math.inf, "gives an infinite w"),
    ],
)
def test_any_other_result_for_a_window_is_refused_in_one_line(given: Callable, message: str):
    assert message in refusal(WindowFunction(given, ("w",)))


@pytest.mark.parametrize("kind", [FunctionReward, WindowFunction])
@pytest.mark.parametrize("names", [(), ("a", "a")])
def test_a_reward_without_names_or_with_one_twice_is_refused(kind: type, names: tuple[str, ...]):
    with pytest.raises(ValueError, match=rf"{kind.__name__}.names must name at least one signal, each once"):
        kind(brightness, names)


# from a plugin


PLUGIN = '''"""Somebody's functions."""

def redness(frames, fps, prompt):
    pixels = frames.float() / 255
    return float((pixels[:, 0] - pixels[:, 1:].mean(1)).mean())

def above(videos, threshold=0.5):
    return (videos.frames.float().mean((1, 2, 3, 4)) / 255 > threshold).float()
'''


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "their_functions.py").write_text(PLUGIN, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield "their_functions.py"
    sys.modules.pop("their_functions", None)


def built(plugin: str, *lines: str) -> Any:
    params = ["REWARD = @function.WindowFunction()", *lines]
    return load_config("train", gin_files=["embedded/nft.gin"], plugins=[plugin], gin_params=params).build()["reward"]


def test_a_gin_file_names_a_function_of_a_plugin_and_fills_its_settings_in(plugin: str):
    reward = built(
        plugin, "function.WindowFunction.function = @their_functions.redness", "function.WindowFunction.names = ['red']"
    )
    red = torch.zeros(1, 3, 3, 4, 4, dtype=torch.uint8)
    red[:, :, 0] = 255
    assert reward.score(batch(red)).values["red"].item() == 1
    lines = (
        "REWARD = @function.FunctionReward()", "function.FunctionReward.function = @their_functions.above",
        "their_functions.above.threshold = 0.2",
    )  # fmt: skip
    assert built(plugin, *lines).score(batch(red)).values["reward"].item() == 1
    assert built(plugin, *lines[:2]).score(batch(red)).values["reward"].item() == 0


SMALL = (
    "REWARD = @function.WindowFunction()", "function.WindowFunction.function = @their_functions.redness",
    "function.WindowFunction.names = ['red']", "evaluation.HeldOut.members = 1", "evaluation.HeldOut.every = 0",
    "evaluation.HeldOut.blocks = 1", "evaluation.HeldOut.controls = None", "held_out/scenes.ShapesCaptions.limit = 2",
    "noise_endpoint.NoiseEndpoint.window_blocks = 1", "noise_endpoint.NoiseEndpoint.group_size = 3",
    "adapters.LoRA.rank = 2", "train.prompts_per_step = 2", "train.checkpoint_every = 2",
)  # fmt: skip


def trained(folder: Path, plugin: str, *lines: str, steps: int, more: Sequence[str] = ()) -> list[dict[str, float]]:
    """What a run with the plugin's function logged, without times."""
    params = [word for line in (*SMALL, *lines) for word in ("--gin_param", line)]
    arguments = ["--gin_file", "embedded/nft.gin", "--plugin", plugin, "--max_steps", str(steps), *params, *more]
    assert main(["train", "--output_dir", str(folder), *arguments]) == 0
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{n: v for n, v in line.items() if not n.startswith(("time/", "memory/"))} for line in logged]


@pytest.mark.slow
@pytest.mark.parametrize("at_once", ["None", "1"])
def test_a_run_with_a_function_of_a_plugin_goes_on_exactly(at_once: str, plugin: str, tmp_path: Path):
    line = f"train.groups_at_once = {at_once}"
    whole = trained(tmp_path / "whole", plugin, line, steps=4)
    trained(tmp_path / "parts", plugin, line, steps=2)
    go_on = ("--resume", str(tmp_path / "parts" / "checkpoints" / "step-000002"))
    assert trained(tmp_path / "parts", plugin, line, steps=4, more=go_on) == whole
    assert any("reward/red" in name for entry in whole for name in entry)


def test_a_class_is_not_handed_on_with_half_of_its_settings(plugin: str):
    """What a function is still to be given its caller gives; nobody gives a class its encoder."""
    with pytest.raises(ConfigError, match=r"no value for clip_score.ClipScore.encoder"):
        built(plugin, "function.WindowFunction.function = @clip_score.ClipScore")


def test_a_function_that_is_called_where_it_should_be_named_is_told_so(plugin: str):
    with pytest.raises(ConfigError) as caught:
        built(plugin, "function.WindowFunction.function = @their_functions.redness()")
    assert "no value for their_functions.redness.frames" in str(caught.value) and "\n" not in str(caught.value)
