"""Progress of everything long, on stderr, without flooding a log file."""

import os
import sys
import time
from collections.abc import Iterable
from typing import Any, TypeVar, overload

from tqdm import tqdm

T = TypeVar("T")
SWITCH = "ARMILLARY_PROGRESS"
LOG_SECONDS = 10.0
"""Seconds between lines where stderr is not a terminal; what is done sooner prints nothing."""


class _LogLines:
    """A text stream for tqdm that prints a whole line now and then, and the last one, instead of redrawing one.

    tqdm redraws at each change of a postfix too, so the pause between lines is kept here.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds, self._printed, self._pending = seconds, time.monotonic(), ""

    def write(self, text: str) -> int:
        ended = text.endswith("\n")  # tqdm ends the line when a bar closes, and only then
        self._pending = text.strip() or self._pending
        if self._pending and (ended or time.monotonic() - self._printed >= self._seconds):
            sys.stderr.write(self._pending + "\n")
            self._printed, self._pending = time.monotonic(), ""
        return len(text)

    def flush(self) -> None:
        sys.stderr.flush()


@overload
def progress(work: int, description: str, *, done: int = 0) -> "tqdm[Any]": ...
@overload
def progress(work: Iterable[T], description: str, *, done: int = 0) -> "tqdm[T]": ...
def progress(work: Any, description: str, *, done: int = 0) -> "tqdm[Any]":
    """A bar with the remaining time over an iterable, or over a number of units that ``.update(n)`` reports.

    done: units finished before, e.g. of a resumed run. The bar appears on rank 0 (environment variable RANK) only.
    ARMILLARY_PROGRESS=0 switches all bars off. Where stderr is not a terminal, a plain line every 10 s takes its place.
    Raises ValueError for other values of ARMILLARY_PROGRESS.
    """
    wanted = os.environ.get(SWITCH, "1")
    if wanted not in ("0", "1"):
        raise ValueError(f"{SWITCH} must be 0 (no progress bars) or 1, got {wanted!r}")
    shown = wanted == "1" and os.environ.get("RANK", "0") == "0"
    source: dict[str, Any] = {"total": work} if isinstance(work, int) else {"iterable": work}
    if sys.stderr.isatty():
        style: dict[str, Any] = {"file": sys.stderr, "dynamic_ncols": True, "leave": None}
    else:
        style = {"file": _LogLines(LOG_SECONDS), "ncols": 100, "ascii": " .", "delay": LOG_SECONDS}
    return tqdm(desc=description, initial=done, disable=not shown, **source, **style)


def say(line: str) -> None:
    """Print a line on rank 0 without breaking a running bar."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(line)
