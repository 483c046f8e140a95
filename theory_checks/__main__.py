"""`python -m theory_checks` prints statement, instance, residual and verdict of every check; exits 1 when one fails."""

import sys

from framework.reporting.report import format_table
from theory_checks import advantage_centring, consistency_kernel, nft_gradient

CHECKS = (nft_gradient, advantage_centring, consistency_kernel)


def main() -> int:
    findings = [module.check() for module in CHECKS]
    rows = [
        (f.statement, f.instance, *(f"{x:.1e}" for x in (f.residual, f.tolerance, f.planted)), f.verdict)
        for f in findings
    ]
    print(format_table(rows, ("statement", "instance", "residual", "tolerance", "planted error", "verdict")))
    return 0 if all(f.holds for f in findings) else 1


if __name__ == "__main__":
    sys.exit(main())
