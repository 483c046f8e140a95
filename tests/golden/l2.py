"""Kind l2: the advantages that released systems form from tables of rewards."""

import torch
from torch import Tensor

from framework.advantages import (
    astrolabe_released,
    centre,
    flow_grpo_released,
    group_std,
    per_reward_raw_std,
    weighted_sum,
)
from tests.golden.case import Case, Row, compare, largest_difference

INPUTS: tuple[str, ...] = ("astrolabe.prompt_id", "astrolabe.rewards", "astrolabe.weights")
NOT_TAKEN_UP: tuple[str, ...] = ("kvpo.*", "raven.*")
TOLERANCE = 1e-12
CONSTANT_TOLERANCE = 1e-8
"""Where all rewards of a prompt are equal: rounding divided by the floor of the deviation."""


def check(case: Case) -> list[Row]:
    """The rows of Astrolabe, Flow-GRPO and the per-reward rule."""
    rewards, weights, groups = (case[f"astrolabe.{name}"] for name in ("rewards", "weights", "prompt_id"))
    eps = case.hparam("astrolabe")["std_eps"]
    names = [str(i) for i in range(rewards.shape[1])]
    raw = weighted_sum(
        dict(zip(names, rewards.unbind(1), strict=True)), dict(zip(names, weights.tolist(), strict=True))
    )
    computed = {
        "astrolabe.weighted_sum": raw,
        "astrolabe.advantages": astrolabe_released(raw, groups, eps),
        "astrolabe.advantages_mean_centred_only": centre(raw, groups),
        "astrolabe.advantages_batch_zscore": astrolabe_released(raw, torch.zeros_like(groups), eps),
        "grpo.advantages": flow_grpo_released(raw, groups, eps),
        "per_reward.advantages": per_reward_raw_std(rewards, weights, groups, eps),
    }
    constant = group_std(raw, groups) < TOLERANCE
    rows = []
    for tensor, actual in computed.items():
        for where, tolerance, how in (
            (~constant, TOLERANCE, "float64, prompts with spread"),
            (constant, CONSTANT_TOLERANCE, "float64, constant prompts"),
        ):
            if bool(where.any()):
                rows.append(compare(case, tensor, actual, tolerance, how, _difference_at(where)))
    return rows


def _difference_at(where: Tensor):
    return lambda actual, expected: largest_difference(actual[where], expected[where])
