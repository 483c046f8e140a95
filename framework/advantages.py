"""Group-relative advantages: how much better a clip is than the other clips of its prompt. One class per rule.

    centre:  a_i = r_i − mean_{j ∈ group(i)} r_j

Groups are given by id, so a rule does not care how clips are placed on ranks or in micro-batches. Invalid scores take
no part in means and deviations and get no weight. All rules run in float64 and return float32: bf16 or even float32
scores near 1 create ties that a small deviation would blow up.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from framework.interfaces import AdvantageRule
from framework.types import Advantage, Scores


def group_mean(values: Tensor, groups: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean of values [N] over the valid members of each one's group → [N]; 0 for a group without any."""
    weight = torch.ones_like(values) if valid is None else valid.to(values.dtype)
    _, index = groups.unique(return_inverse=True)
    size = int(index.max()) + 1 if len(index) else 0
    count = values.new_zeros(size).index_add_(0, index, weight)
    total = values.new_zeros(size).index_add_(0, index, torch.where(weight > 0, values, 0))
    return (total / count.clamp(min=1))[index]


def centre(values: Tensor, groups: Tensor, valid: Tensor | None = None) -> Tensor:
    """a_i = r_i − mean of its group; sums to zero in every group. Invalid entries become 0."""
    # measured from the lowest of the group, so that equal rewards give exactly zero whatever their mean rounds to
    raised = values - group_lowest(values, groups, valid)
    centred = raised - group_mean(raised, groups, valid)
    return centred if valid is None else torch.where(valid, centred, 0)


def group_lowest(values: Tensor, groups: Tensor, valid: Tensor | None = None) -> Tensor:
    """Smallest valid value of each one's group → [N]; inf for a group without any."""
    _, index = groups.unique(return_inverse=True)
    usable = values if valid is None else torch.where(valid, values, torch.inf)
    size = int(index.max()) + 1 if len(index) else 0
    return values.new_full((size,), torch.inf).scatter_reduce_(0, index, usable, "amin")[index]


def group_std(values: Tensor, groups: Tensor, valid: Tensor | None = None) -> Tensor:
    """Population standard deviation of each one's group → [N]."""
    return group_mean(centre(values, groups, valid).square(), groups, valid).sqrt()


def batch_std(values: Tensor, valid: Tensor | None = None) -> Tensor:
    """Population standard deviation over the valid entries of the whole batch, scalar."""
    return group_std(values, torch.zeros_like(values, dtype=torch.long), valid)[0]


def floored(std: Tensor, floor: float) -> Tensor:
    """max(std, floor): a reward without spread stays without spread instead of being blown up to unit variance."""
    return std.clamp(min=floor)


def clip_symmetric(values: Tensor, limit: float | None) -> Tensor:
    """Clip to ±limit; None leaves the values alone. Raises ValueError for a limit that leaves nothing."""
    if limit is not None and not limit > 0:
        raise ValueError(f"clip={limit} of the advantage rule must be positive, or None for no clipping")
    return values if limit is None else values.clamp(-limit, limit)


def weighted_sum(signals: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Σ_k w_k r_k."""
    return torch.stack([weights[name] * signals[name] for name in weights]).sum(0)


def resolve_weights(weights: Mapping[str, float] | None, names: Sequence[str]) -> dict[str, float]:
    """Given weights, or 1 for every signal. Raises ValueError for a signal that no reward gives."""
    if weights is None:
        return dict.fromkeys(names, 1.0)
    unknown = [name for name in weights if name not in names]
    if not any(weights.values()):
        raise ValueError(
            f"weights {dict(weights)} weigh nothing; give one of the signals {list(names)} a weight other than 0, "
            f"or leave it None"
        )
    if not all(math.isfinite(weight) for weight in weights.values()):
        raise ValueError(f"weights {dict(weights)} must be finite")
    if unknown:
        raise ValueError(f"weights name the reward signals {unknown}, but the reward gives {list(names)}")
    return dict(weights)


def widened(
    scores: Scores, weights: Mapping[str, float], anchors: Tensor | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """(signals in float64, which clips are branches with every weighted signal valid)."""
    values = {name: torch.where(scores.valid[name], scores.values[name], 0).double() for name in weights}
    valid = torch.stack([scores.valid[name] for name in weights]).all(0)
    return values, valid if anchors is None else valid & ~anchors


def finish(values: Tensor, valid: Tensor, groups: Tensor, limit: float | None, raw: Tensor) -> Advantage:
    """Clip to ±limit, mark invalid clips inactive, and describe the spread of ``raw``, the rewards as summed."""
    clipped = clip_symmetric(values, limit)
    spread = group_std(raw, groups, valid)
    metrics = {
        "advantage_abs_mean": clipped.abs().mean(),
        "advantage_clip_fraction": (clipped != values).double().mean(),
        "group_std_mean": spread.mean(),
        "frac_zero_std": (spread <= 1e-8).double().mean(),
        "frac_invalid": (~valid).double().mean(),
    }
    return Advantage(clipped.float(), valid, groups, metrics)


@dataclass(frozen=True)
class GroupRelative(AdvantageRule):
    """A = clip(centre(Σ_k w_k r_k) / max(std of the group, floor)): the GRPO rule.

    Sums to zero in a group before clipping, does not change when all rewards are scaled or shifted (above the floor),
    and |A| ≤ √(G − 1), since the deviation is the population one. weights: per signal, None for 1 each. std_floor: in
    units of the weighted sum. clip: A_max, None for none.
    """

    weights: Mapping[str, float] | None = None
    std_floor: float = 1e-4
    clip: float | None = 5.0

    def __call__(self, scores: Scores, groups: Tensor, anchors: Tensor | None = None) -> Advantage:
        weights = resolve_weights(self.weights, list(scores.values))
        values, valid = widened(scores, weights, anchors)
        raw = weighted_sum(values, weights)
        advantage = group_relative(raw, groups, self.std_floor, valid)
        return finish(advantage, valid, groups, self.clip, raw)


def group_relative(values: Tensor, groups: Tensor, floor: float, valid: Tensor | None = None) -> Tensor:
    """centre(r) / max(std_group(r), floor) for rewards [N] in groups [N]."""
    return centre(values, groups, valid) / floored(group_std(values, groups, valid), floor)


@dataclass(frozen=True)
class GroupCentred(AdvantageRule):
    """A = clip(centre(Σ_k w_k r_k)): Astrolabe's Eq. 4 (2603.17051), no division by a deviation."""

    weights: Mapping[str, float] | None = None
    clip: float | None = 5.0

    def __call__(self, scores: Scores, groups: Tensor, anchors: Tensor | None = None) -> Advantage:
        weights = resolve_weights(self.weights, list(scores.values))
        values, valid = widened(scores, weights, anchors)
        raw = weighted_sum(values, weights)
        return finish(centre(raw, groups, valid), valid, groups, self.clip, raw)


@dataclass(frozen=True)
class PerRewardCentred(AdvantageRule):
    """A = clip(centre(Σ_k w_k centre(r_k) / max(std_batch(centre(r_k)), floor)) / Σ_k |w_k|): each on its own scale.

    The deviation is that of the *centred* values over the batch, so prompt difficulty does not enter it and a reward
    with a large raw scale does not dominate; dividing by Σ|w| keeps A in units of one deviation, whatever the number of
    rewards, so that the symmetric clip acts on outliers and hardly moves the mean. Our default for several rewards.
    """

    weights: Mapping[str, float] | None = None
    std_floor: float = 1e-4
    clip: float | None = 5.0

    def __call__(self, scores: Scores, groups: Tensor, anchors: Tensor | None = None) -> Advantage:
        weights = resolve_weights(self.weights, list(scores.values))
        values, valid = widened(scores, weights, anchors)
        total = per_reward_centred(values, weights, groups, self.std_floor, valid)
        return finish(total, valid, groups, self.clip, weighted_sum(values, weights))


def per_reward_centred(
    values: Mapping[str, Tensor],
    weights: Mapping[str, float],
    groups: Tensor,
    floor: float,
    valid: Tensor | None = None,
) -> Tensor:
    """centre(Σ_k w_k centre(r_k) / max(std_batch(centre(r_k)), floor)) / Σ_k |w_k| for rewards {name: [N]}."""
    scaled = {}
    for name in weights:
        centred = centre(values[name], groups, valid)
        scaled[name] = centred / floored(batch_std(centred, valid), floor)
    return centre(weighted_sum(scaled, weights), groups, valid) / sum(abs(w) for w in weights.values())


@dataclass(frozen=True)
class PrimaryOnly(AdvantageRule):
    """A = clip(centre(r) / max(std_batch(centre(r)), floor)) of one signal: the advantage of Astrolabe's Algorithm 1.

    The other signals are left to a regularizer such as a selective KL; where one of them failed the clip still learns.
    """

    primary: str
    std_floor: float = 1e-4
    clip: float | None = 5.0

    def __call__(self, scores: Scores, groups: Tensor, anchors: Tensor | None = None) -> Advantage:
        weights = resolve_weights({self.primary: 1.0}, list(scores.values))
        values, valid = widened(scores, weights, anchors)
        total = per_reward_centred(values, weights, groups, self.std_floor, valid)
        return finish(total, valid, groups, self.clip, values[self.primary])


@dataclass(frozen=True)
class SumFirst(AdvantageRule):
    """A = clip(centre(R) / (std_batch(R) + eps)), R = Σ_k w_k r_k of the raw scores: as Astrolabe is released.

    The signal with the largest raw scale decides, and so does the difficulty of the prompts, which is in the deviation.
    `GroupCentred` is the same without the deviation, `PerRewardCentred` has neither.
    """

    weights: Mapping[str, float] | None = None
    eps: float = 1e-4
    clip: float | None = 5.0

    def __call__(self, scores: Scores, groups: Tensor, anchors: Tensor | None = None) -> Advantage:
        weights = resolve_weights(self.weights, list(scores.values))
        values, valid = widened(scores, weights, anchors)
        raw = weighted_sum(values, weights)
        return finish(astrolabe_released(raw, groups, self.eps, valid), valid, groups, self.clip, raw)


def astrolabe_released(values: Tensor, groups: Tensor, eps: float = 1e-4, valid: Tensor | None = None) -> Tensor:
    """centre(r) / (population std of ALL raw r + eps): the released rule."""
    return centre(values, groups, valid) / (batch_std(values, valid) + eps)


def flow_grpo_released(values: Tensor, groups: Tensor, eps: float = 1e-4) -> Tensor:
    """centre(r) / (population std of the group + eps): Flow-GRPO's rule, kept for parity tests."""
    return centre(values, groups) / (group_std(values, groups) + eps)


def per_reward_raw_std(values: Tensor, weights: Tensor, groups: Tensor, eps: float = 1e-4) -> Tensor:
    """Σ_k w_k centre(r_k) / (std of the raw r_k over the batch + eps), values [N, rewards]: kept for parity tests."""
    columns = [
        w * centre(column, groups) / (batch_std(column) + eps)
        for w, column in zip(weights, values.unbind(1), strict=True)
    ]
    return torch.stack(columns).sum(0)


def advantage_bound(group_size: int) -> float:
    """√(G − 1): the largest |A| that a group of G can reach with the population deviation."""
    return math.sqrt(group_size - 1)
