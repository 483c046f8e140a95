"""`python -m benchmarks` prints the table of all rows, `python -m benchmarks p2` one row; nothing is written.

Everything runs on one thread and is timed in core-seconds. The exit status is 1 where a goal is missed or a planted
leak is not seen.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence

import torch

from benchmarks import p1, p2, p3, p4, p5, p6, p7, p8, streaming
from benchmarks.measure import Row, machine, table

ROWS: dict[str, Callable[[], list[Row]]] = {
    "p1": p1.measure,
    "p2": p2.measure,
    "p3": p3.measure,
    "p4": p4.measure,
    "p5": p5.measure,
    "p6": p6.measure,
    "p7": p7.measure,
    "p8": p8.measure,
    "streaming": streaming.measure,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the named rows, all of them by default; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"any of {', '.join(ROWS)}; all of them by default")
    wanted = parser.parse_args(arguments).rows or list(ROWS)
    unknown = [name for name in wanted if name not in ROWS]
    if unknown:
        parser.error(f"no row is called {unknown[0]!r}; the rows are {', '.join(ROWS)}")

    torch.set_num_threads(1)
    rows: list[Row] = []
    for name in wanted:
        started = time.perf_counter()
        rows += ROWS[name]()
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    print(f"{machine()}\n\n{table(rows)}")
    return 0 if all(row.as_wanted for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
