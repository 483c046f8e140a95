"""What the pages tell a reader to type and to open is there: options, packaged files, linked files and headings."""

import re
import shlex
from pathlib import Path

import pytest

from framework.cli import build_parser
from framework.config.load import packaged_configs

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
PACKAGED = ("backbones/", "claims/", "crosses/", "embedded/", "papers/", "rewards/")
BLOCKS = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[str]:
    """The `armillary` lines of a page, continued ones in one piece, without comments."""
    page = page.replace("\\\n", " ")
    typed = ["    " + line for block in BLOCKS.findall(page) for line in block.splitlines()]
    lines = re.findall(r"^    (armillary .*)$", "\n".join([BLOCKS.sub("", page), *typed]), re.MULTILINE)
    return [line for line in lines if "…" not in line and ": error:" not in line and " NAME" not in line]


def check_command(line: str) -> None:
    """Fails unless a line is one that the command line reads, and names packaged files that exist."""
    words = shlex.split(line, comments=True)[1:]
    options, unknown = build_parser().parse_known_args(words)
    assert not unknown, (line, unknown)
    for name in [*(getattr(options, "gin_file", None) or ()), *(getattr(options, "arms", None) or ())]:
        if name.startswith(PACKAGED):
            assert name in packaged_configs(), (line, name)


def anchors(page: str) -> set[str]:
    """The headings of a page as links name them."""
    headings = re.findall(r"^#+ (.*)$", BLOCKS.sub("", page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading).lower()).replace(" ", "-") for heading in headings}


def broken_links(folder: Path, page: str) -> list[str]:
    """The links of a page in a folder that lead nowhere; addresses of the web are not asked."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", BLOCKS.sub("", page)):
        name, _, anchor = link.partition("#")
        target = folder / name
        if link.startswith(("http://", "https://")) or (not name and anchor in anchors(page)):
            continue
        if not name or not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_commands_and_links_that_exist(page: Path):
    text = page.read_text(encoding="utf-8")
    for line in commands(text):
        check_command(line)
    assert broken_links(page.parent, text) == []


def test_every_page_of_results_is_listed():
    listed = (ROOT / "docs" / "results" / "README.md").read_text(encoding="utf-8")
    for page in ROOT.glob("docs/results/*.md"):
        assert page.name == "README.md" or f"]({page.name})" in listed, page.name


@pytest.mark.parametrize(
    "line",
    [
        "armillary compare --arms embedded/nft.gin --seeds 3",
        "armillary train --gin_files embedded/nft.gin",
        "armillary train --gin_file embedded/ntf.gin",
    ],
)
def test_a_command_that_does_not_exist_is_seen(line: str):
    with pytest.raises((AssertionError, SystemExit)):
        check_command(line)


def test_a_link_that_leads_nowhere_is_seen():
    page = "# One\n[a](#one) [b](#two) [c](README.md) [d](NOREADME.md) [e](README.md#use) [f](README.md#usage)"
    assert broken_links(ROOT, page) == ["#two", "NOREADME.md", "README.md#usage"]
    assert commands("```\narmillary list   # x\n```\n    armillary score \\\n        a.mp4\n") != []
