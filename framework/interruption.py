"""Signals that end a run between two steps: SIGTERM of a scheduler and Ctrl-C leave a checkpoint behind."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(KeyboardInterrupt):
    """A signal ended the run. The message says what was saved and how to go on; exit_code is 128 + its number."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class Interruption:
    """While it is entered, a signal raises `Stopped`: at once, or at the end of a block that defers it.

    resume: how to go on, for the message. agree: what several processes make of the signal that each has seen (0 for
    none), so that all stop after the same step; asked once per deferred block, by `poll`. A second signal acts as it
    would have without this. A signal that the process was started to ignore, as shells do with Ctrl-C for commands in
    the background, stays ignored. Outside the main thread, where Python delivers no signals, nothing is installed.
    """

    def __init__(self, resume: str, agree: Callable[[int], int] = lambda seen: seen) -> None:
        self.resume = resume
        self.saved = "nothing since the last checkpoint"
        self._agree = agree
        self._seen = self._agreed = 0
        self._deferring = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._receive) for number in heard}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        self._before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)  # pyright: ignore[reportArgumentType]
        if not self._deferring:
            raise self._stopped(number)
        self._seen = number
        # not print: it may have been interrupted in the middle of a line
        os.write(2, b"\narmillary: stopping after this step; once more stops at once\n")

    def poll(self) -> bool:
        """Whether to stop at the end of this block; the same on all processes."""
        self._agreed = self._agree(self._seen)
        return bool(self._agreed)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """A block that is not to be torn: a signal waits for its end, if `poll` has seen it."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        if self._agreed:
            raise self._stopped(self._agreed)

    def check(self) -> None:
        """Raises `Stopped` for a signal that came too late for the last block: while its checkpoint was written."""
        with self.deferred():
            self.poll()

    def _stopped(self, number: int) -> Stopped:
        return Stopped(number, f"stopped by {signal.Signals(number).name}, {self.saved}; go on with: {self.resume}")
