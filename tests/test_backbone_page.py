"""The page of released checkpoints: its commands parse, its files are those of the recipes, its licences are theirs."""

import argparse
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from framework.cli import COMMANDS, build_parser
from framework.config.load import Configuration, load_config, packaged_configs
from framework.config.registry import ConfigError

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "backbones.md").read_text(encoding="utf-8")
SHELL = [line for line in re.findall(r"^    ((?:armillary|hf) .*)$", PAGE.replace("\\\n", " "), re.MULTILINE)]
RUN = [line for line in SHELL if line.startswith("armillary")]
FETCHED = [line for line in SHELL if line.startswith("hf ")]
MINE = re.findall(r"^```gin\n# (\w+\.gin)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
RECIPES = sorted(c for c in packaged_configs() if c.startswith("backbones/") and c != "backbones/shared.gin")


def options_of(line: str) -> argparse.Namespace:
    """A command line as the command reads it."""
    options, unknown = build_parser().parse_known_args(shlex.split(line)[1:])
    assert not unknown, unknown
    return options


def loaded(line: str) -> Configuration | None:
    """The checked configuration of a command line, nothing built; None for a command that reads a run's."""
    options = options_of(line)
    command = "train" if options.command == "doctor" else options.command
    if command == "export":
        return None
    names = COMMANDS[command][1] if options.command != "doctor" else ()
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    flags = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    if options.command == "doctor":
        flags = {"output_dir": "nowhere"}
    return load_config(command, gin_files=options.gin_file, gin_params=options.gin_param, flags=flags)


@pytest.fixture(autouse=True)
def a_folder_with_the_files_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in MINE:
        (tmp_path / name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize("line", RUN)
def test_a_command_of_the_page_parses_with_its_configuration(line: str):
    configuration = loaded(line)
    assert configuration is None or configuration.operative_config()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("self_forcing", "self_forcing_2"),
        ("clip_judge", "shared"),
        ("--device", "--divice"),
        ("astrolabe.gin", "kvp.gin"),
    ],
)
def test_the_check_sees_a_command_that_does_not(old: str, new: str):
    line = next(line for line in RUN if "papers/astrolabe" in line)
    with pytest.raises((ConfigError, AssertionError)):
        loaded(line.replace(old, new))


def bound(recipe: str, part: str, parameter: str) -> Any:
    """What a packaged recipe binds, None where it binds nothing."""
    table = load_config("generate", gin_files=[recipe]).bindings.table
    return next((b.value for key, b in table.items() if (key.name, key.parameter) == (part, parameter)), None)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_in_the_table_with_its_licence_and_is_fetched_generated_with_and_aligned(recipe: str):
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| `{recipe}`")]
    assert row.split("|")[-2].strip() == bound(recipe, "wan.WanRecipe", "licence")
    for command in ("generate", "train"):
        assert any(line.startswith(f"armillary {command} ") and recipe in line for line in RUN), command


def files(line: str) -> tuple[str, set[str]]:
    """(repository, files) of a fetch command."""
    words = shlex.split(line)
    assert words[:2] == ["hf", "download"] and words[-2] == "--local-dir"
    assert words[-1] == f"weights/{words[2].split('/')[1]}", "where the loader looks below FOLDER = 'weights'"
    return words[2], {word for word in words[3:-2] if not word.startswith("--")}


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_a_recipe_loads_is_what_the_page_fetches(recipe: str):
    fetched: dict[str, set[str]] = {}
    for repository, names in map(files, FETCHED):
        fetched.setdefault(repository, set()).update(names)
    for part in ("wan.WanRecipe", "wan.ReleasedLoRA"):
        if (repository := bound(recipe, part, "repository")) is not None:
            assert bound(recipe, part, "file") in fetched[repository]
    base = bound(recipe, "wan.WanRecipe", "base") or "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    assert fetched[base] == {"text_encoder/*", "tokenizer/*", "vae/*"}


def test_the_page_says_that_nothing_ran_with_real_weights():
    assert "Nothing on this page was run with real weights" in PAGE.replace("**", "")
