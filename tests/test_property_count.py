"""How many properties the project states: tests that hold for drawn inputs, counted in the source of the tests."""

import ast
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
DRAWING = ("given", "over")
"""Decorators that draw the arguments of a test."""


def called(node: ast.AST) -> str:
    """Name of what a call or a decorator calls, without its module."""
    target = node.func if isinstance(node, ast.Call) else node
    return target.attr if isinstance(target, ast.Attribute) else getattr(target, "id", "")


def properties(source: str) -> list[str]:
    """Tests of a file that are tried on drawn inputs: decorated so, or with a `holds` in the body.

    A test with parameters counts once, and so does one with several `holds`.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            decorated = any(called(decorator) in DRAWING for decorator in node.decorator_list)
            asserted = any(isinstance(inner, ast.Call) and called(inner) == "holds" for inner in ast.walk(node))
            if decorated or asserted:
                found.append(node.name)
    return found


def test_the_project_states_at_least_sixty_properties(capsys: pytest.CaptureFixture[str]) -> None:
    counts = {path: len(properties(path.read_text("utf-8"))) for path in sorted(FOLDER.rglob("test_*.py"))}
    with capsys.disabled():
        print(f"\n{sum(counts.values())} properties over drawn inputs in {sum(map(bool, counts.values()))} test files")
    assert sum(counts.values()) >= 60


def test_only_tests_that_draw_are_counted() -> None:
    source = """
@over(st.integers(), examples=3)
def test_a(x): ...
@settings(deadline=None)
@hypothesis.given(st.integers())
def test_b(x): ...
@pytest.mark.parametrize("y", [1, 2])
def test_c(y):
    holds(check, st.integers())
    holds(other, st.integers())
def test_d(): refuted(check, st.integers())
def holds(check): ...
def helper(): holds(check)
"""
    assert properties(source) == ["test_a", "test_b", "test_c"]
