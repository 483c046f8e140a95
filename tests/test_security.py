"""Nothing that is read is run: no pickle, no eval, and no prompt that reaches outside the folder it was given."""

import ast
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from backbones.embedded.generator import ShapesGenerator
from framework.adapters import load_adaptation
from framework.checkpoint import read_part
from framework.cli import main
from framework.commands.generate import generate, slug
from framework.weights import read_tensors
from tests.support import PROMPTS, holds, refuted, tiny_generator

HOME = Path(__file__).resolve().parent.parent
SOURCES = [
    file for package in ("framework", "strategies", "backbones", "rewards") for file in (HOME / package).rglob("*.py")
]
UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml", "jsonpickle"}
"""Modules that build objects out of what they read."""


def unsafe_places(source: str) -> list[str]:
    """What a source does that data could turn into code, or that would listen beyond this machine."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + (
                [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            )
            found += [f"imports {name}" for name in names if name.split(".")[0] in UNSAFE]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name in ("eval", "exec", "compile", "builtins.eval", "os.system"):
                found.append(f"calls {name}")
            if name == "torch.load" and options.get("weights_only") != "True":
                found.append("torch.load without weights_only=True")
            if name.endswith(".load") and options.get("allow_pickle") == "True":
                found.append("numpy with pickle")
            if options.get("shell") == "True":
                found.append("a shell")
        elif isinstance(node, ast.Constant) and node.value in ("0.0.0.0", "::"):
            found.append("an address that listens to everybody")
    return found


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.relative_to(HOME).as_posix())
def test_no_source_turns_data_into_code(file: Path) -> None:
    assert not unsafe_places(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "planted",
    [
        "import pickle", "from yaml import load", "eval(text)", "exec(text)", "torch.load(path)",
        "torch.load(path, weights_only=False)", "np.load(path, allow_pickle=True)", "run(line, shell=True)",
        "serve(host='0.0.0.0')",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_looks_for(planted: str) -> None:
    assert unsafe_places(planted)


class Burglar:
    """A pickle that writes a file when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.touch, (self.mark,)


def break_in(path: Path, mark: Path) -> None:
    """A file that would be dangerous to unpickle, in the two forms that torch reads."""
    if path.suffix == ".pt":
        torch.save({"state": Burglar(mark)}, path)
    else:
        path.write_bytes(pickle.dumps(Burglar(mark)))


def test_a_pickle_in_place_of_weights_is_refused_unread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mark, weights = tmp_path / "was here", tmp_path / "adapter_model.safetensors"
    break_in(weights, mark)
    for read in (read_tensors, read_part, lambda path: load_adaptation(tiny_generator().network, path.parent)):
        with pytest.raises(ValueError, match=re.escape(weights.name)):
            read(weights)
    params = ["--gin_param", f"embedded.packaged_generator.checkpoint = {str(weights)!r}"]
    assert main(["train", "--gin_file", "embedded/nft.gin", "--output_dir", str(tmp_path / "run"), *params]) == 2
    assert weights.name in capsys.readouterr().err
    assert not mark.exists() and not (tmp_path / "run").exists()


def test_the_burglar_would_have_been_there(tmp_path: Path) -> None:
    break_in(tmp_path / "plain", tmp_path / "one")
    pickle.loads((tmp_path / "plain").read_bytes())
    break_in(tmp_path / "saved.pt", tmp_path / "two")
    torch.load(tmp_path / "saved.pt", weights_only=False)
    assert (tmp_path / "one").exists() and (tmp_path / "two").exists()


# Names of files that come from prompts

FOLDER = Path("/somewhere/videos")
PROMPT = st.one_of(
    st.text(max_size=80),
    st.sampled_from(["../../etc/passwd", "/etc/passwd", "..", "a/../../b", "c:\\windows", "a\x00b", "~root", "", "ÄÖ"]),
)


def check_stays_inside(name: Callable[[str], str], prompt: str) -> None:
    """The video of a prompt lies in its folder, under a name that every file system takes."""
    path = FOLDER / f"{name(prompt)}.mp4"
    assert path.parent == FOLDER and len(path.name) <= 80
    assert re.fullmatch(r"[a-z0-9-]+\.mp4", path.name)


def test_a_prompt_becomes_a_plain_name() -> None:
    holds(lambda prompt: check_stays_inside(slug, prompt), PROMPT, examples=200)
    refuted(lambda prompt: check_stays_inside(str, prompt), PROMPT)


def test_a_prompt_file_cannot_write_outside_the_output_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ShapesGenerator.encode_text

    def any_text(self: ShapesGenerator, prompts: list[str]) -> Tensor:
        return plain(self, [PROMPTS[0]] * len(prompts))

    monkeypatch.setattr(ShapesGenerator, "encode_text", any_text)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("../../escaped\n/tmp/absolute/path\n..\n\\\\host\\share\na cat\n")
    output = tmp_path / "deep" / "videos"
    paths = generate(generator=tiny_generator(), output_dir=str(output), prompt_file=str(prompts), blocks=1)
    assert len(paths) == 5 and {path.resolve().parent for path in paths} == {output.resolve()}
    written = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {prompts, *paths}
