"""The tables of the method pages name functions, tests, golden cases and settings that exist."""

import ast
import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from framework.config.registry import ConfigError, Registry
from tests.golden.runner import KINDS
from tests.pages import DOCS

ROOT = DOCS.parent
PAGES = sorted(DOCS.glob("methods_*.md"))
COLUMNS = ("equation or rule", "function", "tested by", "paper default", "knob")
NAMED = re.compile(r"`([^`]+)`")
NONE = "–"
"""What stands where there is nothing to set."""


@dataclass(frozen=True)
class Row:
    """A row of a table: its cells by column."""

    page: str
    cells: dict[str, str]

    def names(self, column: str) -> list[str]:
        """What a cell names in backticks."""
        return NAMED.findall(self.cells[column])


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def rows_of(page: str) -> Iterator[Row]:
    """The rows of every table that says which function is meant."""
    for table in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
        head, _, *lines = table.splitlines()
        if "function" in cells_of(head):
            assert tuple(cells_of(head)) == COLUMNS, f"a table of functions has the columns {cells_of(head)}"
            for line in lines:
                assert len(cells_of(line)) == len(COLUMNS), f"not {len(COLUMNS)} cells: {line}"
                yield Row(page, dict(zip(COLUMNS, cells_of(line), strict=True)))


def modules_of(page: str) -> list[Any]:
    """The modules of the source files that a page names."""
    paths = dict.fromkeys(re.findall(r"`((?:framework|strategies|backbones|rewards)/[\w/]+\.py)`", page))
    return [importlib.import_module(path.removesuffix(".py").replace("/", ".")) for path in paths]


def find_function(page: str, name: str) -> None:
    """Asserts that a file of the page defines the name; of a class its member or field."""
    owner, *members = name.split(".")
    found = [vars(module)[owner] for module in modules_of(page) if owner in vars(module)]
    assert found, f"no file that the page names has {owner}"
    for member in members:
        fields = getattr(found[0], "__dataclass_fields__", {})
        assert member in fields or member in dir(found[0]), f"{owner} has no {member}"


@cache
def names_in(file: str) -> frozenset[str]:
    """Names of the test functions of the one file of that name."""
    (path,) = ROOT.glob(f"tests/**/{file}")
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def find_test(name: str) -> None:
    """Asserts that ``file.py::test`` exists, or that the name is a kind of golden case."""
    file, separator, test = name.partition("::")
    assert (file in KINDS) if not separator else (list(ROOT.glob(f"tests/**/{file}")) and test in names_in(file)), (
        f"there is no test {name}"
    )


@cache
def macros() -> frozenset[str]:
    """What the packaged gin files bind in capitals."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("configs/**/*.gin"))
    return frozenset(re.findall(r"^([A-Z_]+) = ", text, re.MULTILINE))


def find_knob(name: str, before: str | None) -> str | None:
    """Asserts that a setting exists; the part that it belongs to, which a following ``.name`` means too."""
    if name in macros():
        return before
    part, _, parameter = name.rpartition(".")
    part = part or before or ""
    try:
        Registry().find(part).parameter(parameter)
    except ConfigError as error:
        raise AssertionError(f"{name} is no setting: {error}") from error
    return part


def check_row(row: Row) -> None:
    """Every cell says something, and what it names exists."""
    assert all(row.cells.values()), f"an empty cell: {row.cells}"
    assert row.names("function") and row.names("tested by"), f"no function or no test: {row.cells}"
    for name in row.names("function"):
        find_function(row.page, name)
    for name in row.names("tested by"):
        find_test(name)
    part: str | None = None
    for name in row.names("knob"):
        part = find_knob(name, part)
    assert row.names("knob") or row.cells["knob"] == NONE, f"a knob that is no name: {row.cells['knob']}"


def check_page(page: str) -> None:
    rows = list(rows_of(page))
    assert len(rows) > 5, "a method page has a table of its equations"
    for row in rows:
        check_row(row)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_what_a_table_names_exists(path: Path):
    check_page(path.read_text(encoding="utf-8"))


def test_there_is_a_page_for_every_method():
    assert {path.stem for path in PAGES} == {f"methods_{name}" for name in ("nft", "astrolabe", "kvpo", "raven")}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("`implicit_policies`", "`implicit_policy`"),
        ("`NFT.probes`", "`NFT.probe`"),
        ("`strategies/surrogates/nft.py`", "`strategies/surrogates/gibbs_tve.py`"),
        ("::test_the_gradient_equals_its_closed_form", "::test_the_gradient_equals_another"),
        ("`test_branch_weights.py::", "`test_branch_weight.py::"),
        ("| `l1`, ", "| `l8`, "),
        ("`nft.NFT.beta`", "`nft.NFT.betta`"),
        ("`nft.NFT.space`", "`nft.NTF.space`"),
        ("`ADVANTAGE`", "`ADVANTAGES`"),
        ("`nft.NFT.advantage_limit`", "A_max"),
        ("| A_max = 5 |", "| |"),
        ("| tested by |", "| tests |"),
    ],
)
def test_the_page_check_sees_a_name_that_is_gone(old: str, new: str):
    page = (DOCS / "methods_nft.md").read_text(encoding="utf-8")
    assert old in page
    with pytest.raises(AssertionError):
        check_page(page.replace(old, new))


def test_a_setting_without_a_part_belongs_to_the_part_before_it():
    assert find_knob(".clip_high", find_knob("gibbs_tve.GibbsTVE.clip_low", None)) == "gibbs_tve.GibbsTVE"
    for name, before in ((".clip_high", None), (".clip_high", "nft.NFT")):
        with pytest.raises(AssertionError):
            find_knob(name, before)
