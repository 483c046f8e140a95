"""Which kinds of golden cases there are, and running one file so that nothing in it is skipped silently."""

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from tests.golden import b1, b2, b3, b4, b5, b6, b7, b8, l1, l2, l3, l4, l5, l6, l7
from tests.golden import rewards as rewards_folder
from tests.golden.case import Case, Kind, Row, read_case

KINDS: dict[str, Kind] = {
    "b1": b1,
    "b2": b2,
    "b3": b3,
    "b4": b4,
    "b5": b5,
    "b6": b6,
    "b7": b7,
    "b8": b8,
    "l1": l1,
    "l2": l2,
    "l3": l3,
    "l4": l4,
    "l5": l5,
    "l6": l6,
    "l7": l7,
}
"""The kinds that are taken up: one module each."""
LATER: tuple[str, ...] = ()
"""The kinds that the golden set has beside them."""
REWARDS = "rewards"
"""The kind of all JSON files."""


@dataclass(frozen=True)
class Report:
    """What running a file gave. left: tensors that are declared as not taken up."""

    case: Case
    rows: tuple[Row, ...]
    left: tuple[str, ...]

    @property
    def misses(self) -> list[Row]:
        return [row for row in self.rows if not row.passed]


def kind_of(path: Path) -> str:
    """The kind a file's name starts with; of a JSON file, what its entries say: one of the rewards folder, or its name.

    Raises ValueError for a kind that the golden set does not have.
    """
    if path.suffix == ".json":
        return REWARDS if rewards_folder.is_golden(path) else path.name
    match = re.match(r"[a-z]+\d+(?![a-z0-9])", path.stem)
    kind = match[0] if match else path.stem
    if kind not in KINDS and kind not in LATER:
        raise ValueError(f"{path} is of no known kind: {kind!r} is not among {sorted((*KINDS, *LATER))}")
    return kind


def run_file(path: Path) -> Report:
    """Compare one file. Raises ValueError for a kind not taken up, an unreadable file, and a tensor left over."""
    if path.suffix == ".json":
        return Report(Case(path.stem, {}, {}), tuple(rewards_folder.check_file(path)), ())
    kind = kind_of(path)
    if kind not in KINDS:
        raise ValueError(f"{path}: not taken up: {kind}")
    return run_case(read_case(path), KINDS[kind])


def run_case(case: Case, kind: Kind) -> Report:
    """Compare one case. Raises ValueError for a tensor that is neither compared nor declared."""
    rows = kind.check(case)
    compared = {row.tensor for row in rows}
    left = _matching(case, kind.NOT_TAKEN_UP)
    over = set(case.tensors) - compared - left - _matching(case, kind.INPUTS)
    if over:
        raise ValueError(f"{case.name}: neither compared nor declared as an input: {', '.join(sorted(over))}")
    return Report(case, tuple(rows), tuple(sorted(left)))


def _matching(case: Case, patterns: tuple[str, ...]) -> set[str]:
    return {name for name in case.tensors if any(fnmatchcase(name, pattern) for pattern in patterns)}
