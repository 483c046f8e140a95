"""Runs that are cut and go on, and what must then be equal, bit for bit."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from framework.adapters import LoRA
from framework.advantages import GroupRelative
from framework.checkpoint import read_part
from framework.commands.train import train
from framework.config.load import load_config
from framework.data.scenes import ShapesCaptions
from framework.evaluation import HeldOut
from framework.interfaces import RewardModel
from framework.optimization import AdamW, Constant
from framework.reference import Dynamic
from framework.reporting.summary import RunReport, write_scores
from framework.trainer import Trainer
from framework.types import Scores, VideoBatch
from framework.weights import read_tensors
from rewards.shapes import ShapesReward
from strategies.exploration.noise_endpoint import NoiseEndpoint
from strategies.regularizers.selective_kl import SelectiveKL
from strategies.surrogates.nft import NFT
from tests.support import tiny_generator
from tests.test_paper_configs import EMBEDDED

STEPS = 4
SMALL = (
    "noise_endpoint.NoiseEndpoint.group_size = 2",
    "noise_endpoint.NoiseEndpoint.window_blocks = 2",
    "noise_endpoint.NoiseEndpoint.stream_blocks = 5",
    "causal_history_routing.CausalHistoryRouting.group_size = 2",
    "causal_history_routing.CausalHistoryRouting.stream_blocks = 10",
    "reference.Dynamic.max_age = 3",
    "adapters.LoRA.rank = 4",
)
Arguments = dict[str, Any]


def of_config(config: str) -> Callable[[], Arguments]:
    """The arguments of a packaged configuration in miniature, built anew at every call."""
    given = EMBEDDED if config.startswith("papers/") else ()
    used = load_config("train", gin_files=[config], gin_params=given).operative_config()
    params = [*given, *(line for line in SMALL if line.split(" =")[0] in used)]

    def build() -> Arguments:
        arguments = load_config("train", gin_files=[config], gin_params=params).build()
        return arguments | {
            "generator": tiny_generator(), "evaluation": small_evaluation(), "prompts_per_step": 1,
            "max_steps": STEPS, "threads": 1,
        }  # fmt: skip

    return build


def small_evaluation(every: int = 2) -> HeldOut:
    return HeldOut(ShapesCaptions(held_out=True, limit=2), ShapesReward(), members=1, blocks=2, every=every)


class Remembers(RewardModel):
    """A reward with memory: every score is seen from the mean of all before."""

    def __init__(self) -> None:
        self.mean = torch.zeros(())

    @property
    def signals(self) -> tuple[str, ...]:
        return ShapesReward().signals

    def score(self, videos: VideoBatch) -> Scores:
        scores = ShapesReward().score(videos)
        shifted = {name: (value - self.mean).tanh() for name, value in scores.values.items()}
        self.mean = 0.5 * self.mean + torch.stack(list(scores.values.values())).mean()
        return Scores(shifted, scores.valid)

    def state_dict(self) -> dict:
        return {"mean": self.mean}

    def load_state_dict(self, state: dict) -> None:
        self.mean = state["mean"]


def everything() -> Arguments:
    """A run in which every kind of state decides: lagging behaviour, moving reference, remembered scores, warm-up."""
    return {
        "generator": tiny_generator(clip_blocks=2), "exploration": NoiseEndpoint(3),
        "surrogate": NFT(level_weights=(0.0, 1.0, 1.0, 1.0)), "reward": Remembers(), "advantage": GroupRelative(),
        "regularizer": SelectiveKL("VQ", ["MQ", "TA"], weight=1.0), "adaptation": LoRA(4),
        "optimizer": AdamW(1e-3, lr_warmup_steps=10), "behaviour_decay": Constant(0.5),
        "scenes": ShapesCaptions(limit=6), "evaluation": small_evaluation(), "max_steps": STEPS,
        "prompts_per_step": 2, "reference": Dynamic(max_age=2, threshold=1e9),
    }  # fmt: skip


@pytest.fixture(autouse=True)
def without_pictures() -> Iterator[None]:
    """Pictures and films take most of the time of a run this small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("framework.commands.train.write_report", write_numbers)
        yield


def write_numbers(report: RunReport) -> None:
    write_scores(report.folder / "evaluation.safetensors", report.before, report.after)
    (report.folder / "summary.json").write_text("{}")


class Died(BaseException):
    """What a process that ends at some place does to it, as far as one test process can show it."""


def die_before(step: int, folder: Path, build: Callable[[], Arguments], **changes: Any) -> None:
    """The run, in a process that ends before a step."""
    take = Trainer.step

    def step_or_die(trainer: Trainer):
        if trainer.steps_done == step and not trainer.world.rank and folder.exists():
            raise Died
        return take(trainer)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Died):
        patch.setattr(Trainer, "step", step_or_die)
        train(**(build() | {"output_dir": str(folder), "checkpoint_every": 2} | changes))


def finish(folder: Path, build: Callable[[], Arguments], **changes: Any) -> Path:
    """The run to its end, from where it stands."""
    assert train(**(build() | {"output_dir": str(folder), "checkpoint_every": 2} | changes)) == folder
    return folder


def lines(folder: Path) -> list[dict[str, float]]:
    """What a run logged, times left out."""
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in read]


def check_same_state(one: Any, other: Any, where: str = "state") -> None:
    """Two states are equal in every bit."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            check_same_state(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, pair in enumerate(zip(one, other, strict=True)):
            check_same_state(*pair, f"{where}[{i}]")
    elif isinstance(one, Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), where
    else:
        assert one == other or (one != one and other != other), where


def check_same_run(one: Path, other: Path) -> None:
    """Adapter, averaged policies, optimiser and every other state, held-out scores and all metrics but times."""
    check_same_state(*(last_state(folder)["trained"] for folder in (one, other)))
    assert lines(one) == lines(other)
    for name in ("adapter/adapter_model.safetensors", "evaluation.safetensors"):
        check_same_state(read_tensors(one / name), read_tensors(other / name), name)


def last_state(folder: Path) -> dict[str, Any]:
    newest = max((folder / "checkpoints").glob("step-*"))
    return read_part(newest / "shared.safetensors")
