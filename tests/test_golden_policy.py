"""The golden cases of the Gaussian policies and of RAVEN's advantages in other sizes, and what makes them miss."""

import pytest
import torch

from framework.kernels import FlowGRPO, RavenEulerMaruyama
from strategies.surrogates import gaussian_kernel
from tests.golden import l5, l6
from tests.golden.case import Case
from tests.golden.runner import KINDS, run_case
from tests.synthetic_policy_golden import cm_grpo_case, euler_maruyama_case
from tests.test_golden import missed, packaged, with_hparams, with_tensors

OTHER = {
    "unequal blocks": cm_grpo_case(5, 7.0, (1, 3, 3), (0, 1, 3, 4, 2, 1), (None, -0.5, 2.0), trained_steps=4),
    "three steps": cm_grpo_case(3, 12.0, (2, 2), (0, 1), (None, -3.0, 0.0), trained_steps=2),
    "a short last block, an untrained step": cm_grpo_case(
        6, 3.0, (2, 2, 1), (0, 1, 5, 4), (None, -1.0), trained_steps=2
    ),
}


@pytest.mark.parametrize("case", OTHER.values(), ids=OTHER)
def test_cm_grpo_of_another_size_holds(case: Case):
    assert missed(case) == set()


@pytest.mark.parametrize(
    ("sigmas", "levels"),
    [((1.0, 0.9, 0.5, 0.2, 0.05, 0.0), (0.3, 1.4)), ((0.95, 0.4, 0.0), (0.25,)), ((1.0, 0.75, 0.0), (0.7,))],
)
def test_euler_maruyama_on_another_grid_holds(sigmas, levels):
    assert missed(euler_maruyama_case(sigmas, levels)) == set()


@pytest.mark.parametrize("kind", ["l5", "l6"])
def test_every_compared_tensor_of_another_size_can_miss(kind: str):
    case = OTHER["unequal blocks"] if kind == "l5" else euler_maruyama_case((1.0, 0.9, 0.2, 0.0), (0.4,))
    compared = {row.tensor for row in run_case(case, KINDS[kind]).rows}
    moved = {name: case[name] + 0.01 * (1 + case[name].abs()) for name in compared}
    assert missed(with_tensors(case, moved)) == compared


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"adv_clip_max": 100.0}, {"score_grad", "loss.weights_none.plain.policy", "reinforce_grad_velocity"}),
        ({"policy_loss_scaling": 1.0}, {"loss.weights_-1.reweighted.total"}),
        ({"beta": 0.3}, {"loss.weights_1.plain.total_with_kl", "loss.weights_1.plain.grad_velocity_with_kl"}),
        ({"trained_steps": 2}, {"log_prob_mean_per_clip", "score_grad", "loss.weights_0.plain.policy"}),
        ({"chunk_frames": [1, 3, 4, 4]}, {"chunk_weights.-1", "loss.weights_-1.plain.policy"}),
        ({"grid": [1000, 900, 833, 625, 0]}, {"timestep", "next_timestep", "transition_mean", "transition_std"}),
    ],
)
def test_a_wrong_cm_grpo_setting_misses(changed: dict, expected: set[str]):
    assert missed(with_hparams(packaged("l5"), **changed)) >= expected


def test_a_kl_without_block_weights_misses_where_they_are_not_uniform(monkeypatch: pytest.MonkeyPatch):
    def unweighted(mean, reference, std, weight=1.0):
        return (mean - reference).square().flatten(2).mean(2) / (2 * std.square())

    monkeypatch.setattr(gaussian_kernel, "kernel_divergence", unweighted)
    assert missed(packaged("l5")) == {f"loss.weights_{a}.plain.grad_velocity_with_kl" for a in ("-1", "1")}


def test_the_two_conventions_of_the_first_step_miss_each_other(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(l6, "RavenEulerMaruyama", FlowGRPO)
    assert missed(packaged("l6")) == {
        f"a{a}.raven_sigma_max.step0_{name}" for a in (0.1, 0.7) for name in ("mean", "std")
    }
    monkeypatch.undo()
    monkeypatch.setattr(l6, "FlowGRPO", RavenEulerMaruyama)
    assert missed(packaged("l6")) >= {"a0.7.mean", "a0.7.std", "a0.1.kl"}


def test_a_density_where_there_is_none_misses():
    case = OTHER["unequal blocks"]
    filled = with_tensors(case, {"log_prob_mean_per_clip": case["log_prob_mean_per_clip"].nan_to_num()})
    assert missed(filled) == {"log_prob_mean_per_clip"}


def test_a_block_layout_that_cannot_be_read_is_named():
    with pytest.raises(ValueError, match="'middle3' is no block layout"):
        l5.layout("middle3")


# RAVEN's advantages


def test_ravens_advantages_follow_the_ranks_and_the_constants():
    case = packaged("l2")
    names = {name for name in case.tensors if name.startswith("raven.") and name not in KINDS["l2"].INPUTS}
    two_prompts = with_tensors(case, {"raven.prompt_of_rank": torch.tensor([0, 1] * 4)})
    assert missed(two_prompts) == names - {"raven.subgroup_score"}
    coarse = with_hparams(case, raven={**case.hparam("raven"), "std_eps": 1e-2})
    assert missed(coarse) == names
    regrouped = with_tensors(case, {"raven.rewards": case["raven.rewards"].transpose(0, 1).reshape(8, 4, 5)})
    assert missed(regrouped) == names
