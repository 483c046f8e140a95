"""The claims as a table: for the terminal, as claims.md and as claims.csv."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from framework.claims import Claim, Interval, Verdict
from framework.reporting.report import markdown_table

COLUMNS = (
    "name", "statement", "paper", "source", "measures", "claimed", "mean", "low", "high", "seeds", "verdict", "core_s",
    "reason",
)  # fmt: skip
HEADERS = ("claim", "paper's figure", "ours measures", "ours [95 %]", "by seed", "claimed", "verdict", "core-s")


@dataclass(frozen=True)
class Finding:
    """What became of a claim. seeds: mean effect of each. reason: why there is no interval, where there is none.

    training_s: core-seconds of the runs that it reads, their evaluations included. measuring_s: of what it measured.
    """

    claim: Claim
    verdict: Verdict
    interval: Interval | None = None
    seeds: tuple[float, ...] = ()
    training_s: float = 0.0
    measuring_s: float = 0.0
    reason: str = ""

    @property
    def core_s(self) -> float:
        """Of all that the claim needed; claims may share runs."""
        return self.training_s + self.measuring_s

    def number(self, value: float) -> str:
        """An effect as it is shown; differences from 0 carry their sign."""
        signed = "+" if 0.0 in self.claim.region else ""
        return f"{value:{signed}.{self.claim.digits}f}" if math.isfinite(value) else ("∞" if value > 0 else "−∞")

    @property
    def ours(self) -> str:
        """Effect and interval; an exact one alone."""
        if self.interval is None:
            return ""
        mean, low, high = map(self.number, self.interval)
        return mean if self.claim.evidence.exact else f"{mean} [{low}, {high}]"

    @property
    def by_seed(self) -> str:
        """Mean effect of every seed."""
        return "" if self.claim.evidence.exact else " ".join(map(self.number, self.seeds))


def terminal_rows(findings: Sequence[Finding]) -> tuple[list[list[str]], tuple[str, ...]]:
    """(rows, headers) for a terminal."""
    headers = ("claim", "paper", "ours [95 %]", "claimed", "verdict", "core-s")
    rows = [
        [f.claim.name, f.claim.paper, f.ours, f.claim.rule, str(f.verdict), f"{f.core_s:.0f}"] for f in findings
    ]  # fmt: skip
    return rows, headers


def markdown(findings: Sequence[Finding], total: str) -> str:
    """The whole table, with statements, sources and single seeds. total: a line about the cost of all."""
    rows = [
        [f"**{f.claim.name}**: {f.claim.statement}", f"{f.claim.paper} ({f.claim.source})", f.claim.measures,
         f.ours or f.reason, f.by_seed, f.claim.rule, str(f.verdict), f"{f.core_s:.0f}"]
        for f in findings
    ]  # fmt: skip
    return f"{markdown_table(rows, HEADERS)}\n\n{total}\n"


def write_csv(findings: Sequence[Finding], path: Path) -> None:
    """One row per claim in the order of `COLUMNS`; empty where there is no number."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for f in findings:
            interval = ("", "", "") if f.interval is None else f.interval
            seeds = " ".join(repr(value) for value in f.seeds)
            c = f.claim
            writer.writerow([c.name, c.statement, c.paper, c.source, c.measures, c.rule, *interval, seeds,
                             str(f.verdict), f"{f.core_s:.1f}", f.reason])  # fmt: skip
