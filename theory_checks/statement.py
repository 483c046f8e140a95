"""What a check returns: the statement, the instance it was tried on, and the residual against its tolerance."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One checked result.

    residual: largest violation found. tolerance: what rounding explains. planted: the residual of the same check with
    an error planted in it; it must exceed the tolerance, or the check could not fail.
    """

    statement: str
    instance: str
    residual: float
    tolerance: float
    planted: float

    @property
    def holds(self) -> bool:
        """The statement holds and its planted error is seen."""
        return self.residual <= self.tolerance < self.planted

    @property
    def verdict(self) -> str:
        return "holds" if self.holds else "FAILS"
