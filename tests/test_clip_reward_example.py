"""A reward from outside: the example's page runs as it stands, its parts are found, and its promises are kept."""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from framework.cli import main
from framework.config.load import load_config
from framework.config.registry import ConfigError
from tests.test_add_your_own import ROOT, SMALL, commands

EXAMPLE = ROOT / "examples" / "clip_reward"
PAGE = (EXAMPLE / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The example in a folder of its own with a random CLIP; what is imported from it is forgotten afterwards."""
    folder = tmp_path / "my_reward"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["tiny_clip.py", "tiny_clip"])
    runpy.run_path("tiny_clip.py", run_name="__main__")
    before, paths = set(sys.modules), list(sys.path)
    yield folder
    sys.path[:] = paths
    for name in set(sys.modules) - before:
        if name == "clip_reward":
            del sys.modules[name]


def as_run_here(command: list[str]) -> list[str]:
    """The arguments of a command of the page; training makes one step and writes nothing, videos are short."""
    _, name, *rest = command
    if name == "train":
        rest += ["--dry_run", *(word for line in SMALL for word in ("--gin_param", line))]
    return [name, *rest, *(["--gin_param", "generate.blocks = 2"] if name == "generate" else [])]


@pytest.mark.slow
def test_the_page_leads_to_a_reward_that_trains_and_scores(copied: Path, capsys: pytest.CaptureFixture[str]):
    ran = []
    for command in commands(PAGE):
        if command[0] in ("cp", "cd") or command == ["python", "tiny_clip.py", "tiny_clip"]:
            continue  # the fixture did
        if command[0] == "armillary":
            assert main(as_run_here(command)) == 0, capsys.readouterr().err
            ran.append(command[1])
        else:
            environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
            typed = [sys.executable, *command[1:]]
            done = subprocess.run(typed, cwd=copied, env=environment, capture_output=True, text=True)
            assert done.returncode == 0 and "3 passed" in done.stdout, shlex.join(command) + done.stdout
    said = capsys.readouterr().out
    assert ran == ["list", "train", "train", "generate", "score"]
    assert "clip_reward.PromptMatch.model: str (required)" in said and said.count("nothing written") == 2
    scores = (copied / "runs" / "scores" / "scores.csv").read_text(encoding="utf-8").splitlines()
    assert scores[0].endswith(",match,problem") and len(scores) == 3
    with Image.open(copied / "runs" / "scores" / "contact_sheet.png") as page:
        assert page.width > 400


def load(*lines: str) -> object:
    files, flags = ["score.gin", "clip_reward.gin"], {"videos": ()}
    loaded = load_config("score", gin_files=files, plugins=["clip_reward.py"], gin_params=lines, flags=flags)
    return loaded.build()["reward"]


@pytest.mark.usefixtures("copied")
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("clip_reward.PromptMatch.frames = 0", "PromptMatch.frames must be at least 1, got 0"),
        ("clip_reward.PromptMatch.model = './nowhere'", "clip_reward.PromptMatch: "),
        ("clip_reward.PromptMatch.frmes = 3", "no parameter 'frmes'; did you mean 'frames'"),
    ],
)
def test_what_is_wrong_with_its_configuration_is_one_line(line: str, message: str):
    with pytest.raises(ConfigError) as caught:
        load(line)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_example_is_as_small_as_its_page_says():
    named = re.findall(r"^\| `([\w.]+)`(?:, `([\w.]+)`)? \|", PAGE, re.MULTILINE)
    files = {name for pair in named for name in pair if name}
    assert files | {"README.md"} == {path.name for path in EXAMPLE.iterdir() if path.is_file()}
    assert len((EXAMPLE / "clip_reward.py").read_text(encoding="utf-8").splitlines()) < 80
