"""Pages whose code runs: ```python blocks in one namespace, and the ```text block after each, which it must print.

    python -m tests.pages docs/training_step.md        # run a page and write what its blocks print into it

A block whose first line names a file, ``# file.py``, quotes it and does not run. Text and whole numbers must agree
exactly. A number with a decimal point may be off by two units of its last digit or two per cent, whichever is more:
other processors round otherwise.
"""

import contextlib
import io
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DOCS = Path(__file__).resolve().parent.parent / "docs"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
QUOTED = re.compile(r"# ([\w.]+\.\w+)\n")
DECIMAL = re.compile(r"(?<![\w.])[-−]?\d+\.\d*(?:e[-+]?\d+)?")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page. start, stop: of its text inside the page."""

    language: str
    text: str
    start: int
    stop: int


def blocks(page: str) -> list[Block]:
    """All fenced blocks that name a language."""
    return [Block(m[1], m[2], m.start(2), m.end(2)) for m in FENCE.finditer(page)]


def quotations(page: str) -> list[tuple[str, str]]:
    """(name of a file, what is said to stand in it)."""
    named = [(QUOTED.match(block.text), block.text) for block in blocks(page)]
    return [(match[1], text[match.end() :]) for match, text in named if match is not None]


def run(code: str, namespace: dict[str, Any]) -> str:
    """What a block prints; it runs in the namespace."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "<page>", "exec"), namespace)
    return printed.getvalue()


def examples(page: str) -> Iterator[tuple[Block, Block | None]]:
    """Every python block that runs with the text block that follows it, None where another block or none does."""
    found = blocks(page)
    for block, after in zip(found, [*found[1:], None], strict=True):
        if block.language == "python" and not QUOTED.match(block.text):
            yield block, after if after is not None and after.language == "text" else None


def disagreement(shown: str, printed: str) -> str | None:
    """The first line in which they differ; None where they agree as the head of this file says."""
    lines = [text.rstrip("\n").split("\n") for text in (shown, printed)]
    if len(lines[0]) != len(lines[1]):
        return f"shows {len(lines[0])} lines, prints {len(lines[1])}: {printed!r}"
    for left, right in zip(*lines, strict=True):
        numbers = zip(DECIMAL.findall(left), DECIMAL.findall(right), strict=False)
        if DECIMAL.sub("#", left) != DECIMAL.sub("#", right) or not all(agree(*pair) for pair in numbers):
            return f"shows {left!r}, prints {right!r}"
    return None


def agree(shown: str, printed: str) -> bool:
    """Two decimal numbers, the first as precise as it is written."""
    mantissa, _, exponent = shown.replace("−", "-").partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    left, right = float(shown.replace("−", "-")), float(printed.replace("−", "-"))
    return math.isclose(left, right, rel_tol=0.02, abs_tol=2.001 * unit)


def check_page(page: str) -> None:
    """Run a page; assert that every text block is what the python block before it prints."""
    torch.set_num_threads(1)
    namespace: dict[str, Any] = {"__name__": "page"}
    for code, shown in examples(page):
        printed = run(code.text, namespace)
        difference = disagreement("" if shown is None else shown.text, printed)
        assert difference is None, f"after `{code.text.strip().splitlines()[-1]}` the page {difference}"


def rewritten(page: str) -> str:
    """The page with what its blocks print now."""
    torch.set_num_threads(1)
    namespace: dict[str, Any] = {"__name__": "page"}
    pieces, last = [], 0
    for code, shown in examples(page):
        printed = run(code.text, namespace)
        if shown is not None:
            pieces += [page[last : shown.start], printed]
            last = shown.stop
        elif printed:
            raise SystemExit(f"this block prints and has no ```text block after it:\n{code.text}")
    return "".join([*pieces, page[last:]])


if __name__ == "__main__":
    for name in sys.argv[1:]:
        Path(name).write_text(rewritten(Path(name).read_text(encoding="utf-8")), encoding="utf-8")
