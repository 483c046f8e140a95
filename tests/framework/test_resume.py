"""k steps and n − k more are n steps, bit for bit, for every method; what is forgotten shows."""

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from framework.commands import training_run
from framework.interfaces import RewardModel
from framework.nonfinite import Skip
from framework.trainer import COUNTS, STATEFUL, Trainer
from framework.types import Scores, VideoBatch
from rewards.composite import CompositeReward, WeightedReward
from tests.resumed import (  # noqa: F401
    Remembers,
    check_same_run,
    die_before,
    everything,
    finish,
    lines,
    of_config,
    without_pictures,
)
from tests.test_paper_configs import RECIPES

METHODS = (
    "embedded/nft.gin", "embedded/astrolabe.gin", "embedded/astrolabe_long.gin", "embedded/kvpo.gin",
    "embedded/raven_cm_grpo.gin", "embedded/flow_grpo.gin",
)  # fmt: skip


@pytest.mark.parametrize("config", [*METHODS, *RECIPES])
def test_a_cut_run_ends_where_the_uncut_one_does(config: str, tmp_path: Path):
    build = of_config(config)
    whole = finish(tmp_path / "whole", build)
    die_before(3, tmp_path / "cut", build)  # a step behind its checkpoint, after a point of the held-out curve
    check_same_run(finish(tmp_path / "cut", build), whole)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(tmp_path_factory.mktemp("everything") / "whole", everything)


@pytest.mark.parametrize("cut", range(4))
@pytest.mark.parametrize("every", [1, 3])
def test_the_place_of_the_cut_and_of_the_checkpoints_changes_nothing(whole: Path, tmp_path: Path, cut: int, every: int):
    die_before(cut, tmp_path / "cut", everything, checkpoint_every=every)
    check_same_run(finish(tmp_path / "cut", everything), whole)


Forget = Callable[[dict[str, Any], dict[str, Any]], None]


def forget(*path: str) -> Forget:
    """A planted error: one piece of the state is what a new process begins with."""

    def forgets(saved: dict[str, Any], fresh: dict[str, Any]) -> None:
        for key in path[:-1]:
            saved, fresh = saved[key], fresh[key]
        saved[path[-1]] = fresh[path[-1]]

    return forgets


PIECES = [
    *(("counts", name) for name in COUNTS),
    *(("policies", name) for name in ("current", "behaviour", "reference", "average")),
    ("torch_optimizer", "state"),
    ("regularizer", "ratio"),
    ("reference", "age"),
    ("reward", "mean"),
]


def test_every_state_of_a_trainer_is_forgotten_once():
    elsewhere = {"advantage", "nonfinite"}  # no packaged rule remembers anything; skipped steps are below
    assert {path[0] for path in PIECES} == {"counts", *STATEFUL} - elsewhere


def finish_forgetting(folder: Path, build: Callable[[], dict[str, Any]], *path: str) -> Path:
    load = Trainer.load_state_dict

    def forgets(trainer: Trainer, state: dict[str, Any]) -> None:
        forget(*path)(state, copy.deepcopy(trainer.state_dict()))
        load(trainer, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "load_state_dict", forgets)
        return finish(folder, build)


@pytest.mark.parametrize("path", PIECES, ids=".".join)
def test_the_comparison_sees_a_forgotten_piece(path: tuple[str, ...], whole: Path, tmp_path: Path):
    die_before(3, tmp_path / "cut", everything, checkpoint_every=1)
    with pytest.raises(AssertionError):
        check_same_run(finish_forgetting(tmp_path / "cut", everything, *path), whole)


class Stumbles(Remembers):
    """A reward that fails in the second step, and knows which one that is."""

    def score(self, videos: VideoBatch) -> Scores:
        scores = super().score(videos)
        self.calls += 1
        return Scores.of({**scores.values, "VQ": scores.values["VQ"] * torch.nan}) if self.calls == 3 else scores

    calls = 0

    def state_dict(self) -> dict:
        return super().state_dict() | {"calls": self.calls}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.calls = state["calls"]


def stumbling() -> dict[str, Any]:
    return everything() | {"reward": Stumbles(), "nonfinite": Skip()}


def test_steps_that_were_left_out_stay_counted(tmp_path: Path):
    uncut = finish(tmp_path / "whole", stumbling)
    assert [line["train/skipped_steps"] for line in lines(uncut) if "train/skipped_steps" in line] == [0, 1, 1, 1]
    for name in ("cut", "forgetful"):
        die_before(3, tmp_path / name, stumbling, checkpoint_every=1)
    check_same_run(finish(tmp_path / "cut", stumbling), uncut)
    with pytest.raises(AssertionError):
        check_same_run(finish_forgetting(tmp_path / "forgetful", stumbling, "nonfinite", "skipped"), uncut)


# the process-wide generators, from which no packaged part draws


class Moody(RewardModel):
    """A part of someone else, that draws from wherever it likes."""

    @property
    def signals(self) -> tuple[str, ...]:
        return ("VQ", "MQ", "TA")

    def score(self, videos: VideoBatch) -> Scores:
        n = len(videos)
        python = torch.tensor([random.gauss(0, 1) for _ in range(n)])
        numpy = torch.from_numpy(np.random.standard_normal(n)).float()
        return Scores.of({"VQ": torch.randn(n), "MQ": python, "TA": numpy})


def moody() -> dict[str, Any]:
    """A process whose generators stand somewhere."""
    return everything() | {"reward": Moody()}


def scramble(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    random.gauss(0, 1)  # leaves a spare value behind


def check_moody_run_goes_on(tmp_path: Path) -> None:
    scramble(0)
    uncut = finish(tmp_path / "whole", moody)
    scramble(0)
    die_before(3, tmp_path / "cut", moody, checkpoint_every=1)
    scramble(1)
    check_same_run(finish(tmp_path / "cut", moody), uncut)


def test_the_process_wide_generators_go_on_where_they_stood(tmp_path: Path):
    check_moody_run_goes_on(tmp_path)


def test_the_generator_check_sees_one_that_is_not_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(training_run, "restore_random_state", lambda state: None)
    with pytest.raises(AssertionError):
        check_moody_run_goes_on(tmp_path)


def test_rewards_of_rewards_remember_what_their_parts_do():
    for wrap in (lambda part: CompositeReward([part]), lambda part: WeightedReward(part, {"VQ": 1.0})):
        old, new = Remembers(), Remembers()
        old.mean += 3
        wrap(new).load_state_dict(wrap(old).state_dict())
        assert new.mean == 3
