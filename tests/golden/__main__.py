"""``python -m tests.golden [FILE or FOLDER …]``: compare golden files; the exit status is 1 when anything misses.

Without any it runs the packaged folder, or the one that the environment variable ARMILLARY_GOLDEN names. Of a folder,
all .safetensors files, and all .json files in it and in its folder ``rewards``.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.golden.runner import KINDS, REWARDS, Report, kind_of, run_file

FOLDER = Path(__file__).parent.parent / "data" / "golden"


def main(arguments: Sequence[str]) -> int:
    """Run the named files, else a folder. Returns 0 when every comparison of every file is within its tolerance."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    given = [Path(argument) for argument in arguments]
    folders = [path for path in given if path.is_dir()]
    named = [path for path in given if not path.is_dir()]
    if not given:
        folders = [Path(os.environ.get("ARMILLARY_GOLDEN", FOLDER))]
    files = named + [file for folder in folders for file in files_of(folder)]
    if not files:
        print(f"no golden files (*.safetensors, *.json) in {folders[0]}; name files or set ARMILLARY_GOLDEN")
        return 1
    later: list[str] = []
    compared = misses = failures = 0
    for path in files:
        try:
            kind = kind_of(path)
            if path not in named and kind not in (*KINDS, REWARDS):
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


def files_of(folder: Path) -> list[Path]:
    """The golden files of a folder."""
    return [file for pattern in ("*.safetensors", "*.json", "rewards/*.json") for file in sorted(folder.glob(pattern))]


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
