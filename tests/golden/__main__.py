"""``python -m tests.golden [FILE …]``: compare golden files; the exit status is 1 when anything misses.

Without files it runs the packaged folder, or the one that the environment variable ARMILLARY_GOLDEN names.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.golden.runner import KINDS, Report, kind_of, run_file

FOLDER = Path(__file__).parent.parent / "data" / "golden"


def main(arguments: Sequence[str]) -> int:
    """Run the named files, else a folder. Returns 0 when every comparison of every file is within its tolerance."""
    named = [Path(argument) for argument in arguments]
    folder = Path(os.environ.get("ARMILLARY_GOLDEN", FOLDER))
    files = named or sorted(folder.glob("*.safetensors"))
    if not files:
        print(f"no golden files (*.safetensors) in {folder}; name files or set ARMILLARY_GOLDEN")
        return 1
    later: list[str] = []
    compared = misses = failures = 0
    for path in files:
        try:
            kind = kind_of(path)
            if not named and kind not in KINDS:
                later.append(kind)
                continue
            report = run_file(path)
        except (
            ValueError,
            LookupError,
            TypeError,
            RuntimeError,
        ) as error:  # what a file can get wrong
            failures += 1
            print(f"{path.name}\n  ERROR  {error}")
            continue
        show(report)
        compared += len({row.tensor for row in report.rows})
        misses += len({row.tensor for row in report.misses})
    for kind in later:
        print(f"not taken up: {kind}")
    print(f"{compared} tensors compared, {misses} outside their tolerance, {failures} files failed")
    return 1 if misses or failures or not compared else 0


def show(report: Report) -> None:
    """One line per comparison: the largest error against the tolerance."""
    print(report.case.name)
    width = max(len(row.tensor) for row in report.rows)
    for row in report.rows:
        verdict = "ok  " if row.passed else "MISS"
        print(f"  {verdict}  {row.tensor:<{width}}  {row.error:8.1e}  (tolerance {row.tolerance:.0e})  {row.how}")
    for tensor in report.left:
        print(f"  not taken up: {tensor}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
