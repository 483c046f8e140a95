"""How the benchmarks measure: core-seconds, ratios in alternating pairs, and the live bytes of tensors."""

import math
import platform
import statistics
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Row:
    """One line of the table.

    value: a ratio, or a quantity in ``unit``. spread: lowest and highest pair, where pairs were measured. goal: the
    largest value that meets it, None for what is only reported. planted: a deliberate fault, which must miss the goal.
    A value of NaN was not measured; the note says why.
    """

    name: str
    measure: str
    value: float
    goal: float | None = None
    spread: tuple[float, float] | None = None
    unit: str = ""
    note: str = ""
    planted: bool = False

    @property
    def as_wanted(self) -> bool:
        """The goal is met, or the planted fault is seen."""
        return self.goal is None or (self.value > self.goal if self.planted else self.value <= self.goal)

    @property
    def verdict(self) -> str:
        if self.goal is None:
            return "not measured" if math.isnan(self.value) else "reported"
        return {(False, True): "met", (False, False): "MISSED", (True, True): "seen", (True, False): "NOT SEEN"}[
            self.planted, self.as_wanted
        ]


Work = Callable[[], object]
"""Something to measure."""


@dataclass(frozen=True)
class Seconds:
    """What one call took. core: process time, meaningful on one thread only, since idle threads of a pool spin. wall:
    only ever shown beside it."""

    core: float
    wall: float


@dataclass(frozen=True)
class Ratio:
    """Core-seconds of one thing over another, from alternating pairs."""

    pairs: tuple[tuple[Seconds, Seconds], ...]  # (a, b)

    @property
    def ratios(self) -> list[float]:
        return [a.core / b.core for a, b in self.pairs]

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)

    @property
    def spread(self) -> tuple[float, float]:
        return min(self.ratios), max(self.ratios)

    @property
    def note(self) -> str:
        """Median seconds of both."""
        sides = [[pair[i] for pair in self.pairs] for i in range(2)]
        core = " / ".join(f"{statistics.median(s.core for s in side):.2f}" for side in sides)
        wall = " / ".join(f"{statistics.median(s.wall for s in side):.2f}" for side in sides)
        return f"{core} core-s (wall {wall} s), {len(self.pairs)} pairs"


def clock(work: Work) -> Seconds:
    """Time one call."""
    core, wall = time.process_time(), time.perf_counter()
    work()
    return Seconds(time.process_time() - core, time.perf_counter() - wall)


def alternate(a: Work, b: Work, pairs: int) -> Ratio:
    """Time a and b in turn, A B A B, after one unmeasured call each, so that a drift of the machine hits both."""
    a()
    b()
    return Ratio(tuple((clock(a), clock(b)) for _ in range(pairs)))


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind tensors; views of one storage count once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that were made inside the context and are alive.

    Every operation's new storages are added when it returns and taken off by a finalizer, so a tensor counts for as
    long as anybody holds it, be it Python, a view or autograd's graph. Storages that existed before, such as weights,
    are never counted; scratch memory inside an operation is not seen. Slow: for bytes, not for seconds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: dict[int, weakref.finalize] = {}  # by identity of the storage object, which its finalizer removes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for storage in _storages((args, kwargs)):
            self._note(storage, 0)  # met for the first time as an input: it was there before the context
        out = func(*args, **kwargs)
        for storage in _storages(out):
            self._note(storage, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def _note(self, storage: torch.UntypedStorage, size: int) -> None:
        if id(storage) not in self._known:
            self.live += size
            self._known[id(storage)] = weakref.finalize(storage, self._gone, id(storage), size)

    def _gone(self, key: int, size: int) -> None:
        del self._known[key]
        self.live -= size


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def machine() -> str:
    """The processor, the versions and the number of threads, in one line."""
    names = [
        line.split(":", 1)[1].strip()
        for line in (Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else [])
        if line.startswith("model name")
    ]
    processor = names[0] if names else platform.processor() or platform.machine()
    return (
        f"{processor} ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} thread, "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )


def table(rows: Iterable[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| row | measure | value | min – max | goal | |", "|---|---|---|---|---|---|"]
    for row in rows:
        digits = 1 if row.unit else 3
        spread = "" if row.spread is None else " – ".join(f"{end:.{digits}f}" for end in row.spread)
        goal = "" if row.goal is None else ("> " if row.planted else "≤ ") + f"{row.goal:g}"
        value = "–" if math.isnan(row.value) else f"{row.value:.{digits}f} {row.unit}".rstrip()
        measure = f"{row.measure}; {row.note}" if row.note else row.measure
        lines.append(f"| {row.name} | {measure} | {value} | {spread} | {goal} | {row.verdict} |")
    return "\n".join(lines)
