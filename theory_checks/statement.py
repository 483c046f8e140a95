"""What a check returns: the statement, the instance it was tried on, and the residual against its tolerance."""

import math
from dataclasses import dataclass


def worst(*residuals: float) -> float:
    """The largest residual; NaN where one of them is, which `max` would lose or keep depending on the order."""
    return math.nan if any(math.isnan(residual) for residual in residuals) else max(residuals)


@dataclass(frozen=True)
class Finding:
    """One checked result.

    residual: largest violation found. tolerance: what rounding explains. planted: the residual of the same check with
    an error planted in it; it must exceed the tolerance and be finite, or the check could not fail.
    """

    statement: str
    instance: str
    residual: float
    tolerance: float
    planted: float

    @property
    def holds(self) -> bool:
        """The statement holds and its planted error is seen."""
        return self.residual <= self.tolerance < self.planted < math.inf

    @property
    def verdict(self) -> str:
        return "holds" if self.holds else "FAILS"
