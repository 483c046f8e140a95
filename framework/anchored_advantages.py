"""Advantages relative to an anchor: how much better a branch is than the one of its group that explored nothing.

    a_i = Σ_c w_c (r_i,c − r_anc,c) / σ_c        σ_c: deviation of the group's scores of signal c, anchor included

KVPO (2605.14278). One class per rule, and a gate: an iteration in which no branch beats the anchor teaches nothing, so
the whole prompt becomes inactive (policy term, penalties and all). A prompt whose anchor could not be scored is
inactive too. As in `framework.advantages`, groups are given by id and everything runs in float64.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from framework.advantages import (
    centre,
    finish,
    floored,
    group_mean,
    group_std,
    resolve_weights,
    weighted_sum,
    widened,
)
from framework.interfaces import AdvantageRule
from framework.records import Anchors, Record
from framework.types import Advantage, Scores


def anchor_margin(values: Tensor, groups: Tensor, anchors: Tensor) -> Tensor:
    """r_i − r_anc of each one's group [N]: exactly 0 at anchors and at branches that tie with theirs."""
    return values - group_mean(values, groups, anchors)


def unbiased_std(values: Tensor, groups: Tensor, valid: Tensor | None = None) -> Tensor:
    """Deviation with n − 1 in the denominator of each one's group [N]; 0 for a group of one."""
    counted = torch.ones_like(groups, dtype=torch.bool) if valid is None else valid
    members = ((groups.unsqueeze(1) == groups) & counted).sum(1).to(values)
    return group_std(values, groups, valid) * (members / (members - 1).clamp(min=1)).sqrt()


def released_component(
    values: Tensor, groups: Tensor, anchors: Tensor, eps: float = 1e-8, valid: Tensor | None = None
) -> Tensor:
    """(r − r_anc) / (unbiased deviation over branches and anchor + eps) [N]: the released scale of one signal."""
    return anchor_margin(values, groups, anchors) / (unbiased_std(values, groups, valid) + eps)


class AnchorGate(ABC):
    """Which prompts may teach."""

    @abstractmethod
    def __call__(self, margin: Tensor, groups: Tensor, branches: Tensor) -> Tensor:
        """bool [N], equal within a group, from each clip's margin over its anchor; branches: the clips that count."""


@dataclass(frozen=True)
class AnyBranchBeatsAnchor(AnchorGate):
    """Open where at least one branch is strictly better than the anchor: the paper's gate."""

    def __call__(self, margin: Tensor, groups: Tensor, branches: Tensor) -> Tensor:
        return group_mean(((margin > 0) & branches).double(), groups) > 0


@dataclass(frozen=True)
class NoGate(AnchorGate):
    """Open everywhere: a prompt also learns which of its losing branches lost least."""

    def __call__(self, margin: Tensor, groups: Tensor, branches: Tensor) -> Tensor:
        return torch.ones_like(branches)


@dataclass(frozen=True)
class Compared:
    """The scores that a rule weighs, and who is compared with whom.

    values: float64 [N] by signal, 0 where invalid. valid: bool [N], branches and anchors. anchors: bool [N], one per
    group. branches: bool [N], valid branches whose anchor is valid.
    """

    values: dict[str, Tensor]
    valid: Tensor
    anchors: Tensor
    branches: Tensor


def compare(scores: Scores, weights: Mapping[str, float], groups: Tensor, anchors: Tensor | None) -> Compared:
    """Raises ValueError where a group has not exactly one anchor."""
    found = torch.zeros_like(groups, dtype=torch.bool) if anchors is None else anchors
    for group in groups.unique().tolist():
        count = int(found[groups == group].sum())
        if count != 1:
            raise ValueError(
                f"group {group} has {count} anchor branches where an anchor-relative advantage needs one; choose an "
                "exploration that plans an anchor, or a rule of framework.advantages"
            )
    values, valid = widened(scores, weights)
    judged = group_mean((valid & found).double(), groups) > 0
    return Compared(values, valid, found, valid & ~found & judged)


def anchor_relative(compared: Compared, weights: Mapping[str, float], groups: Tensor, floor: float) -> Tensor:
    """Σ_c w_c (r_c − r_anc,c) / max(σ_c, floor) [N], σ_c the population deviation over valid branches and anchor."""
    scaled = {}
    for name in weights:
        values = compared.values[name]
        spread = floored(group_std(values, groups, compared.valid), floor)
        scaled[name] = anchor_margin(values, groups, compared.anchors) / spread
    return weighted_sum(scaled, weights)


def settle(
    values: Tensor,
    margin: Tensor,
    compared: Compared,
    weights: Mapping[str, float],
    groups: Tensor,
    gate: AnchorGate,
    clip: float | None,
) -> Advantage:
    """Clip, gate and describe: branches as `finish` does, 0 and inactive at anchors and in gated prompts."""
    kept, branches = ~compared.anchors, compared.branches
    raw = weighted_sum(compared.values, weights)
    described = finish(values.where(branches, 0)[kept], branches[kept], groups[kept], clip, raw[kept])
    active = branches & gate(margin, groups, branches)
    clipped = described.values.new_zeros(len(values))
    clipped[kept] = described.values
    many = branches.sum().clamp(min=1)
    metrics = {
        **described.metrics,
        "gated_fraction": (branches & ~active).sum() / many,
        "frac_beating_anchor": (branches & (margin > 0)).sum() / many,
    }
    return Advantage(clipped.where(active, 0), active, groups, metrics)


@dataclass(frozen=True)
class AnchorRelative(AdvantageRule):
    """A = clip(Σ_c w_c (r_c − r_anc,c) / max(σ_c, floor)): the paper's rule, not centred.

    Branches that are all better than their anchor all get A > 0. weights: per signal, None for 1 each; of sum 1 they
    keep A in units of one deviation. std_floor: in units of a signal. clip: A_max, None for none.
    """

    weights: Mapping[str, float] | None = None
    std_floor: float = 1e-4
    clip: float | None = 2.5
    gate: AnchorGate = AnyBranchBeatsAnchor()

    reads: ClassVar[frozenset[type[Record]]] = frozenset({Anchors})

    def __call__(self, scores: Scores, groups: Tensor, anchors: Tensor | None = None) -> Advantage:
        weights = resolve_weights(self.weights, list(scores.values))
        compared = compare(scores, weights, groups, anchors)
        margin = anchor_relative(compared, weights, groups, self.std_floor)
        return settle(margin, margin, compared, weights, groups, self.gate, self.clip)


@dataclass(frozen=True)
class AnchorCentred(AdvantageRule):
    """A = clip(centre(Σ_c w_c (r_c − r_anc,c) / max(σ_c, floor))), centred over the branches: our default.

    Under a softmax over the branches a common part of A moves nothing but what clips make of it: clamped before it is
    centred, a group far above its anchor would lose all differences. So the anchor enters through the gate and the
    scale alone. Parameters as in `AnchorRelative`.
    """

    weights: Mapping[str, float] | None = None
    std_floor: float = 1e-4
    clip: float | None = 2.5
    gate: AnchorGate = AnyBranchBeatsAnchor()

    reads: ClassVar[frozenset[type[Record]]] = frozenset({Anchors})

    def __call__(self, scores: Scores, groups: Tensor, anchors: Tensor | None = None) -> Advantage:
        weights = resolve_weights(self.weights, list(scores.values))
        compared = compare(scores, weights, groups, anchors)
        margin = anchor_relative(compared, weights, groups, self.std_floor)
        return settle(
            centre(margin, groups, compared.branches), margin, compared, weights, groups, self.gate, self.clip
        )


class Fusion(ABC):
    """How the released rule scales local and global advantages before it adds them."""

    @abstractmethod
    def __call__(self, values: Tensor, groups: Tensor, branches: Tensor, eps: float = 1e-8) -> Tensor:
        """Advantages [N] → [N]; groups whose deviation over the branches does not exceed eps stay as they are."""


@dataclass(frozen=True)
class PlainFusion(Fusion):
    """As they are ("none")."""

    def __call__(self, values: Tensor, groups: Tensor, branches: Tensor, eps: float = 1e-8) -> Tensor:
        return values


@dataclass(frozen=True)
class StdFusion(Fusion):
    """Divided by their population deviation, not centred ("std"): what the released configs use."""

    def __call__(self, values: Tensor, groups: Tensor, branches: Tensor, eps: float = 1e-8) -> Tensor:
        std = group_std(values, groups, branches)
        return (values / (std + eps)).where(std > eps, values)


@dataclass(frozen=True)
class ZScoreFusion(Fusion):
    """Centred over the branches as well ("zscore")."""

    def __call__(self, values: Tensor, groups: Tensor, branches: Tensor, eps: float = 1e-8) -> Tensor:
        std = group_std(values, groups, branches)
        return (centre(values, groups, branches) / (std + eps)).where(std > eps, values)


@dataclass(frozen=True)
class ReleasedAnchorRelative(AdvantageRule):
    """A = clip(w_local f(a_local) + w_global f(a_global)), a = Σ_c w_c (r_c − r_anc,c)/(std_c + 1e-8): as released.

    std_c is unbiased and counts the anchor; A is not centred. local_weights: per signal that scores the neighbourhood
    of the routed blocks, None for 1 each of those not in global_weights. global_weights: per signal that scores the
    whole video, empty for none. The gate asks whether any branch beats the anchor in either weighted *raw* sum; the
    released code halves the loss of a gated prompt, we zero it, as the paper says.
    """

    local_weights: Mapping[str, float] | None = None
    global_weights: Mapping[str, float] = field(default_factory=dict)
    local_share: float = 1.0
    global_share: float = 0.5
    fusion: Fusion = StdFusion()
    clip: float | None = 2.5
    gate: AnchorGate = AnyBranchBeatsAnchor()

    reads: ClassVar[frozenset[type[Record]]] = frozenset({Anchors})

    def __call__(self, scores: Scores, groups: Tensor, anchors: Tensor | None = None) -> Advantage:
        names = list(scores.values)
        around = resolve_weights(self.local_weights, [name for name in names if name not in self.global_weights])
        scopes = [(self.local_share, around)]
        if self.global_weights:
            scopes.append((self.global_share, resolve_weights(self.global_weights, names)))
        everything = {name: weight for _, weights in scopes for name, weight in weights.items()}
        compared = compare(scores, everything, groups, anchors)
        values, margins = torch.zeros_like(groups, dtype=torch.float64), []
        for share, weights in scopes:
            components = {
                name: released_component(compared.values[name], groups, compared.anchors, valid=compared.valid)
                for name in weights
            }
            advantage = weighted_sum(components, weights).where(compared.branches, 0)
            values = values + share * self.fusion(advantage, groups, compared.branches)
            margins.append(anchor_margin(weighted_sum(compared.values, weights), groups, compared.anchors))
        margin = torch.stack(margins).amax(0)
        return settle(values, margin, compared, everything, groups, self.gate, self.clip)
