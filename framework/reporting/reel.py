"""From takes to files: every block is written when it comes, and how fast they came is measured."""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from framework.film import Take
from framework.reporting.videos import Mp4Writer, visible_scale


class Reel:
    """Writes takes into mp4 files and measures them; one for all videos of a command.

    fps: of the files. scale: whole factor of enlargement, None for one that shows small frames.
    """

    def __init__(self, fps: float, scale: int | None = None) -> None:
        self.fps, self.scale = fps, scale
        self.paths: list[Path] = []
        self.latencies: list[float] = []
        """Seconds from a direction to the frames, per generated block."""
        self.first: float | None = None
        """Seconds to the frames of the first generated block, text and given blocks included."""
        self.frames, self.seconds = 0, 0.0

    def write(
        self, takes: Iterable[Take], paths: Sequence[Path], watch: Callable[[Take], object], endless: bool = False
    ) -> None:
        """Append every take to one file per clip, and show it to ``watch``. A failure leaves no file behind.

        endless: whether Ctrl-C is how a person ends the stream, whose file is then kept. Without any take nothing is
        written.
        """
        started, waited = time.perf_counter(), 0.0
        with ExitStack() as stack:
            writers: list[Mp4Writer] = []
            try:
                for take in takes:
                    if not writers:
                        scale = visible_scale(take.frames.shape[-2]) if self.scale is None else self.scale
                        writers = [stack.enter_context(Mp4Writer(path, self.fps, scale=scale)) for path in paths]
                        self.paths += paths
                    for writer, clip in zip(writers, take.frames, strict=True):
                        writer.write(clip)
                    watch(take)
                    waited += take.seconds
                    if not take.given:
                        self.latencies.append(take.seconds)
                        self.first = waited if self.first is None else self.first
                    self.frames += take.frames.shape[0] * take.frames.shape[1]
            except KeyboardInterrupt:
                if not endless or not writers:
                    raise
        self.seconds += time.perf_counter() - started

    def report(self) -> list[str]:
        """What was made, how fast, and where it lies."""
        if self.first is None:
            return ["nothing was generated", *(f"saved {path}" for path in self.paths)]
        median, late = 1000 * np.quantile(self.latencies, [0.5, 0.95])
        first = 1000 * self.first
        return [
            f"{self.frames} frames in {self.seconds:.1f} s, {self.frames / self.seconds:.1f} frames per second "
            f"({len(self.paths)} streams, writing included; a stream plays at {self.fps:g})",
            f"latency of a block: median {median:.0f} ms, p95 {late:.0f} ms; first frame after {first:.0f} ms",
            *(f"saved {path}" for path in self.paths),
        ]
