"""A stream that is told what to show while it is watched: prompts come from standard input, a line at a time."""

import json
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from framework.film import Direction, Take
from framework.reporting.progress import say

QUIT = ":quit"
HELP = "type a prompt to change what is shown, '# prompt' for a new shot, an empty line to go on, :quit to end"


class Lines:
    """Lines of a text stream, read by a thread, so that generating never waits for a person."""

    def __init__(self, source: TextIO) -> None:
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, args=(source,), daemon=True, name="prompts").start()

    def _read(self, source: TextIO) -> None:
        for line in source:
            self._lines.put(line.strip())
        self._lines.put(None)

    def wait(self) -> str | None:
        """The next line, once it is there; None at the end of the input."""
        return self._lines.get()

    def ready(self) -> str | None:
        """The next line if one is there, else an empty one; None at the end of the input."""
        try:
            return self._lines.get_nowait()
        except queue.Empty:
            return ""


def converse(lines: Lines, first: str | None, blocks: int | None) -> Iterator[Direction]:
    """One direction a block, of at most one waiting line each, so that nothing typed is passed over.

    first: the first prompt, None to wait for one. blocks: how many at most; None for no end. Without one, the end of
    the input ends the stream too. Lines that start with ``:`` are commands; the one there is is ``:quit``.
    """
    while first is None or not first.strip():
        first = lines.wait()
        if first is None or first == QUIT:
            return
        if first.startswith(":"):
            say(f"{first!r} is no command; {HELP}")
            first = None
    yield Direction((first,))
    over, block = False, 1
    while blocks is None or block < blocks:
        line = "" if over else lines.ready()
        over = over or line is None
        if line == QUIT or (over and blocks is None):
            return
        if line is not None and line.startswith(":"):
            say(f"{line!r} is no command; {HELP}")
            line = ""
        cut = line is not None and line.startswith("#")
        prompt = (line or "").removeprefix("#").strip()
        yield Direction((prompt or None,), cut=cut and bool(prompt))
        block += 1


class PromptLog:
    """A file with one JSON object per change: ``{"frame": 24, "prompt": "…", "cut": false}``, frames of the mp4."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def note(self, take: Take) -> None:
        """Write a take's prompt, if it took effect with it."""
        if take.changed or take.cut:
            record = {"frame": take.first_frame, "prompt": take.prompts[0], "cut": take.cut and take.first_frame > 0}
            with self._path.open("a", encoding="utf-8") as log:
                log.write(json.dumps(record, ensure_ascii=False) + "\n")


def say_why(error: ValueError) -> None:
    """Tell whoever types why a prompt was not taken."""
    say(f"not taken: {error}")
