"""The command line: what a user can get wrong is one line on stderr and an exit code; help imports nothing heavy."""

import importlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from framework import cli
from framework.config import registry
from framework.config.registry import ConfigError
from framework.config.signatures import read_parameters

HOME = Path(__file__).resolve().parent.parent
PLAIN = "import tests.config_samples as toy\ntrain.exploration = @toy.Noise()\n"


@pytest.fixture
def toy_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A gin file for the toy command, which `train` is for the time being."""
    monkeypatch.setitem(registry.ROOTS, "train", "tests.config_samples:train")
    file = tmp_path / "toy.gin"
    file.write_text(PLAIN)
    return str(file)


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and the only line on stderr."""
    try:
        code = cli.main(arguments)
    except SystemExit as exit:
        code = int(exit.code or 0)
    out, err = capsys.readouterr()
    assert code != 0 and err.count("\n") == 1 and err.startswith("armillary: error: ") and "Traceback" not in out + err
    return code, err


def test_a_run_with_every_flag(toy_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--output_dir", "x", "--max_steps", "3", "--seed", "4", "--device", "cpu", "--dry_run"]
    assert cli.main(["train", "--gin_file", toy_file, "--gin_param", "toy.Noise.scale = 2.0", *flags]) == 0
    assert capsys.readouterr().out == "trained with Noise(scale=2.0, count=4)\n"


def test_gin_bindings_is_another_name_of_gin_param(toy_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--gin_file", toy_file, "--gin_bindings", "toy.Noise.count = 2"]) == 0
    assert "count=2" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--output_dir=x", "--max_steps=3", "--seed=4", "--device=cpu", "--dry_run"])
def test_a_flag_is_a_binding_and_one_that_is_not_given_is_none(
    flag: str, toy_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict] = []
    monkeypatch.setattr("framework.config.load.Configuration.run", lambda self: seen.append(self.build()))
    assert cli.main(["train", "--gin_file", toy_file, flag]) == 0
    name, _, value = flag.removeprefix("--").partition("=")
    assert set(seen[0]) == {"exploration", name} and str(seen[0][name]) == (value or "True")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["train", "--gin_param", "trian.seed = 1"], 2, "did you mean 'train'?"),
        (["train", "--gin_file", "no_such.gin"], 2, "there is no file 'no_such.gin'"),
        (["train"], 2, "train needs a --gin_file"),
        (["train", "--gin_fil", "x"], 2, "did you mean '--gin_file'?"),
        (["generate", "--promt", "x"], 2, "did you mean '--prompt'"),
        (["train", "--max_steps", "many"], 2, "argument --max_steps: invalid int value: 'many'"),
        (["trian"], 2, "invalid choice: 'trian'"),
        ([], 2, "COMMAND"),
        (["train", "--plugin", "no_such_module"], 2, "train needs a --gin_file"),
        (["list", "--plugin", "no_such_module"], 2, "no_such_module (a plugin) cannot be imported"),
        (["train", "--gin_file", "TOY", "--device", "broken"], 1, "device='broken' is no device; at all"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(
    arguments: list[str], code: int, said: str, toy_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    returned, line = failure(capsys, *[toy_file if argument == "TOY" else argument for argument in arguments])
    assert returned == code and said in line


def test_debug_shows_the_traceback(toy_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "--gin_file", toy_file, "--debug"]
    assert cli.main([*arguments, "--device", "broken"]) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error and error.splitlines()[-1].startswith("armillary: error: device='broken'")
    params = ["--gin_param", "train.judges = [@toy.Strict()]", "--gin_param", "toy.Strict.limit = 1"]
    assert cli.main([*arguments, *params]) == 2
    assert "__post_init__" in capsys.readouterr().err, "the traceback reaches the part that refused"


def test_a_bug_of_ours_keeps_its_traceback(toy_file: str) -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["train", "--gin_file", toy_file, "--device", "bug"])


def test_an_interrupt_exits_with_130(toy_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--gin_file", toy_file, "--device", "stop"]) == 130
    assert capsys.readouterr().err == "armillary: interrupted\n"


@pytest.mark.parametrize("command", ["", *cli.COMMANDS, "list", "doctor"])
def test_help_answers_without_torch(command: str) -> None:
    code = (
        "import sys\nfrom framework.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as exit:\n    assert exit.code == 0\n"
        "heavy = {'torch', 'gin', 'numpy', 'diffusers'} & set(sys.modules)\nassert not heavy, heavy"
    )
    arguments = [sys.executable, "-c", code, *([command] if command else []), "--help"]
    answer = subprocess.run(arguments, cwd=HOME, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert "usage: armillary" in answer.stdout


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_flag_is_a_parameter_of_its_command(command: str) -> None:
    module, name = registry.ROOTS[command].split(":")
    parameters, _ = read_parameters(getattr(importlib.import_module(module), name))
    flags = set(cli.COMMANDS[command][1])
    assert flags <= set(parameters), f"armillary {command} offers flags that {name} lacks"


def test_list_shows_parts_by_interface_with_their_first_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: ())
    assert cli.main(["list", "--plugin", "tests.config_samples"]) == 0
    shown, err = capsys.readouterr()
    assert err == ""
    assert "Exploration: How branches differ.\n" in shown and "Judge: What is liked, e.g. by people.\n" in shown
    assert "config_samples.Noise       Fresh noise, cf. Eq. (3), per branch.\n" in shown
    assert "config_samples.make_noise  Noise by a function.\n" in shown, "a function that says what it returns"
    assert "config_samples.Exploration" not in shown and "Encoder" not in shown
    assert "Packaged configurations" in shown


def test_list_shows_one_part_with_its_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "--plugin", "tests.config_samples", "config_samples.Routing"]) == 0
    shown = capsys.readouterr().out
    assert "Other histories per branch." in shown
    assert "config_samples.Routing.routes: tuple[int, ...] (required)" in shown
    assert "config_samples.Routing.mode: Literal['hard', 'soft'] (default 'hard')" in shown


def test_a_package_that_cannot_be_imported_is_a_warning_of_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    information = tmp_path / "theirs-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[armillary.parts]\nmissing = no_such_module\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert cli.main(["list"]) == 0
    assert "armillary: warning: no_such_module (theirs) cannot be imported" in capsys.readouterr().err


def test_a_module_that_shadows_ours_is_named(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text("")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{HOME}"}
    command = [sys.executable, "-m", "framework", "list"]
    answer = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert answer.returncode == 2 and "'rewards' but finds" in answer.stderr and str(tmp_path) in answer.stderr


# Packaging


def offered_modules() -> set[str]:
    return {source.module for source in registry.Registry().sources.values() if source.origin == "armillary"}


def implementing_modules() -> set[str]:
    """Modules of strategies and rewards that define a concrete implementation of an interface."""
    found = set()
    for package in ("strategies", "rewards"):
        for file in (HOME / package).rglob("*.py"):
            name = ".".join(file.relative_to(HOME).with_suffix("").parts).removesuffix(".__init__")
            module = importlib.import_module(name)
            for value in vars(module).values():
                if isinstance(value, type) and value.__module__ == name:
                    kind = registry.interface(value)
                    if kind is not None and not getattr(value, "__abstractmethods__", None):
                        found.add(name)
    return found


def test_every_module_with_a_part_is_in_the_registry() -> None:
    missing = implementing_modules() - offered_modules()
    assert not missing, f"add to PARTS in setup.py, then install again: {sorted(missing)}"


def test_every_entry_of_the_registry_can_be_imported_and_every_part_says_what_it_is() -> None:
    parts, broken = registry.Registry().offered()
    assert not broken, broken
    silent = [name for name, part in parts.items() if not registry.first_sentence(part.target)]
    assert not silent, f"without a docstring: {silent}"


def test_two_packages_may_offer_the_same_name_until_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("one", "two"):
        information = tmp_path / f"{package}-1.0.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (information / "entry_points.txt").write_text(f"[armillary.parts]\nsame = {package}_parts\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    names = registry.Registry()
    with pytest.raises(ConfigError, match=r"'same' is offered by both (one|two) .* and (one|two) .*as another_name"):
        names.find("same.Part")


@pytest.mark.slow
def test_the_wheel_holds_the_packages_and_their_data_and_no_tests(tmp_path: Path) -> None:
    copy = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "runs", "tests", "docs", "build", "*.egg-info", "__pycache__")
    shutil.copytree(HOME, copy, ignore=ignored)
    (copy / "tests").mkdir()
    (copy / "tests" / "__init__.py").write_text("")
    (copy / "configs" / "probe").mkdir()
    (copy / "configs" / "probe" / "deep.gin").write_text("")
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=copy, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("armillary-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops <= {"framework", "strategies", "backbones", "rewards", "theory_checks", "configs", "benchmarks"}
    sources = {p.relative_to(HOME).as_posix() for top in tops - {"configs"} for p in (HOME / top).rglob("*.py")}
    weights = {p.relative_to(HOME).as_posix() for p in (HOME / "backbones" / "embedded").rglob("*.safetensors")}
    configs = {p.relative_to(HOME).as_posix() for p in (HOME / "configs").rglob("*.gin")}
    assert sources | weights | configs | {"configs/probe/deep.gin", "framework/data/shapes.py"} <= set(names)
