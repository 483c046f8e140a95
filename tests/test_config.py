"""A configuration means what gin means by it, and every mistake in it is one line that names the cause."""

import sys
from pathlib import Path
from typing import Any

import pytest
from gin import config as gin
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.config import registry
from framework.config.bindings import MACRO, Bindings, Reference
from framework.config.load import COMMAND, LATER, Configuration, load_config, packaged_configs
from framework.config.registry import ConfigError
from tests import config_samples
from tests.config_samples import Colour, Noise, Routing

COMMANDS = dict(registry.ROOTS)
TOY = "import tests.config_samples as toy\n"
PLAIN = TOY + "train.exploration = @toy.Noise()\n"


@pytest.fixture(autouse=True)
def toy_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.ROOTS, "train", "tests.config_samples:train")
    monkeypatch.setitem(registry.ROOTS, "evaluate", "tests.config_samples:evaluate")


def load(text: str, *params: str, command: str = "train", **flags: Any) -> Configuration:
    return load_config(command, gin_params=[text, *params], flags=flags)


def refusal(text: str, *params: str, command: str = "train", **flags: Any) -> str:
    """The message that a configuration is refused with, building it included."""
    with pytest.raises(ConfigError) as caught:
        load(text, *params, command=command, **flags).run()
    message = str(caught.value)
    assert "\n" not in message and "configurable" not in message
    return message


# What a configuration means


def test_later_bindings_params_and_flags_win_in_this_order(tmp_path: Path) -> None:
    file = tmp_path / "a.gin"
    file.write_text(PLAIN + "train.seed = 1\ntrain.seed = 2\ntrain.max_steps = 2\ntrain.learning_rate = 2\n")
    loaded = load_config(
        "train",
        gin_files=[str(file)],
        gin_params=["train.max_steps = 3", "train.learning_rate = 3"],
        flags={"learning_rate": 4},
    )
    arguments = loaded.build()
    assert (arguments["seed"], arguments["max_steps"], arguments["learning_rate"]) == (2, 3, 4)


def test_parts_stay_plain_instances_of_their_class() -> None:
    arguments = load(PLAIN + "toy.Noise.count = 3").build()
    assert type(arguments["exploration"]) is Noise and arguments["exploration"] == Noise(count=3)


def test_a_function_and_a_bare_reference_are_values_too() -> None:
    text = TOY + "train.exploration = @toy.make_noise()\ntoy.make_noise.scale = 2.0\n"
    text += "train.judges = [@toy.Colour()]\ntoy.Colour.transform = @toy.make_noise"
    arguments = load(text).build()
    assert arguments["exploration"] == Noise(2.0)
    assert arguments["judges"][0].transform() == Noise(2.0)


def test_scopes_give_two_instances_and_a_singleton_gives_one() -> None:
    arguments = load(
        PLAIN
        + "train.judges = [@red/toy.Colour(), @blue/toy.Colour()]\n"
        + "toy.Colour.encoder = @shared/gin.singleton()\nshared/gin.singleton.constructor = @toy.Encoder\n"
        + "toy.Encoder.width = 5\nred/toy.Colour.weight = 2\n"
    ).build()
    red, blue = arguments["judges"]
    assert (red.weight, blue.weight) == (2, 1.0)
    assert red.encoder is blue.encoder and red.encoder.width == 5


def test_blocks_and_containers_and_macros_are_read() -> None:
    text = (
        TOY
        + "ROUTES = (1, 2)\ntrain.exploration = @toy.Routing()\ntoy.Routing:\n    routes = %ROUTES\n    mode = 'soft'\n"
    )
    assert load(text).build()["exploration"] == Routing((1, 2), "soft")


def test_a_file_is_looked_up_beside_its_includer_and_read_once(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "base.gin").write_text(TOY + "E = %gin.REQUIRED\ntrain.exploration = %E\n")
    (tmp_path / "parts" / "one.gin").write_text("include 'base.gin'\nE = @toy.Noise()\n")
    (tmp_path / "two.gin").write_text("include 'parts/one.gin'\ninclude 'parts/base.gin'\ntrain.seed = 9\n")
    assert load_config("train", gin_files=[str(tmp_path / "two.gin")]).build() == {"exploration": Noise(), "seed": 9}


def test_files_of_the_current_folder_win_over_packaged_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packaged, here = tmp_path / "packaged", tmp_path / "here"
    for folder, seed in ((packaged, 1), (here, 2)):
        folder.mkdir()
        (folder / "base.gin").write_text(f"train.seed = {seed}\n")
    (packaged / "run.gin").write_text(f"include 'base.gin'\n{PLAIN}")
    monkeypatch.setattr("framework.config.load.packaged_folder", lambda: packaged)
    monkeypatch.chdir(here)
    assert load_config("train", gin_files=["base.gin"], gin_params=[PLAIN]).build()["seed"] == 2
    assert load_config("train", gin_files=["run.gin"]).build()["seed"] == 1, "a packaged file includes packaged files"
    assert packaged_configs() == ["base.gin", "run.gin"]


def test_no_binding_of_one_configuration_reaches_the_next() -> None:
    load(PLAIN + "toy.Noise.count = 3").build()
    assert load(PLAIN).build()["exploration"] == Noise()


def test_the_command_is_told_its_operative_configuration() -> None:
    loaded = load(PLAIN)
    assert loaded.run()["operative_config"] == loaded.operative_config()
    assert "operative_config" in refusal(PLAIN + "train.operative_config = 'x'")


# The static reading agrees with gin's own evaluation


@st.composite
def configurations(draw: st.DrawFn) -> str:
    """Gin text in which noises are reached directly, through scopes, macros and nested judges."""
    scopes = ["", "a/", "b/", "a/b/", "M/", "N/", "S/"]
    number = st.integers(1, 9)
    lines = [TOY]
    for macro in ("M", "N"):
        lines.append(f"{macro} = [@{draw(st.sampled_from(scopes))}toy.Colour()]")
    chosen = draw(st.lists(st.sampled_from(["%M", "%N", "[@a/toy.Colour()]", "[@a/b/toy.Colour(), @S/toy.Colour()]"])))
    lines.append(f"train.judges = {chosen[0] if chosen else '()'}")
    lines.append(f"evaluate.exploration = @toy.Noise()\nOTHERS = [{', '.join(chosen)}]\ntoy.Strict.limit = %OTHERS")
    lines.append(f"train.exploration = @{draw(st.sampled_from(scopes))}toy.Noise()")
    for scope in draw(st.lists(st.sampled_from(scopes), unique=True)):
        lines.append(f"{scope}toy.Colour.encoder = @{draw(st.sampled_from(scopes))}toy.Encoder()")
    for scope in draw(st.lists(st.sampled_from(scopes), unique=True)):
        lines.append(f"{scope}toy.Encoder.width = {draw(number)}")
    for scope in draw(st.lists(st.sampled_from(scopes), unique=True)):
        lines.append(f"{scope}toy.Noise.count = {draw(number)}")
    return "\n".join(lines)


def read_unchecked(text: str, monkeypatch: pytest.MonkeyPatch) -> Configuration:
    """A configuration whose unused bindings are let pass."""
    monkeypatch.setattr(Bindings, "unused", lambda *_: None)
    return load(text)


def keys_that_gin_used(loaded: Configuration, monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
    """What gin recorded of its own evaluation of the configuration."""
    recorded: list[set[tuple[str, str]]] = []
    clear = gin.clear_config

    def record_then_clear() -> None:
        recorded.append(set(gin._OPERATIVE_CONFIG))
        clear()

    with monkeypatch.context() as patch:
        patch.setattr(gin, "clear_config", record_then_clear)
        loaded.build()
    return {(scope, name.removeprefix(COMMAND).removeprefix(LATER)) for scope, name in recorded[-1]}


@settings(deadline=None, max_examples=80)
@given(configurations())
def test_what_is_reached_is_what_gin_evaluates(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        toy_roots(patch)
        loaded = read_unchecked(text, patch)
        assert set(loaded.reached.calls) == keys_that_gin_used(loaded, patch)


def toy_roots(patch: pytest.MonkeyPatch) -> None:
    for command in ("train", "evaluate"):
        patch.setitem(registry.ROOTS, command, f"tests.config_samples:{command}")


def test_a_reading_that_forgets_the_scope_of_a_macro_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = read_unchecked(TOY + "M = @toy.Noise()\ntrain.exploration = %M", monkeypatch)
    wrong = {("" if name != MACRO else scope, name) for scope, name in loaded.reached.calls}
    assert set(loaded.reached.calls) == keys_that_gin_used(loaded, monkeypatch) != wrong


def as_data(value: Any) -> Any:
    """Built objects as comparable data."""
    if isinstance(value, list | tuple):
        return [as_data(item) for item in value]
    return (
        (type(value), {k: as_data(v) for k, v in vars(value).items()})
        if type(value).__module__ != "builtins"
        else value
    )


@settings(deadline=None, max_examples=80)
@given(configurations())
def test_the_operative_configuration_gives_the_same_run_again(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        toy_roots(patch)
        first = read_unchecked(text, patch)
        patch.undo()
        toy_roots(patch)
        again = load(first.operative_config())
        assert again.operative_config() == first.operative_config()
        defaults = {"learning_rate": 1e-3, "seed": 0, "device": "cpu", "max_steps": None, "output_dir": None}
        wanted = {**defaults, "dry_run": False, **first.build()}
        assert {k: as_data(v) for k, v in again.build().items()} == {k: as_data(v) for k, v in wanted.items()}


def test_the_operative_configuration_writes_defaults_down() -> None:
    text = load(TOY + "train.exploration = @toy.Routing()\ntoy.Routing.routes = (1,)").operative_config()
    assert "toy.Routing.mode = 'hard'" in text and "toy.Routing.limit = 1e999" in text and "train.seed = 0" in text
    assert "operative_config" not in text


# Plugins


def write_plugin(folder: Path, name: str = "their_part") -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(
        "from tests.config_samples import Exploration\n"
        "class Theirs(Exploration):\n"
        '    """Of somebody else."""\n'
        "    def __init__(self, size: int = 1): self.size = size\n"
        "    def branches(self): return self.size\n"
    )


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a plugin, as the current folder; the module is forgotten afterwards."""
    write_plugin(tmp_path / "theirs")
    monkeypatch.chdir(tmp_path / "theirs")
    monkeypatch.delitem(sys.modules, "their_part", raising=False)
    return tmp_path / "theirs"


@pytest.mark.parametrize("plugin", ["their_part", "their_part.py", "../theirs/their_part.py"])
def test_a_plugin_of_another_folder_survives_the_replay(
    plugin: str, elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = ["train.exploration = @their_part.Theirs()", "their_part.Theirs.size = 7"]
    text = load_config("train", plugins=[plugin], gin_params=params).operative_config()
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("their_part")
    sys.path[:] = [place for place in sys.path if place != str(elsewhere)]
    assert load(text).build()["exploration"].size == 7
    assert f"plugins.path = ['{elsewhere}']" in text and "import their_part" in text


def test_an_import_line_in_a_gin_file_is_a_plugin_and_can_be_renamed(elsewhere: Path) -> None:
    loaded = load("import their_part as other\ntrain.exploration = @other.Theirs()")
    assert loaded.build()["exploration"].size == 1
    assert "import their_part as other" in loaded.operative_config()
    text = "from __gin__ import dynamic_registration\nfrom tests import config_samples\n"
    assert load(text + "train.exploration = @config_samples.Noise()").build()["exploration"] == Noise()


def test_a_plugin_cannot_take_the_name_of_another_part(elsewhere: Path) -> None:
    message = refusal(TOY + "import their_part as toy")
    assert "'toy' is taken by tests.config_samples" in message and "as another_name" in message
    assert "'train' is taken by armillary" in refusal("import their_part as train")


def test_a_plugin_that_fails_is_one_line(elsewhere: Path) -> None:
    (elsewhere / "broken_part.py").write_text("raise RuntimeError('two\\nlines')\n")
    with pytest.raises(ConfigError, match=r"broken_part .* cannot be imported: RuntimeError: two; lines"):
        load_config("train", plugins=["broken_part"])
    with pytest.raises(ConfigError, match=r"no_such_part .* No module named"):
        load_config("train", plugins=["no_such_part"])
    with pytest.raises(ConfigError, match=r"'no_such.py': there is no such file"):
        load_config("train", plugins=["no_such.py"])
    with pytest.raises(ConfigError, match=r"plugins.path names /gone, which does not exist"):
        load("plugins.path = ['/gone']\nimport no_such_part")


def test_an_installed_package_offers_parts_by_entry_points(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    information = elsewhere / "theirs-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(
        "[armillary.parts]\ntheirs = their_part\none.Theirs = their_part:Theirs\nmissing = no_such_module\n"
    )
    monkeypatch.syspath_prepend(str(elsewhere))
    for name in ("theirs.Theirs", "one.Theirs"):
        loaded = load(f"train.exploration = @{name}()")
        assert loaded.build()["exploration"].size == 1
        assert load(loaded.operative_config()).operative_config() == loaded.operative_config()
    assert "no_such_module (theirs) cannot be imported" in refusal("train.exploration = @missing.Part()")


# The packaged files


@pytest.mark.parametrize("name", packaged_configs())
def test_a_packaged_file_is_a_run_that_can_be_replayed_or_lacks_only_what_it_says(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for command, place in COMMANDS.items():
        monkeypatch.setitem(registry.ROOTS, command, place)
    folder = {"output_dir": "somewhere"}
    runs: dict[str, Configuration] = {}
    for command in ("train", "pretrain", "distill"):
        try:
            runs[command] = load_config(command, gin_files=[name], flags=folder)
        except ConfigError as error:
            assert "is required and not set" in str(error) or "no value for" in str(error), error
    for command, first in runs.items():
        again = load_config(command, gin_params=[first.operative_config()])
        assert again.operative_config() == first.operative_config()


# What is refused


@pytest.mark.parametrize(
    ("wrong", "parts_of_message"),
    [
        ("trian.seed = 1", ["unknown name 'trian'", "did you mean 'train'"]),
        ("train.sede = 1", ["train has no parameter 'sede'", "'seed'", "max_steps"]),
        ("toy.Noise.lr = 1", ["toy.Noise has no parameter 'lr'; its parameters: scale, count"]),
        ("train.exploration = @toy.Niose()", ["unknown name 'toy.Niose'", "'toy.Noise'", "Routing"]),
        ("train.exploration = @yot.Noise()", ["unknown name 'yot.Noise'", "'toy.Noise'", "toy.Routing"]),
        ("train.exploration = @Noise()", ["unknown name 'Noise'", "did you mean 'toy.Noise'"]),
        ("train.exploration = @toy.Exploration()", ["toy.Exploration is an interface"]),
        ("train.exploration = %NOISE", ["uses %NOISE, which is not defined"]),
        ("train.exploration = %gin.REQUIRED", ["train.exploration is required", "@toy.Noise() (one of: toy.Noise"]),
        ("LR = %gin.REQUIRED\ntrain.learning_rate = %LR", ["LR is required", "write LR = <float>"]),
        ("LR = 1", ["LR is bound but never used: nothing refers to %LR"]),
        ("toy.Routing.mode = 'soft'", ["toy.Routing.mode is bound but never used", "it builds: toy.Noise"]),
        ("a/toy.Noise.scale = 1", ["toy.Noise is not built in scope 'a'", "(none)"]),
        ("train.learning_rate = 'fast'", ["train.learning_rate must be float, got 'fast' (str)"]),
        ("train.seed = 1.5", ["train.seed must be int, got 1.5 (float)"]),
        ("train.seed = True", ["train.seed must be int, got True (bool)"]),
        ("train.max_steps = 'x'", ["train.max_steps must be int | None"]),
        ("train.dry_run = 1", ["train.dry_run must be bool"]),
        ("train.judges = 'VQ'", ["train.judges must be Sequence[Judge]"]),
        ("train.judges = [@toy.Colour(), @toy.Noise()]", ["train.judges must be Sequence[Judge]", "@toy.Noise()"]),
        ("train.exploration = @toy.Colour()", ["train.exploration must be Exploration, got @toy.Colour()"]),
        ("train.exploration = @toy.Noise", ["got @toy.Noise; write () behind it"]),
        ("E = @toy.Colour()\ntrain.exploration = %E", ["must be Exploration, got E = @toy.Colour()"]),
        ("train.exploration = @toy.Routing()", ["no value for toy.Routing.routes (tuple[int, ...])"]),
        ("E = @toy.Routing()\ntoy.Routing.routes = [1]\ntrain.exploration = %E", ["tuple[int, ...], got [1]"]),
        ("train.seed = true", ["cannot read 'train.seed = true'", "Python literals"]),
        ("train.seed = 2 * 3", ["cannot read 'train.seed = 2 * 3'"]),
        ("train.seed = (1", ["cannot read"]),
        ("train.seed", ["cannot read"]),
        ("include 'no_such.gin'", ["no file 'no_such.gin'"]),
        ("E = %E\ntrain.exploration = %E", ["built from itself: %E → %E"]),
        ("train.exploration = @toy.TOY()", ["unknown name 'toy.TOY'"]),
        (
            "train.judges = [@toy.Colour()]\ntoy.Colour.encoder = @s/gin.singleton()\ns/gin.singleton.constructor = 3",
            ["s/gin.singleton.constructor must be Callable, got 3"],
        ),
        (
            "train.judges = [@toy.Colour()]\ntoy.Colour.encoder = @s/gin.singleton()",
            ["no value for s/gin.singleton.constructor"],
        ),
        ("plugins.paths = ['x']", ["only plugins.path"]),
        ("train.seed = b'x'", ["values are None, bools"]),
        ("train.judges = [@toy.Strict()]\ntoy.Strict.limit = 1", ["toy.Strict: Strict.limit must not be 1; was 1"]),
        ("train.judges = [@toy.Strict()]\ntoy.Strict.limit = 2", ["toy.Strict: RuntimeError: broken"]),
    ],
)
def test_a_mistake_is_one_line_that_names_it(wrong: str, parts_of_message: list[str]) -> None:
    message = refusal(PLAIN + wrong)
    for part in parts_of_message:
        assert part in message, message


def test_a_mistake_in_a_file_names_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "inner.gin").write_text("\n\ntrain.sede = 1\n")
    outer = tmp_path / "outer.gin"
    outer.write_text(f"{PLAIN}include 'inner.gin'\n")
    with pytest.raises(ConfigError, match=r"^inner.gin:3: train has no parameter"):
        load_config("train", gin_files=[str(outer)])
    outer.write_text(f"{PLAIN}\ntrain.seed = null\n")
    with pytest.raises(ConfigError, match=r"outer.gin:4: cannot read 'train.seed = null'"):
        load_config("train", gin_files=[str(outer)])


def test_a_mistyped_scope_is_told_which_scopes_there_are() -> None:
    text = PLAIN + "train.judges = [@motion/toy.Colour()]\nmotoin/toy.Colour.weight = 2"
    assert "did you mean 'motion'?" in refusal(text)


def test_a_flag_of_the_wrong_type_or_without_a_parameter_names_the_flag() -> None:
    assert refusal(PLAIN, seed="x").startswith("--seed: train.seed must be int")
    assert refusal(PLAIN, sede=1).startswith("--sede: train has no parameter")


def test_bindings_of_another_command_are_kept_and_not_called_unused() -> None:
    text = PLAIN + "EVAL = @e/toy.Routing()\nevaluate.exploration = %EVAL\ntoy.Routing.routes = %gin.REQUIRED\n"
    operative = load(text).operative_config()
    assert "evaluate.exploration = %EVAL" in operative and "toy.Routing.routes = %gin.REQUIRED" in operative
    assert load(operative, "toy.Routing.routes = (3,)", command="evaluate").build()["exploration"] == Routing((3,))
    assert "toy.Routing.routes is required" in refusal(text, command="evaluate")
    assert "never used" in refusal(text + "f/toy.Routing.mode = 'soft'")
    assert load(text + "evaluate.exploration = @toy.Noise()").build() == {"exploration": Noise()}


def test_a_file_may_replace_a_part_that_an_included_file_configured(tmp_path: Path) -> None:
    (tmp_path / "paper.gin").write_text(
        TOY + "E = @toy.Routing()\nROUTES = (1, 2)\ntoy.Routing.routes = %ROUTES\ntrain.exploration = %E\n"
    )
    cross = tmp_path / "cross.gin"
    cross.write_text("include 'paper.gin'\nE = @toy.Noise()\n")
    loaded = load_config("train", gin_files=[str(cross)])
    assert loaded.build()["exploration"] == Noise() and "outing" not in loaded.operative_config()
    for line, said in (
        ("toy.Routing.mode = 'soft'", "toy.Routing.mode is bound but never used"),  # after the replacement: a mistake
        ("ROUTES = (3,)", "ROUTES is bound but never used"),
        ("toy.Colour.weight = 1", "toy.Colour.weight is bound but never used"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_config("train", gin_files=[str(cross)], gin_params=[line])


def test_a_reading_without_inheritance_of_scopes_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    text = TOY + "train.exploration = @a/toy.Noise()\ntoy.Noise.count = 2"
    assert load(text).build()["exploration"] == Noise(count=2)
    monkeypatch.setattr("framework.config.bindings.scopes_of", lambda scope: [scope])
    assert "toy.Noise.count is bound but never used" in refusal(text)


def test_a_shared_default_is_not_changed_by_a_run() -> None:
    first = load(PLAIN + "train.judges = [@toy.Colour()]\ntoy.Colour.names = {'a': 1}").build()["judges"][0]
    assert first == Colour(names={"a": 1}) and Reference("a", "toy.Noise", True) == Reference("a", "toy.Noise", True)
    assert config_samples.Colour().names is None
