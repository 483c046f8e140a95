"""A newcomer who follows docs/add_your_own.md in a folder of their own has a fourth method training."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from framework.config.load import load_config
from framework.config.registry import ConfigError, Registry
from tests.pages import DOCS, blocks

ROOT = DOCS.parent
TEMPLATE = ROOT / "examples" / "fourth_method"
STARTED_BY_HAND = ("python3 -m venv my_env", ". my_env/bin/activate", "pip install ./armillary")
"""An environment of one's own; here it is the one that the tests run in."""
SMALL = (
    "train.max_steps = 1", "train.prompts_per_step = 2", "noise_endpoint.NoiseEndpoint.stream_blocks = 2",
    "evaluation.HeldOut.members = 1", "evaluation.HeldOut.blocks = 3", "evaluation.HeldOut.controls = None",
)  # fmt: skip
"""What keeps a training run of the page short."""


def commands(page: str) -> Iterator[list[str]]:
    """What the page asks to be typed, in its order."""
    for block in blocks(page):
        if block.language == "bash":
            yield from map(shlex.split, block.text.strip().splitlines())


def as_typed_here(command: list[str], packages: Path) -> list[str]:
    """The command for this environment: its programs, nothing downloaded, nothing installed into it, short runs."""
    program, *rest = command
    if program == "armillary":
        rest += [word for line in SMALL if rest[0] == "train" for word in ("--gin_param", line)]
        return [sys.executable, "-m", "framework", *rest]
    if command[:2] == ["pip", "install"]:
        there = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target", str(packages)]
        return [sys.executable, "-m", "pip", "install", *there, *(word for word in rest[1:] if word != "-e")]
    return [sys.executable, *rest] if program == "python" else command


@pytest.mark.slow
def test_the_page_leads_to_a_fourth_method_that_trains(tmp_path: Path):
    (tmp_path / "armillary").symlink_to(ROOT)
    here, packages, outputs = tmp_path, tmp_path / "packages", []
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{packages}", "PYTHONDONTWRITEBYTECODE": "1"}
    for command in commands((DOCS / "add_your_own.md").read_text(encoding="utf-8")):
        if shlex.join(command) in STARTED_BY_HAND or command[:2] == ["armillary", "compare"]:
            continue  # a comparison is two runs; tests/test_compare.py makes one
        if command[0] == "cd":
            here = here / command[1]
            continue
        typed = as_typed_here(command, packages)
        done = subprocess.run(typed, cwd=here, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
        outputs.append((shlex.join(command), done.stdout + done.stderr))

    said = "\n".join(f"$ {command}\n{output}" for command, output in outputs)
    assert "endpoint_dpo.EndpointDPO.beta: float (default 100.0)" in said
    assert said.count("dry run: one step done, nothing written") == 2 and "3 passed" in said
    assert "total" in (tmp_path / "my_method" / "runs" / "first" / "gains.md").read_text(encoding="utf-8")
    assert not any(path.name.startswith("armillary") for path in packages.iterdir())


def test_the_template_is_one_file_a_short_recipe_a_test_and_an_entry_point():
    assert {path.name for path in TEMPLATE.iterdir() if path.is_file()} == {
        "endpoint_dpo.py", "endpoint_dpo.gin", "test_endpoint_dpo.py", "pyproject.toml"
    }  # fmt: skip
    assert len((TEMPLATE / "endpoint_dpo.gin").read_text(encoding="utf-8").splitlines()) <= 10
    assert re.search(r'entry-points."armillary.parts"', (TEMPLATE / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The template in a folder of its own; what is imported from it is forgotten afterwards."""
    shutil.copytree(TEMPLATE, tmp_path / "my_method", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path / "my_method")
    before = set(sys.modules)
    yield tmp_path / "my_method"
    for name in set(sys.modules) - before:
        if name.endswith("_dpo"):
            del sys.modules[name]


def refusal(folder: Path, *lines: str, file: str = "endpoint_dpo.py") -> str:
    """What a newcomer is told."""
    with pytest.raises(ConfigError) as caught:
        load_config(
            "train", gin_files=[str(folder / "endpoint_dpo.gin")], gin_params=lines, plugins=[file] if file else []
        ).build()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_recipe_without_its_plugin_says_how_to_name_it(copied: Path):
    hint = "'endpoint_dpo.EndpointDPO'; if it is yours, name its module or file with --plugin"
    assert hint in refusal(copied, file="")


def test_mistakes_of_a_newcomer_are_named_with_their_remedy(copied: Path):
    assert "did you mean 'endpoint_dpo.EndpointDPO'" in refusal(copied, "SURROGATE = @endpoint_dpo.EndpointDPPO()")
    assert "no parameter 'bta'; did you mean 'beta'" in refusal(copied, "endpoint_dpo.EndpointDPO.bta = 1.0")
    assert "beta must be float, got 'much'" in refusal(copied, "endpoint_dpo.EndpointDPO.beta = 'much'")
    assert "EndpointDPO.beta must be positive, got 0" in refusal(copied, "endpoint_dpo.EndpointDPO.beta = 0")


def test_a_class_that_leaves_a_method_out_is_told_which(copied: Path):
    file = copied / "endpoint_dpo.py"
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace("def objective", "def objectiv"), encoding="utf-8")
    assert "endpoint_dpo.EndpointDPO cannot be built: it does not define objective" in refusal(copied)


def installed_copy(folder: Path, source: Path) -> None:
    """A package of that module as an installer leaves it, its entry point included."""
    shutil.copy(source, folder / source.name)
    info = folder / "fourth_method-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fourth-method\nVersion: 0.1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[armillary.parts]\nendpoint_dpo = endpoint_dpo\n", encoding="utf-8")


def test_a_file_that_is_installed_too_is_told_from_it(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "site").mkdir()
    installed_copy(tmp_path / "site", copied / "endpoint_dpo.py")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert Registry().find("endpoint_dpo.EndpointDPO").parameters["beta"].default == 100.0
    message = refusal(copied)
    assert f"the name 'endpoint_dpo' means {tmp_path / 'site' / 'endpoint_dpo.py'}" in message
    assert "leave --plugin out if that is the same part, installed" in message


def test_a_file_may_be_named_although_it_is_installed_from_its_place(copied: Path, monkeypatch: pytest.MonkeyPatch):
    info = copied / "site"
    info.mkdir()
    installed_copy(info, copied / "endpoint_dpo.py")
    (info / "endpoint_dpo.py").unlink()  # as an editable installation leaves it
    monkeypatch.syspath_prepend(str(info))
    monkeypatch.syspath_prepend(str(copied))
    registry = Registry()
    registry.add_plugin("endpoint_dpo.py")
    assert registry.find("endpoint_dpo.EndpointDPO").target.__module__ == "endpoint_dpo"
