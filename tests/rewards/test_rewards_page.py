"""docs/rewards.md names every reward and says what its code does; its example runs."""

import re

import pytest

from framework.config.registry import Registry, interface
from framework.interfaces import RewardModel
from tests.pages import DOCS, check_page

PAGE = (DOCS / "rewards.md").read_text(encoding="utf-8")


def reward_classes() -> set[str]:
    """All reward models that a gin file can name, without the functions that load them."""
    parts = Registry().offered()[0]
    classes = {name: part.target for name, part in parts.items() if isinstance(part.target, type)}
    return {name for name, target in classes.items() if interface(target) is RewardModel}


def check_named(page: str) -> None:
    missing = sorted(name for name in reward_classes() if f"`{name}`" not in page)
    assert not missing, f"docs/rewards.md does not name {missing}"


def test_the_page_names_every_reward():
    check_named(PAGE)


def test_the_check_of_names_sees_one_that_is_left_out():
    with pytest.raises(AssertionError, match=r"clip_score.ClipScore"):
        check_named(PAGE.replace("`clip_score.ClipScore`", "the CLIP score"))


def test_the_example_of_the_page_runs():
    check_page(PAGE)


def test_parts_that_the_page_names_exist():
    registry = Registry()
    named = set(re.findall(r"`((?:frame_sampling|optical_flow|encoders|pooling|aesthetic)\.[A-Za-z_]+)`", PAGE))
    assert len(named) >= 3
    for name in named:
        registry.find(name)


def test_what_is_not_for_commercial_use_is_said_and_not_imported():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ")]
    for model in ("AMT", "MUSIQ", "SEA-RAFT"):
        (row,) = [row for row in rows if row.startswith(f"| {model}")]
        assert "| no" in row
    sources = "".join(file.read_text(encoding="utf-8") for file in (DOCS.parent / "rewards").rglob("*.py"))
    assert not re.search(r"^\s*(?:import|from) (?:pyiqa|vbench|open_clip|torchmetrics|qwen_vl_utils)", sources, re.M)
