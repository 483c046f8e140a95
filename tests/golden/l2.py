"""Kind l2: the advantages that released systems form from tables of rewards."""

import torch
from torch import Tensor

from framework.advantages import (
    astrolabe_released,
    centre,
    clip_symmetric,
    flow_grpo_released,
    group_std,
    per_reward_raw_std,
    weighted_sum,
)
from framework.anchored_advantages import (
    AnyBranchBeatsAnchor,
    PlainFusion,
    StdFusion,
    ZScoreFusion,
    anchor_margin,
    released_component,
)
from framework.raven_advantages import normalised_sum, normalize_then_sum, sum_then_normalize
from tests.golden.case import Case, Row, compare, largest_difference

INPUTS: tuple[str, ...] = (
    "astrolabe.prompt_id", "astrolabe.rewards", "astrolabe.weights",
    "kvpo.local_rewards", "kvpo.local_anchor", "kvpo.global_rewards", "kvpo.global_anchor", "kvpo.component_weights",
    "raven.rewards", "raven.weights", "raven.prompt_of_rank",
)  # fmt: skip
NOT_TAKEN_UP: tuple[str, ...] = ()
TOLERANCE = 1e-12
CONSTANT_TOLERANCE = 1e-8
"""Where all rewards of a prompt are equal: rounding divided by the floor of the deviation."""


def check(case: Case) -> list[Row]:
    """The rows of Astrolabe, Flow-GRPO, the per-reward rule, KVPO and RAVEN."""
    return [*check_batches(case), *check_kvpo(case), *check_raven(case)]


def check_batches(case: Case) -> list[Row]:
    """The rules that compare siblings, on one table of rewards."""
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


def check_kvpo(case: Case) -> list[Row]:
    """The rules that compare branches with an anchor, on a local and a global table of rewards."""
    weights, setting = case["kvpo.component_weights"], case.hparam("kvpo")
    branches = torch.arange(setting["branches"] + 1) < setting["branches"]
    groups = torch.zeros(len(branches), dtype=torch.long)
    tables = {
        scope: torch.cat([case[f"kvpo.{scope}_rewards"], case[f"kvpo.{scope}_anchor"].unsqueeze(1)], 1)
        for scope in ("local", "global")
    }
    computed, open_gates = {}, []
    for scope, table in tables.items():
        components = torch.stack([released_component(rewards, groups, ~branches) for rewards in table])
        computed[f"{scope}_components"] = components[:, branches]
        computed[scope] = weights @ components[:, branches]
        margin = anchor_margin(weights @ table, groups, ~branches)
        open_gates.append(AnyBranchBeatsAnchor()(margin, groups, branches)[:1])
    computed["combined_raw_first"] = released_component(weights @ tables["local"], groups, ~branches)[branches]
    alone = groups[branches], branches[branches]
    for name, fusion in (("none", PlainFusion()), ("std", StdFusion()), ("zscore", ZScoreFusion())):
        parts = [fusion(computed[scope], *alone) for scope in tables]
        fused = sum(w * part for w, part in zip(setting["fusion_weights"], parts, strict=True))
        computed[f"fused.{name}"] = fused
        computed[f"fused_clamped.{name}"] = clip_symmetric(fused, setting["clamp"])
    rows = [compare(case, f"kvpo.{name}", actual, TOLERANCE, "float64") for name, actual in computed.items()]
    return [*rows, compare(case, "kvpo.gate_open", torch.stack(open_gates).any(0), 0.0, "boolean")]


def check_raven(case: Case) -> list[Row]:
    """The rows of RAVEN, on a table of rewards [ranks, samples, rewards]; the paper's rule is the one without ranks."""
    rewards, prompts, setting = case["raven.rewards"], case["raven.prompt_of_rank"], case.hparam("raven")
    ranks, samples, count = rewards.shape
    values = {str(k): column for k, column in enumerate(rewards.reshape(-1, count).unbind(1))}
    weights = {str(k): w for k, w in enumerate(case["raven.weights"].tolist())}
    rank, group = torch.arange(ranks).repeat_interleave(samples), prompts.repeat_interleave(samples)
    constants = setting["std_floor"], setting["std_eps"]
    computed = {
        "subgroup_score": normalised_sum(values, weights, rank, *constants),
        "advantages": normalize_then_sum(values, weights, group, rank, *constants),
        "advantages_full_group_normalisation": normalize_then_sum(values, weights, group, group, *constants),
        "advantages_sum_then_normalize": sum_then_normalize(values, weights, group, *constants),
    }
    tied = torch.stack([group_std(column, rank) < TOLERANCE for column in values.values()]).any(0)
    tolerance = CONSTANT_TOLERANCE if bool(tied.any()) else TOLERANCE
    return [
        compare(case, f"raven.{name}", actual.view(ranks, samples), tolerance, "float64")
        for name, actual in computed.items()
    ]


def _difference_at(where: Tensor):
    return lambda actual, expected: largest_difference(actual[where], expected[where])
