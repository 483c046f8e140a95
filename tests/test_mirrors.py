"""Mirrors show what metrics.jsonl holds; the record is written first and whole without them."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from framework.reporting.metrics import MetricsLogger, read_metrics
from framework.reporting.mirrors import Mirror, WandB


class Memory(Mirror):
    """Keeps what it is shown; fails on request."""

    def __init__(self, fails: bool = False) -> None:
        self.said: list[Any] = []
        self.fails = fails

    def open(self, folder: Path, config: str) -> None:
        self.said.append(("open", folder.name, config))

    def log(self, step: int, values: Any) -> None:
        if self.fails:
            raise OSError("no connection")
        self.said.append((step, dict(values)))

    def close(self) -> None:
        self.said.append("close")


def test_a_mirror_shows_every_line_of_the_record(tmp_path: Path) -> None:
    mirror = Memory()
    with MetricsLogger(tmp_path / "run") as log:
        log.mirror_to([mirror], "train.seed = 1")
        log.log(1, {"train/loss": 0.5}, samples_seen=8)
    assert mirror.said == [("open", "run", "train.seed = 1"), (1, {"train/loss": 0.5, "samples_seen": 8.0}), "close"]


def test_the_line_is_on_the_disk_before_a_mirror_can_fail(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path) as log:
        log.mirror_to([Memory(fails=True)], "")
        with pytest.raises(OSError, match="no connection"):
            log.log(1, {"train/loss": 0.5}, samples_seen=8)
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"train/loss": 0.5, "step": 1.0, "samples_seen": 8.0}]


def test_wandb_is_an_extra_and_needs_no_account_unless_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'armillary\[wandb\]'"):
        WandB()
    calls: list[Any] = []
    run = SimpleNamespace(log=lambda values, step: calls.append((values, step)), finish=lambda: calls.append("finish"))
    fake = SimpleNamespace(init=lambda **options: calls.append(options) or run)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):  # the second time, the same run goes on
        mirror = WandB("alignment")
        mirror.open(tmp_path, "train.seed = 1")
        mirror.log(3, {"train/loss": 0.5})
        mirror.close()
    first, second = calls[0], calls[3]
    assert (first["project"], first["mode"], first["resume"]) == ("alignment", "offline", "allow")
    assert first == second and calls[1:3] == [({"train/loss": 0.5}, 3), "finish"]
    with pytest.raises(ValueError, match=r"WandB\.mode must be 'offline' or 'online'"):
        WandB(mode="secret")
