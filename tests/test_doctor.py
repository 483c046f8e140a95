"""`armillary doctor` looks and writes nothing: every question has an answer, what is fatal decides the exit code."""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from benchmarks import p6
from framework import environment
from framework.cli import main
from framework.config.registry import Registry
from framework.environment import (
    Finding,
    Verdict,
    available_memory,
    check_device,
    check_disk,
    check_folder,
    check_idle_gpu,
    check_import,
    check_launch,
    check_memory,
    check_parts,
    check_python,
    check_requirement,
    check_reward,
    check_torchvision,
    installed_version,
    needed,
)
from rewards.composite import CompositeReward, WeightedReward
from rewards.shapes import ShapesReward
from tests.support import Brightness

OK, WARNING, FATAL = Verdict.OK, Verdict.WARNING, Verdict.FATAL


def check_verdict(finding: Finding, verdict: Verdict, *words: str) -> None:
    """The verdict, on one line with these words; what is not well says what to do."""
    line = finding.line()
    assert finding.verdict is verdict and "\n" not in line and all(word in line for word in words), line
    assert finding.advice or verdict is OK


def test_every_finding_that_is_not_well_says_what_to_do() -> None:
    with pytest.raises(AssertionError):
        check_verdict(Finding("disk", WARNING, "little"), WARNING)


def test_python_and_packages() -> None:
    check_verdict(check_python((3, 11)), OK)
    check_verdict(check_python((3, 10)), FATAL, "3.10", "3.11 or later")
    wanted = Requirement("transformers>=5,<6")
    check_verdict(check_requirement(wanted, "5.2"), OK)
    check_verdict(check_requirement(wanted, "4.57"), WARNING, "4.57", "pip install 'transformers")
    check_verdict(check_requirement(wanted, None), FATAL, "not installed")
    assert installed_version("no-such-package") is None and needed("no-such-package") == []
    assert {"torch", "diffusers", "peft"} <= {requirement.name for requirement in needed()}
    assert not {"ruff", "pyright"} & {requirement.name for requirement in needed()}, "extras are no requirement"


@pytest.mark.parametrize(
    ("torch_version", "torchvision", "wants", "verdict"),
    [
        ("2.13.0+cpu", None, None, OK),
        ("2.13.0+cpu", "0.28.0+cpu", "==2.13.0", OK),
        ("2.13.0", "0.28.0", "==2.13.0", OK),
        ("2.13.0+cpu", "0.27.0+cpu", "==2.12.0", FATAL),
        ("2.13.0+cpu", "0.28.0+cu130", "==2.13.0", WARNING),
    ],
)
def test_a_torchvision_of_another_torch(
    torch_version: str, torchvision: str | None, wants: str | None, verdict: Verdict
) -> None:
    check_verdict(check_torchvision(torch_version, torchvision, wants), verdict, "torchvision")


def test_a_package_that_cannot_be_loaded_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torn_package.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    check_verdict(check_import("torn_package"), FATAL, "RuntimeError: operator torchvision::nms", "install")
    check_verdict(check_import("json"), OK)
    sys.modules.pop("torn_package", None)


def test_parts_that_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    check_verdict(check_parts(Registry()), OK)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: ())
    check_verdict(check_parts(Registry()), FATAL, "pip install -e .")


def test_devices() -> None:
    check_verdict(check_device("cpu"), OK)
    check_verdict(check_device("gpu"), FATAL, "'gpu'", "--device one of cpu")
    check_verdict(check_idle_gpu("cpu", None, False), OK)
    check_verdict(check_idle_gpu("cpu", "13.0", False), WARNING, "CUDA 13.0", "driver")
    assert check_idle_gpu("cpu", "13.0", True).advice == "give --device cuda to use it"


def test_folders_and_disks(tmp_path: Path) -> None:
    check_verdict(check_folder(tmp_path / "new" / "deeper"), OK)
    assert not (tmp_path / "new").exists(), "a look creates nothing"
    (tmp_path / "file").write_text("")
    check_verdict(check_folder(tmp_path / "file" / "run"), FATAL, "is a file", "--output_dir")
    check_verdict(check_folder(tmp_path), WARNING, "holds something")
    check_verdict(check_disk(tmp_path, 2**20), FATAL, "1.0 MiB")
    check_verdict(check_disk(tmp_path, 2**30), WARNING, "1.00 GiB")
    check_verdict(check_disk(tmp_path, 2**40), OK)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    check_verdict(check_folder(tmp_path / "run"), FATAL, "cannot be written")


def test_half_a_launch() -> None:
    check_verdict(check_launch({}), OK, "1 process")
    check_verdict(check_launch({"RANK": "0"}), WARNING, "RANK set without WORLD_SIZE", "torchrun")
    check_verdict(check_launch(dict.fromkeys(environment.ENVIRONMENT, "2")), OK, "2 process")


@dataclass(frozen=True)
class Remote(Brightness):
    """A reward behind a service that is down."""

    def unavailable(self) -> str | None:
        return "http://localhost:1 does not answer"


def test_a_reward_that_cannot_be_reached_is_found_inside_others_too() -> None:
    check_verdict(check_reward(ShapesReward()), OK, "VQ, MQ, TA")
    for reward in (Remote(), CompositeReward([ShapesReward(), Remote()]), WeightedReward(Remote(), {"red": 1.0})):
        check_verdict(check_reward(reward), FATAL, "localhost:1 does not answer")
    check_verdict(check_reward(CompositeReward([ShapesReward(), Brightness()])), OK)


def test_memory_that_is_not_there_names_what_to_lower() -> None:
    _, estimate = p6.estimated(p6.cases()[0])
    check_verdict(check_memory(estimate, None), OK, "at the peak")
    check_verdict(check_memory(estimate, estimate.peak), OK, "available")
    check_verdict(check_memory(estimate, estimate.peak - 1), FATAL, "lower train.micro_batch_size")
    larger = {phase: {**estimate.phases, phase: 10 * estimate.peak} for phase in estimate.phases}
    for phase, word in (("rollout", "train.prompts_per_step"), ("optimiser step", "adapters.LoRA")):
        check_verdict(check_memory(replace(estimate, phases=larger[phase]), estimate.peak), FATAL, phase, word)
    check_verdict(check_memory(None, 1), WARNING, "does not tell its sizes")
    assert available_memory("gpu") is None
    if Path("/proc/meminfo").is_file():
        assert (available_memory("cpu") or 0) > 2**20


def test_the_command_estimates_a_configuration_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--gin_file", "embedded/nft.gin", "--output_dir", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    assert "all parts build and fit together" in shown and "memory: about" in shown and "0 fatal" in shown
    assert not (tmp_path / "run").exists() and torch.get_num_threads() == 1


def test_the_command_fails_where_something_is_fatal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["doctor", "--output_dir", str(tmp_path / "file")]) == 1
    assert "FATAL    output:" in capsys.readouterr().out
    assert main(["doctor", "--device", "gpu", "--output_dir", str(tmp_path / "new")]) == 1


def test_a_configuration_that_train_refuses_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--gin_file", "embedded/nft.gin", "--gin_param", "nft.NFT.bta = 1"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "did you mean 'beta'" in err


def test_fewer_prompts_than_a_step_takes_are_refused_as_train_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--gin_file", "embedded/nft.gin", "--gin_param", "train.prompts_per_step = 121"]) == 1
    assert "train.prompts_per_step=121 must lie in 1 … 120" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["doctor"], ["train", "--dry_run", "--device", "meta"]])
def test_routes_that_the_history_cannot_show_are_refused_before_anything_runs(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = "causal_history_routing.CausalHistoryRouting.sink = 4"
    assert main([*command, "--gin_file", "embedded/kvpo.gin", "--gin_param", line]) == 1
    assert "set sink to at most 3" in capsys.readouterr().err


def test_an_installation_that_cannot_be_loaded_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "framework.commands.doctor", None)
    assert main(["doctor"]) == 1
    assert "armillary cannot be loaded" in capsys.readouterr().err
