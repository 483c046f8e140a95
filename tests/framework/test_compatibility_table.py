"""The printed table says of every registered part what the checks say of it, and the page in docs/ ends with it."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from framework import cli
from framework.advantages import GroupRelative
from framework.compatibility import IncompatibleRecipe, check_recipe
from framework.compatibility_table import KERNELS, Axes, collect, compatibility_table, labelled, refused
from framework.config.registry import Registry

HOME = Path(__file__).resolve().parents[2]
PAGE = HOME / "docs" / "compatibility.md"
START = "<!-- From here on: what `armillary list --compat` prints. -->\n"

THEIRS = '''"""Parts of somebody else."""

from collections.abc import Callable
from dataclasses import dataclass

from framework.interfaces import ExplorationStrategy, Regularizer, SurrogatePolicy
from framework.kernels import Ode
from framework.records import BranchLogits, Displacements, Endpoints, Predictions, Record


class Secret(Record):
    """What nobody writes."""


class Still(ExplorationStrategy):
    """An exploration with no kernel to choose."""

    kernel = Ode()
    group_size = 2

    def writes(self):
        return frozenset({Endpoints, Displacements})

    def plan(self, scenes, groups, recipe, streams):
        raise NotImplementedError


class Reader(SurrogatePolicy):
    """Reads a path and measures a distribution of branches."""

    reads = frozenset({Predictions})
    writes = frozenset({BranchLogits})

    def probes(self, tape, recipe, streams):
        raise NotImplementedError

    def statistics(self, views, probes):
        raise NotImplementedError

    def objective(self, statistics, advantage):
        raise NotImplementedError


class Lonely(Reader):
    """Reads what nobody writes."""

    reads = frozenset({Secret})


class DisplacedOnly(Regularizer):
    """Reads what only some rollouts leave, and signals that it names."""

    reads = frozenset({Displacements})

    def __init__(self, liked: str, others: tuple[str, ...]) -> None:
        self.signals_read = {liked, *others}

    @property
    def signals(self):
        return frozenset(self.signals_read)

    def penalty(self, objective, marks):
        raise NotImplementedError


@dataclass(frozen=True)
class Chosen(Regularizer):
    """Needs a function that only a user has."""

    measure: Callable[[int], int]

    def penalty(self, objective, marks):
        raise NotImplementedError


@dataclass(frozen=True)
class Fussy(Regularizer):
    """Refuses its own defaults."""

    weight: float = -1.0

    def __post_init__(self) -> None:
        raise ValueError("weight is wrong")

    def penalty(self, objective, marks):
        raise NotImplementedError
'''


@pytest.fixture(scope="module")
def axes() -> Axes:
    return collect(Registry().offered()[0])


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One file for all tests: a module is imported once."""
    file = tmp_path_factory.mktemp("theirs") / "somebodys_parts.py"
    file.write_text(THEIRS)
    return str(file)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["list", "--compat", *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


# it says what the checks say


def rows(text: str) -> list[list[str]]:
    """Cells of the table of surrogates, each as a list of names with their settings."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    table = lines[1 : next(i for i, line in enumerate(lines) if line.startswith("| advantage"))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def spread(cell: str) -> set[str]:
    """``A (x, y), B`` → {A x, A y, B}."""
    found = re.findall(r"([\w.]+)(?: \(([^)]*)\))?", cell)
    return {f"{name} {one}".strip() for name, settings in found for one in settings.split(", ")}


def check_table_is_what_a_run_does(table: Callable[[], str], axes: Axes) -> None:
    """Exactly the recipes of the table pass `check_recipe`."""
    shown = {
        (one, row[0], regularizer) for row in rows(table()) for one in spread(row[1]) for regularizer in spread(row[2])
    }
    passed = set()
    for e in axes.explorations:
        for s in axes.surrogates:
            for r in axes.regularizers:
                try:
                    check_recipe(e.part, s.part, GroupRelative(), r.part)
                except IncompatibleRecipe:
                    continue
                passed.add((f"{e.name} {e.setting}".strip(), s.name, r.name))
    assert shown == passed


def test_the_table_holds_exactly_the_recipes_that_a_run_accepts(axes: Axes):
    check_table_is_what_a_run_does(lambda: compatibility_table(Registry().offered()[0]), axes)


def test_the_table_check_sees_a_recipe_too_many_and_one_too_few(axes: Axes):
    text = compatibility_table(Registry().offered()[0])
    for wrong in (text.replace("AnchorVelocityKL, BranchKL", "AnchorVelocityKL"), text.replace(", Ode) |", ") |")):
        assert wrong != text
        with pytest.raises(AssertionError):
            check_table_is_what_a_run_does(lambda text=wrong: text, axes)


def test_every_refusal_is_one_line_and_names_the_record(axes: Axes):
    lines = refused(axes)
    assert all("\n" not in line and re.search(r" reads \w+ \(.+\).*, but \w+ .*writes ", line) for line in lines)
    assert any(line.startswith("NoiseEndpoint (Consistency, FlowGRPO, Ode) × GibbsTVE: ") for line in lines)
    assert any(line.startswith("NoiseEndpoint (Ode) × GaussianRatio: ") for line in lines)
    assert any(line.startswith("CausalHistoryRouting (") and "OnPolicyTransitions" in line for line in lines)
    assert any(line.startswith("NFT × BranchKL: BranchKL reads BranchLogits") for line in lines)


def test_every_kernel_is_shown_and_wrappers_say_that_they_follow_what_they_wrap(axes: Axes):
    noise = [one for one in axes.explorations if one.name == "NoiseEndpoint"]
    assert [one.setting for one in noise] == [type(kernel).__name__ for kernel in KERNELS]
    assert [type(one.part.kernel).__name__ for one in noise] == [one.setting for one in noise]
    assert "Several: fits where what it wraps (`parts`) fits" in axes.left_out
    assert "ShuffledSiblings: fits where what it wraps (`rule`) fits" in axes.left_out
    assert labelled(noise[:0]) == "none"


# parts of others


def test_the_parts_of_somebody_else_are_in_the_tables_by_themselves(theirs: str, capsys: pytest.CaptureFixture[str]):
    text = printed(capsys, "--plugin", theirs)
    cells = {row[0]: row for row in rows(text) if row[0] in ("Reader", "Lonely")}
    assert cells["Lonely"][1:] == ["none", "–"]
    fitting = [row for row in rows(text) if row[0] == "Reader"]
    assert {one for row in fitting for one in spread(row[1])} >= {"Still", "NoiseEndpoint Ode"}
    for row in fitting:
        displaced = not any("Noise" in one for one in spread(row[1]))
        assert ("DisplacedOnly" in spread(row[2])) == displaced, "noise leaves predictions, none of them displaced"
        assert "BranchKL" in spread(row[2])
    assert "Lonely reads Secret (What nobody writes), but Still with kernel Ode writes only" in text
    assert "× Reader × DisplacedOnly: DisplacedOnly reads Displacements" in text
    assert "DisplacedOnly reads the reward signals liked, others, which the reward must give" in text


def test_a_part_that_cannot_be_tried_is_named_with_the_reason(theirs: str, capsys: pytest.CaptureFixture[str]):
    text = printed(capsys, "--plugin", theirs)
    assert "* Chosen: needs `measure`: Callable[[int], int], which has no default" in text
    assert "* Fussy: cannot be built without arguments: ValueError: weight is wrong" in text


def test_a_name_that_two_packages_offer_is_shown_in_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "another_nft.py").write_text(THEIRS.replace("class Reader", "class NFT").replace("(Reader)", "(NFT)"))
    shown = {row[0] for row in rows(printed(capsys, "--plugin", str(tmp_path / "another_nft.py")))}
    assert {"nft.NFT", "another_nft.NFT", "GibbsTVE"} <= shown


def test_one_part_and_the_table_are_not_asked_for_together(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        cli.main(["list", "--compat", "nft.NFT"])
    assert "not allowed with argument --compat" in capsys.readouterr().err


# the page


def test_the_page_ends_with_what_the_command_prints(capsys: pytest.CaptureFixture[str]):
    page = PAGE.read_text(encoding="utf-8")
    assert page.split(START)[1] == printed(capsys), (
        "write it again: sed -i '/^<!-- From here on/q' docs/compatibility.md && "
        "armillary list --compat >> docs/compatibility.md"
    )


def test_every_link_of_the_page_leads_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", PAGE.read_text(encoding="utf-8"))
    assert links and not [link for link in links if not (PAGE.parent / link).exists()]
