"""Golden case l3 follows its own hyper-parameters: other sizes, bounds and memories, by an oracle of plain loops."""

import random
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.golden import l3
from tests.golden.__main__ import FOLDER
from tests.golden.case import Case, read_case
from tests.golden.runner import run_case


def missed(case: Case) -> set[str]:
    return {row.tensor for row in run_case(case, l3).misses}


def ranked(values: list[float], best_first: bool) -> list[int]:
    """1 for the lowest value, or for the highest."""
    order = sorted(range(len(values)), key=lambda i: values[i], reverse=best_first)
    return [order.index(i) + 1 for i in range(len(values))]


def selective_rows(primary: list, auxiliary: list, best_first: bool, hparams: dict[str, Any]) -> dict[str, list]:
    """Epoch by epoch, sample by sample."""
    rows: dict[str, list] = {name: [] for name in ("delta", "mean_positive", "rho", "threshold", "mask")}
    rho, remembered = hparams["base"], []
    for scores, others in zip(primary, auxiliary, strict=True):
        mine, theirs = ranked(scores, best_first), [ranked(other, best_first) for other in others]
        delta = [mine[i] - sum(r[i] for r in theirs) / len(theirs) for i in range(len(scores))]
        positive = [d for d in delta if d >= 0]
        mean = sum(positive) / len(positive)
        if remembered:
            rho *= 1 + hparams["step"] * ((mean > max(remembered)) - (mean < min(remembered)))
            rho = min(max(rho, hparams["bounds"][0]), hparams["bounds"][1])
        remembered = [*remembered, mean][-hparams["buffer"] :]
        threshold = float(np.percentile(positive, 100 * (1 - rho)))
        found = (delta, mean, rho, threshold, [d > threshold for d in delta])
        for name, value in zip(rows, found, strict=True):
            rows[name].append(value)
    return rows


def masked_z(primary: list, masks: list) -> float:
    means = []
    for scores, mask in zip(primary, masks, strict=True):
        centre, spread = statistics.fmean(scores), statistics.pstdev(scores)
        chosen = [(s - centre) / spread for s, m in zip(scores, mask, strict=True) if m]
        means += [statistics.fmean(chosen)] if chosen else []
    return statistics.fmean(means)


def reset_rows(kl: list[float], hparams: dict[str, Any]) -> dict[str, list]:
    rows: dict[str, list] = {"released.reset": [], "released.threshold": [], "constant.reset": []}
    tau, last, flag = hparams["tau0_released"], 0, False
    for epoch, value in enumerate(kl):
        late = epoch - last > hparams["reset_timer_released"]
        reset = flag or late
        if reset:
            tau = max(tau - 0.01, 0.10) if late else tau
            tau = min(tau + 0.01, 0.05) if epoch - last < 5 else tau
            last = epoch
        flag = value > tau
        rows["released.reset"].append(reset)
        rows["released.threshold"].append(tau)
    constant = hparams["reset_constant"]
    last, flag = 0, False
    for epoch, value in enumerate(kl):
        reset = flag or epoch - last > constant["K_max"]
        last = epoch if reset else last
        flag = value > constant["tau"]
        rows["constant.reset"].append(reset)
    return rows


def make_case(seed: int, epochs: int, samples: int, auxiliaries: int, kl_scale: float, **hparams: Any) -> Case:
    """A case of another size; a primary that is partly an auxiliary, without ties."""
    hparams = {
        "epochs": epochs, "samples": samples, "auxiliaries": auxiliaries, "base": 0.1, "step": 0.1,
        "bounds": [0.02, 0.2], "buffer": 20, "tau0_released": 0.15, "reset_timer_released": 15,
        "reset_constant": {"tau": 0.15, "K_max": 15},
    } | hparams  # fmt: skip
    draw = random.Random(seed)
    auxiliary = [[[draw.gauss(0, 1) for _ in range(samples)] for _ in range(auxiliaries)] for _ in range(epochs)]
    primary = [[draw.gauss(0, 1) + epoch / epochs * others[0][i] for i in range(samples)]
               for epoch, others in enumerate(auxiliary)]  # fmt: skip
    kl = [kl_scale * draw.random() for _ in range(60)]
    steps = sorted(draw.sample(range(400), 10))
    rows: dict[str, Any] = {"selective.primary": primary, "selective.auxiliary": auxiliary, "reset.kl": kl}
    z = []
    for kind, best_first in (("released", True), ("paper", False)):
        found = selective_rows(primary, auxiliary, best_first, hparams)
        rows |= {f"selective.{kind}.{name}": value for name, value in found.items()}
        z.append(masked_z(primary, found["mask"]))
    rows["selective.masked_mean_primary_z"] = z
    rows |= {f"reset.{name}": value for name, value in reset_rows(kl, hparams).items()}
    rows |= {
        "old_policy.decay_type0": [0.0] * 10,
        "old_policy.decay_type1": [min(0.001 * s, 0.5) for s in steps],
        "old_policy.decay_type2": [0.0 if s < 75 else min(0.0075 * (s - 75), 0.999) for s in steps],
    }
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in rows.items()}
    return Case("l3_synthetic", hparams, tensors | {"old_policy.step": torch.tensor(steps)})


OTHER_SIZES = [
    {"seed": 1, "epochs": 12, "samples": 40, "auxiliaries": 1, "kl_scale": 0.2},
    {"seed": 2, "epochs": 30, "samples": 25, "auxiliaries": 3, "kl_scale": 0.16, "buffer": 4, "bounds": [0.05, 0.15]},
    {"seed": 3, "epochs": 6, "samples": 96, "auxiliaries": 2, "kl_scale": 0.1, "base": 0.3, "bounds": [0.2, 0.5]},
    {"seed": 4, "epochs": 9, "samples": 17, "auxiliaries": 5, "kl_scale": 1.0, "step": 0.25, "buffer": 1,
     "reset_timer_released": 3, "tau0_released": 0.4, "reset_constant": {"tau": 0.7, "K_max": 4}},
]  # fmt: skip


@pytest.mark.parametrize("sizes", OTHER_SIZES, ids=lambda sizes: str(sizes["seed"]))
def test_a_case_of_another_size_holds(sizes: dict[str, Any]):
    assert missed(make_case(**sizes)) == set()


def packaged() -> Case:
    return read_case(FOLDER / "l3_selective_kl.safetensors")


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"base": 0.15}, {"selective.paper.rho", "selective.paper.mask"}),
        ({"step": 0.2}, {"selective.released.rho"}),
        ({"bounds": [0.02, 0.12]}, {"selective.paper.rho", "selective.paper.mask"}),
        ({"buffer": 1}, {"selective.paper.rho"}),
        ({"reset_timer_released": 12}, {"reset.released.reset"}),
        ({"tau0_released": 0.1}, {"reset.released.threshold"}),
        ({"reset_constant": {"K_max": 14, "tau": 0.15}}, {"reset.constant.reset"}),
        ({"reset_constant": {"K_max": 15, "tau": 0.05}}, {"reset.constant.reset"}),
    ],
)
def test_a_wrong_setting_misses(changed: dict, expected: set[str]):
    case = packaged()
    assert missed(replace(case, hparams={**case.hparams, **changed})) >= expected


def test_the_signs_are_not_interchangeable(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(l3, "SIGNS", {"released": 1, "paper": -1})
    assert missed(packaged()) >= {"selective.paper.mask", "selective.released.mask", "selective.masked_mean_primary_z"}


def check_packaged_rows_are_the_oracles(rows: Callable[..., dict[str, list]]) -> None:
    case = packaged()
    for kind, best_first in (("released", True), ("paper", False)):
        primary, auxiliary = case["selective.primary"].tolist(), case["selective.auxiliary"].tolist()
        for name, value in rows(primary, auxiliary, best_first, dict(case.hparams)).items():
            expected = case[f"selective.{kind}.{name}"]
            assert float((torch.tensor(value, dtype=torch.float64) - expected.double()).abs().max()) < 1e-9


def test_the_oracle_of_the_synthetic_cases_gives_the_packaged_rows():
    check_packaged_rows_are_the_oracles(selective_rows)
    with pytest.raises(AssertionError):
        check_packaged_rows_are_the_oracles(lambda p, a, best_first, h: selective_rows(p, a, not best_first, h))
