"""`python -m theory_checks` prints statement, instance, residual and verdict of every check; exits 1 when one fails."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from framework.reporting.report import format_table, markdown_table
from theory_checks import (
    advantage_centring,
    clip_regions,
    closed_form_kls,
    consistency_kernel,
    euler_maruyama,
    exact_denoiser,
    gaussian_gibbs,
    gibbs_contrast,
    gibbs_normalisation,
    group_integrity,
    history_gradient,
    improvement_theorem,
    kernel_kl,
    kernel_score,
    nft_gradient,
    nft_improvement,
    packed_cached,
    participation_weights,
    selective_trust_region,
)
from theory_checks.statement import Finding

CHECKS = (
    exact_denoiser,
    nft_gradient,
    nft_improvement,
    improvement_theorem,
    advantage_centring,
    group_integrity,
    selective_trust_region,
    gibbs_normalisation,
    gibbs_contrast,
    clip_regions,
    gaussian_gibbs,
    consistency_kernel,
    euler_maruyama,
    kernel_score,
    kernel_kl,
    closed_form_kls,
    packed_cached,
    history_gradient,
    participation_weights,
)
HEADERS = ("check", "statement", "instance", "residual", "tolerance", "planted error", "verdict")


def row(name: str, finding: Finding) -> tuple[str, ...]:
    """A line of the table."""
    numbers = (f"{x:.1e}" for x in (finding.residual, finding.tolerance, finding.planted))
    return (name, finding.statement, finding.instance, *numbers, finding.verdict)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m theory_checks", description=__doc__)
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="save the figures into this folder as well")
    chosen = parser.parse_args(arguments)
    findings = {module.__name__.rsplit(".", 1)[-1]: module.check() for module in CHECKS}
    table = markdown_table if chosen.markdown else format_table
    print(table([row(name, finding) for name, finding in findings.items()], HEADERS))
    if chosen.plot is not None:
        from theory_checks.figures import save_all  # late: only pictures need matplotlib

        for path in save_all(chosen.plot):
            print(path)
    return 0 if all(finding.holds for finding in findings.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
