"""The golden cases of KVPO follow their own hyper-parameters, whatever their size, and a wrong setting misses."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from strategies.surrogates import gibbs_tve
from tests.golden import l2, l4
from tests.golden.__main__ import FOLDER
from tests.golden.case import Case, Kind, read_case
from tests.golden.runner import run_case
from tests.synthetic_kvpo import advantage_tensors, loss_case

SETTINGS = {
    "small": {"branches": 3, "blocks": 1, "steps": 2, "dims": 5, "tau": 2.0, "clip": (0.8, 1.4), "kl_coef": 0.5,
              "grad_steps": 1, "floor": 0.5},
    "many branches": {"branches": 12, "blocks": 5, "steps": 6, "dims": 4, "tau": 0.1, "clip": (0.9, 1.2),
                      "kl_coef": 10.0, "grad_steps": 6, "floor": 0.1},
    "no KL, one step with a gradient": {"branches": 4, "blocks": 2, "steps": 4, "dims": 7, "tau": 1.0,
                                        "clip": (0.99, 1.01), "kl_coef": 0.0, "grad_steps": 1, "floor": 2.0},
}  # fmt: skip


def missed(case: Case, kind: Kind) -> set[str]:
    return {row.tensor for row in run_case(case, kind).misses}


def with_hparams(case: Case, **changed) -> Case:
    return replace(case, hparams={**case.hparams, **changed})


def with_tables(branches: int, weights: list[float], shares: tuple[float, float], clamp: float, losing: bool) -> Case:
    """The packaged l2 case with other tables of KVPO."""
    (path,) = FOLDER.glob("l2_*.safetensors")
    case = read_case(path)
    tensors, hparams = advantage_tensors(branches, weights, shares, clamp, losing)
    others = {name: value for name, value in case.tensors.items() if not name.startswith("kvpo.")}
    return Case("l2_synthetic", {**case.hparams, "kvpo": hparams}, others | tensors)


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("seed", [0, 100])
def test_a_loss_case_of_another_size_holds(setting: dict, seed: int):
    assert missed(loss_case(**setting, seed=seed), l4) == set()


PAPER_VALUES = {"paper.log_pi", "paper.ratio", "paper.kl", "paper.loss", "paper.grad_v_theta"}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"tau": 0.3}, PAPER_VALUES | {"paper.grad_v_theta_at_old"}),
        ({"clip": [0.5, 1.01]}, {"paper.loss_clip", "released.loss_clip", "released.mechanism_2.unsafe.loss"}),
        ({"kl_coef": 9.0}, {"paper.loss", "released.mechanism_1.safe.loss", "released.mechanism_1.safe.grad_v_theta"}),
        ({"grad_steps_released": 3}, {"released.mechanism_1.safe.grad_v_theta"}),
        ({"sigma_floor_released": 0.7}, {"released.score", "released.pi", "released.kl"}),
    ],
)
def test_a_wrong_setting_misses(changed: dict, expected: set[str]):
    (path,) = FOLDER.glob("l4_*.safetensors")
    assert missed(with_hparams(read_case(path), **changed), l4) >= expected


def without_the_winners_clip(ratio: Tensor, advantage: Tensor, lower: float, upper: float) -> Tensor:
    return torch.minimum(ratio * advantage, ratio.clamp(min=lower) * advantage)


def summed_energy(velocity: Tensor, recorded: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    return recorded.shape[2] * gibbs_tve.trajectory_velocity_energy(velocity, recorded, weight)


@pytest.mark.parametrize(
    ("name", "planted"),
    [("clipped_surrogate", without_the_winners_clip), ("trajectory_velocity_energy", summed_energy)],
)
def test_a_wrong_loss_misses(name: str, planted: Callable, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(l4, name, planted)
    (path,) = FOLDER.glob("l4_*.safetensors")
    assert missed(read_case(path), l4) >= {"paper.loss", "released.mechanism_2.unsafe.loss"}


@pytest.mark.parametrize(
    ("branches", "weights", "shares", "clamp"),
    [(8, [1.0, 0.05], (1.0, 0.5), 2.5), (3, [0.3, 2.0, -1.0], (0.2, 1.0), 0.4), (16, [1.0], (1.0, 1.0), 5.0)],
)
@pytest.mark.parametrize("losing", [False, True])
def test_anchored_advantages_of_another_size_hold(
    branches: int, weights: list[float], shares: tuple[float, float], clamp: float, losing: bool
):
    case = with_tables(branches, weights, shares, clamp, losing)
    assert missed(case, l2) == set()
    assert not (losing and min(weights) > 0 and bool(case["kvpo.gate_open"]))


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"clamp": 0.1}, {f"kvpo.fused_clamped.{name}" for name in ("none", "std", "zscore")}),
        ({"fusion_weights": [0.5, 1.0]}, {f"kvpo.fused.{name}" for name in ("none", "std", "zscore")}),
    ],
)
def test_a_wrong_fusion_misses(changed: dict, expected: set[str]):
    case = with_tables(8, [1.0, 0.2], (1.0, 0.5), 2.5, losing=False)
    assert missed(with_hparams(case, kvpo={**case.hparams["kvpo"], **changed}), l2) >= expected


def test_a_gate_the_other_way_round_misses():
    case = with_tables(5, [1.0, 0.5], (1.0, 0.5), 2.5, losing=True)
    flipped = replace(case, tensors={**case.tensors, "kvpo.gate_open": ~case["kvpo.gate_open"]})
    assert missed(flipped, l2) == {"kvpo.gate_open"}
