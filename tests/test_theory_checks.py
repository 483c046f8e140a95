"""Every theory check holds, and sees the error that is planted in it; what the command prints is what the page says."""

import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import theory_checks
from framework.kernels import Ode
from framework.schedules import FewStepSchedule
from tests.support import close, normal
from theory_checks import nft_improvement, selective_trust_region
from theory_checks.__main__ import CHECKS, main
from theory_checks.figures import FIGURES, save_all
from theory_checks.statement import Finding, worst
from theory_checks.toy import Mixture, mixture

NOT_A_CHECK = {"__init__", "__main__", "figures", "statement", "toy"}
PAGE = Path(__file__).parents[1] / "docs" / "theory_checks.md"


def name_of(module: ModuleType) -> str:
    return module.__name__.rsplit(".", 1)[-1]


@pytest.mark.parametrize("module", CHECKS, ids=name_of)
def test_a_statement_holds_and_its_planted_error_is_seen(module: ModuleType) -> None:
    finding = module.check()
    assert finding.residual <= finding.tolerance
    assert finding.planted > finding.tolerance
    assert finding.holds


@pytest.mark.parametrize("module", CHECKS, ids=name_of)
def test_a_file_says_its_statement_before_its_code(module: ModuleType) -> None:
    assert module.__doc__ is not None and "\nStatement. " in module.__doc__
    assert module.check.__doc__ is not None and "planted" in module.check.__doc__


def test_every_file_of_the_folder_is_run() -> None:
    (folder,) = theory_checks.__path__
    assert {path.stem for path in Path(folder).glob("*.py")} - NOT_A_CHECK == {name_of(module) for module in CHECKS}
    assert len(set(CHECKS)) == len(CHECKS)


@pytest.mark.parametrize(("residual", "planted"), [(2, 9), (0, 0.5), (math.nan, 9), (0, math.nan), (0, math.inf)])
def test_neither_a_residual_nor_a_blind_check_passes(residual: float, planted: float) -> None:
    assert not Finding("", "", residual, 1.0, planted).holds
    assert Finding("", "", 1.0, 1.0, 9.0).verdict == "holds"


def test_a_residual_that_is_not_a_number_is_not_lost_among_others() -> None:
    nan = math.nan
    assert worst(1.0, 3.0, 2.0) == 3.0
    assert all(math.isnan(worst(*values)) for values in ((nan, 1.0), (1.0, nan), (nan, 1.0, 5.0)))
    assert max(1.0, nan) == 1.0  # what a check must not rely on


class Printed:
    """A check that costs nothing."""

    def __init__(self, name: str, residual: float) -> None:
        self.__name__, self.residual = f"theory_checks.{name}", residual

    def check(self) -> Finding:
        return Finding("a = b", "an instance", self.residual, 1e-6, 1.0)


@pytest.mark.parametrize(("residual", "status", "verdict"), [(1e-9, 0, "holds"), (1e-3, 1, "FAILS")])
def test_the_command_prints_every_column_and_its_status_is_the_verdict(
    residual: float, status: int, verdict: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("theory_checks.__main__.CHECKS", (Printed("one", 0.0), Printed("two", residual)))
    assert main([]) == status
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].split("  ")[0] == "two" and lines[-1].endswith(verdict)
    assert all(part in lines[-1] for part in ("a = b", "an instance", f"{residual:.1e}"))
    assert main(["--markdown"]) == status
    assert capsys.readouterr().out.splitlines()[2].startswith("| one | a = b | an instance |")


def test_the_page_lists_every_check_with_its_statement_and_instance() -> None:
    rows = [line.strip("| ").split(" | ") for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| ")]
    listed = {cells[0]: cells[1:3] + cells[-1:] for cells in rows[2:]}
    assert list(listed) == [name_of(module) for module in CHECKS]
    for module in CHECKS:
        finding = module.check()
        assert listed[name_of(module)] == [
            finding.statement.replace("|", "\\|"), finding.instance.replace("|", "\\|"), "holds",
        ]  # fmt: skip


def test_every_figure_is_drawn_and_none_is_blank(tmp_path: Path) -> None:
    paths = save_all(tmp_path / "new")
    assert [path.stem for path in paths] == list(FIGURES)
    assert all(path.stat().st_size > 20_000 for path in paths)


# the toy generator


def brute_force(data: Mixture, x: Tensor, sigma: float) -> Tensor:
    """E[x0 | x_σ = x] of an enumerable mixture, by a loop over states and points."""
    rows = []
    for state in x:
        weights = [
            float(w * torch.exp(-(state - (1 - sigma) * m).square().sum() / (2 * sigma**2)))
            for w, m in zip(data.weights, data.means, strict=True)
        ]
        total = sum(weights)
        rows.append(torch.stack([w / total * m for w, m in zip(weights, data.means, strict=True)]).sum(0))
    return torch.stack(rows)


@pytest.mark.parametrize("sigma", [1.0, 0.8333, 0.4])
def test_the_toys_denoiser_is_the_posterior_mean(sigma: float) -> None:
    data, x = mixture(0, 5, 3, 0.0), normal(1, 7, 3)
    close(data.x0(x, sigma), brute_force(data, x, sigma), atol=1e-12)
    with pytest.raises(AssertionError):
        close(data.tilted(torch.arange(1.0, 6.0)).x0(x, sigma), brute_force(data, x, sigma), atol=1e-3)


def test_a_gaussians_denoiser_is_a_straight_line() -> None:
    data = Mixture(*(torch.tensor(values, dtype=torch.float64) for values in ([1.0], [[0.7]], [0.4])))
    x = normal(2, 9, 1)
    gain = 0.5 * 0.4**2 / (0.5**2 * 0.4**2 + 0.5**2)
    close(data.x0(x, 0.5), 0.7 + gain * (x - 0.5 * 0.7), atol=1e-12)


def test_many_steps_of_the_ode_arrive_at_the_data_and_four_do_not() -> None:
    data = mixture(4, 3, 1, 0.3)
    noise = normal(3, 1, 4000, 1)
    mean = float((data.weights.unsqueeze(1) * data.means).sum())
    spread = float((data.weights * (data.stds.square() + (data.means[:, 0] - mean).square())).sum())
    errors = []
    for steps in ((1000, 750, 500, 250), tuple(range(1000, 0, -10))):
        grid = FewStepSchedule(steps).transitions
        found = data.sample(Ode(), grid, noise.expand(1 + len(grid), -1, -1))
        errors.append(abs(float(found.var()) / spread - 1))
    assert errors[1] < 0.1 < 0.2 < errors[0]


# what the statements claim in words


def test_at_beta_one_every_centred_preference_leaves_a_distribution_and_at_less_some_do_not() -> None:
    data = mixture(1, 6, 3, 0.0)
    r = nft_improvement.centred_preferences(data.weights, 3)
    assert abs(float((data.weights * r).sum()) - 0.5) < 1e-12
    assert bool((1 + 2 * (r - 0.5) >= 0).all()) and not bool((1 + 4 * (r - 0.5) >= 0).all())


def test_the_selective_bound_is_nearly_reached_by_a_small_change_of_the_flagged_set() -> None:
    q = normal(5, 8).softmax(0)
    inside = torch.arange(8) < 3
    p = torch.where(inside, 1.001 * q, q * (1 - 1.001 * q[inside].sum()) / (1 - q[inside].sum()))
    part = selective_trust_region.divergence(p, q)[inside].sum()
    bound = (2 * p[inside].sum() * part).sqrt()
    assert 0.999 < float((p - q)[inside].sum() / bound) <= 1
