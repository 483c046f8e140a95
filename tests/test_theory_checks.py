"""Every theory check holds, and sees the error that is planted in it."""

from types import ModuleType

import pytest

from theory_checks.__main__ import CHECKS


@pytest.mark.parametrize("module", CHECKS, ids=lambda module: module.__name__.rsplit(".", 1)[-1])
def test_a_statement_holds_and_its_planted_error_is_seen(module: ModuleType) -> None:
    finding = module.check()
    assert finding.residual <= finding.tolerance
    assert finding.planted > finding.tolerance
    assert finding.holds
