"""An anchor-relative advantage compares with the branch that explored nothing, and a prompt that it beats is silent."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from framework.anchored_advantages import (
    AnchorCentred,
    AnchorGate,
    AnchorRelative,
    AnyBranchBeatsAnchor,
    NoGate,
    PlainFusion,
    ReleasedAnchorRelative,
    StdFusion,
    ZScoreFusion,
    compare,
    unbiased_std,
)
from framework.interfaces import AdvantageRule
from framework.records import Anchors
from framework.trainer import combine
from framework.types import Advantage, Objective, Scores
from tests.support import close, holds, normal, over, refuted

WEIGHTS = {"a": 1.0, "b": 0.5}
Rule = Callable[[Scores, Tensor, Tensor], Advantage]


@dataclass(frozen=True)
class Batch:
    """Two signals [N] of groups with one anchor each, placed in any order."""

    scores: Scores
    groups: Tensor
    anchors: Tensor
    seed: int

    def with_values(self, change: Callable[[str, Tensor], Tensor]) -> "Batch":
        values = {name: change(name, value) for name, value in self.scores.values.items()}
        return replace(self, scores=Scores.of(values))


@st.composite
def batches(draw) -> Batch:
    prompts, branches, seed = draw(st.integers(1, 4)), draw(st.integers(2, 6)), draw(st.integers(0, 2**20))
    ids = draw(st.lists(st.integers(0, 10**6), min_size=prompts, max_size=prompts, unique=True))
    size = prompts * (branches + 1)
    place = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    groups = torch.tensor(ids).repeat_interleave(branches + 1)[place]
    anchors = (torch.arange(size) % (branches + 1) == 0)[place]
    scores = Scores.of({"a": normal(seed, size), "b": 30 + 10 * normal(seed + 1, size)})
    return Batch(scores, groups, anchors, seed)


def apply(rule: Rule, batch: Batch) -> Advantage:
    return rule(batch.scores, batch.groups, batch.anchors)


RULES: dict[str, AdvantageRule] = {
    "relative": AnchorRelative(WEIGHTS),
    "centred": AnchorCentred(WEIGHTS),
    "released": ReleasedAnchorRelative(WEIGHTS),
    "released, two scopes": ReleasedAnchorRelative({"a": 1.0}, {"b": 1.0}),
}
ALL = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


# the formula, by loops


def check_formula(rule: Rule, centred: bool, batch: Batch) -> None:
    """Σ_c w_c (r_c − r_anc,c)/σ_c with the population deviation, the anchor included, then centred and clipped."""
    advantage = apply(rule, batch)
    for group in batch.groups.unique():
        rows = torch.nonzero(batch.groups == group).squeeze(1).tolist()
        (anchor,) = (row for row in rows if batch.anchors[row])
        totals = dict.fromkeys(rows, 0.0)
        for name, weight in WEIGHTS.items():
            values = batch.scores.values[name].tolist()
            mean = sum(values[row] for row in rows) / len(rows)
            std = math.sqrt(sum((values[row] - mean) ** 2 for row in rows) / len(rows))
            for row in rows:
                totals[row] += weight * (values[row] - values[anchor]) / max(std, 1e-4)
        branches = [row for row in rows if row != anchor]
        shut = all(totals[row] <= 0 for row in branches)
        middle = sum(totals[row] for row in branches) / len(branches) if centred else 0.0
        for row in branches:
            expected = 0.0 if shut else min(max(totals[row] - middle, -2.5), 2.5)
            assert math.isclose(float(advantage.values[row]), expected, abs_tol=1e-5)
            assert bool(advantage.active[row]) != shut
        assert not advantage.active[anchor] and advantage.values[anchor] == 0


FORMULAS = [(AnchorRelative, False), (AnchorCentred, True)]


@pytest.mark.parametrize(("kind", "centred"), FORMULAS)
def test_the_advantage_is_the_scaled_margin_over_the_anchor(kind: Callable[..., Rule], centred: bool):
    holds(partial(check_formula, kind(WEIGHTS), centred), batches())


@pytest.mark.parametrize(("kind", "centred"), FORMULAS)
def test_the_formula_check_sees_another_centre_weight_and_gate(kind: Callable[..., Rule], centred: bool):
    other = {AnchorRelative: AnchorCentred, AnchorCentred: AnchorRelative}[kind]
    for mutant in (other(WEIGHTS), kind({"a": 1.0, "b": 1.0}), kind(WEIGHTS, gate=NoGate()), kind(WEIGHTS, clip=1.0)):
        refuted(partial(check_formula, mutant, centred), batches())


# what may not matter


def check_common_constant(rule: Rule, batch: Batch, shift: float) -> None:
    """A constant added to all rewards, the anchor's included, changes nothing."""
    before = apply(rule, batch)
    after = apply(rule, batch.with_values(lambda name, value: value + shift))
    close(after.values, before.values, atol=1e-5)
    assert torch.equal(after.active, before.active)


def against_zero(scores: Scores, groups: Tensor, anchors: Tensor) -> Advantage:
    """A planted error: rewards are compared with nothing."""
    compared = compare(scores, WEIGHTS, groups, anchors)
    values = compared.values["a"] / unbiased_std(compared.values["a"], groups)
    return Advantage(values.where(~anchors, 0), (~anchors) & (values > 0), groups)


@ALL
def test_a_constant_added_to_all_rewards_changes_nothing(rule: Rule):
    holds(partial(check_common_constant, rule), batches(), st.floats(-50, 50))


def test_the_constant_check_sees_rewards_that_are_compared_with_nothing():
    refuted(partial(check_common_constant, against_zero), batches(), st.floats(-50, 50))


def check_placement(rule: Rule, batch: Batch) -> None:
    """Clips may stand in any order, and a prompt's advantages do not know the other prompts."""
    before = apply(rule, batch)
    order = torch.randperm(len(batch.groups), generator=torch.Generator().manual_seed(batch.seed + 1))
    scores = Scores.of({name: value[order] for name, value in batch.scores.values.items()})
    moved = rule(scores, batch.groups[order], batch.anchors[order])
    close(moved.values, before.values[order], atol=1e-6)
    assert torch.equal(moved.active, before.active[order])
    for group in batch.groups.unique():
        rows = batch.groups == group
        alone = Scores.of({name: value[rows] for name, value in batch.scores.values.items()})
        part = rule(alone, batch.groups[rows], batch.anchors[rows])
        close(part.values, before.values[rows], atol=1e-6)
        assert torch.equal(part.active, before.active[rows])


def one_anchor_for_all(scores: Scores, groups: Tensor, anchors: Tensor) -> Advantage:
    """A planted error: everybody is compared with the first anchor."""
    first = torch.zeros_like(anchors)
    first[torch.nonzero(anchors)[0]] = True
    whole = AnchorRelative(WEIGHTS)(scores, torch.zeros_like(groups), first)
    return replace(whole, values=whole.values.where(~anchors, 0), active=whole.active & ~anchors)


@ALL
def test_a_prompt_does_not_know_the_others_nor_its_place(rule: Rule):
    holds(partial(check_placement, rule), batches(), examples=25)


def test_the_placement_check_sees_an_anchor_shared_by_prompts():
    refuted(partial(check_placement, one_anchor_for_all), batches())


def check_zero_sum(rule: Rule, batch: Batch) -> None:
    advantage = apply(rule, batch)
    for group in batch.groups.unique():
        assert abs(advantage.values[batch.groups == group].sum()) < 1e-5


def test_the_default_rule_is_centred_over_the_branches_even_far_from_the_anchor():
    """Clamping before centring would make a group far above its anchor lose all differences."""

    def far_above(batch: Batch) -> Batch:
        return batch.with_values(lambda name, value: value + 200 * (~batch.anchors))

    holds(lambda batch: check_zero_sum(AnchorCentred(WEIGHTS, clip=None), far_above(batch)), batches())
    refuted(lambda batch: check_zero_sum(AnchorRelative(WEIGHTS), far_above(batch)), batches())


# the gate


def losing_prompt(batch: Batch) -> tuple[Batch, Tensor]:
    """The first prompt's branches are all far worse than its anchor; which clips are of that prompt."""
    rows = batch.groups == batch.groups[0]
    return batch.with_values(lambda name, value: value - 100 * (rows & ~batch.anchors)), rows


def check_gate(rule: Rule, batch: Batch) -> None:
    """All branches worse: every term of the prompt is exactly zero, its penalty included; others are unaffected."""
    before, (worse, rows) = apply(rule, batch), losing_prompt(batch)
    after = apply(rule, worse)
    assert not bool(after.active[rows].any()) and bool((after.values[rows] == 0).all())
    assert torch.equal(after.active[~rows], before.active[~rows])
    close(after.values[~rows], before.values[~rows], atol=1e-6)
    logits = normal(batch.seed, len(rows)).requires_grad_()
    loss = combine(Objective(-logits * after.values), 10 * logits.square(), after.active)
    (gradient,) = torch.autograd.grad(loss.per_clip.sum(), logits)
    assert bool((gradient[rows] == 0).all())
    branches, prompts = ~batch.anchors, batch.groups.unique()
    shut = [not bool(after.active[(batch.groups == group) & branches].any()) for group in prompts]
    close(after.metrics["gated_fraction"], torch.tensor(sum(shut) / len(prompts)), atol=1e-6)


@dataclass(frozen=True)
class LenientGate(AnchorGate):
    """A planted error: a prompt is open as soon as its best branch comes near the anchor."""

    def __call__(self, margin: Tensor, groups: Tensor, branches: Tensor) -> Tensor:
        return AnyBranchBeatsAnchor()(margin + 1000, groups, branches)


@dataclass(frozen=True)
class BatchGate(AnchorGate):
    """A planted error: one winner anywhere opens all prompts."""

    def __call__(self, margin: Tensor, groups: Tensor, branches: Tensor) -> Tensor:
        return AnyBranchBeatsAnchor()(margin, torch.zeros_like(groups), branches)


@ALL
def test_a_prompt_whose_branches_all_lose_to_the_anchor_is_silent(rule: Rule):
    holds(partial(check_gate, rule), batches())


@pytest.mark.parametrize("gate", [NoGate(), LenientGate(), BatchGate()])
@ALL
def test_the_gate_check_sees_a_gate_that_is_open(rule: AdvantageRule, gate: AnchorGate):
    refuted(partial(check_gate, replace(rule, gate=gate)), batches())  # pyright: ignore[reportArgumentType]


@over(batches())
def test_without_a_gate_every_valid_branch_is_active_and_nothing_counts_as_gated(batch: Batch):
    worse, _ = losing_prompt(batch)
    advantage = apply(AnchorCentred(WEIGHTS, gate=NoGate()), worse)
    assert torch.equal(advantage.active, ~batch.anchors) and advantage.metrics["gated_fraction"] == 0


@over(batches())
def test_a_tie_with_the_anchor_does_not_beat_it(batch: Batch):
    level = batch.with_values(lambda name, value: torch.full_like(value, 0.1))
    for rule in RULES.values():
        assert not bool(apply(rule, level).active.any())


# invalid scores


def check_invalid(rule: Rule, batch: Batch) -> None:
    """An anchor that could not be scored silences its prompt alone; a branch that could not is left out alone."""
    rows = batch.groups == batch.groups[0]
    anchor, branch = rows & batch.anchors, torch.zeros_like(rows)
    blind = batch.with_values(lambda name, value: value.where(~anchor, torch.nan) if name == "b" else value)
    before, after = apply(rule, batch), apply(rule, blind)
    assert not bool(after.active[rows].any()) and bool((after.values[rows] == 0).all())
    close(after.values[~rows], before.values[~rows], atol=1e-6)
    assert torch.equal(after.active[~rows], before.active[~rows])
    branch[torch.nonzero(rows & ~batch.anchors)[0]] = True
    lame = batch.with_values(lambda name, value: value.where(~branch, torch.nan) if name == "b" else value)
    without = Scores.of({name: value[~branch] for name, value in batch.scores.values.items()})
    expected = rule(without, batch.groups[~branch], batch.anchors[~branch])
    partly = apply(rule, lame)
    assert not bool(partly.active[branch].any()) and bool((partly.values[branch] == 0).all())
    close(partly.values[~branch], expected.values, atol=1e-6)
    assert torch.equal(partly.active[~branch], expected.active)


def failed_as_zero(scores: Scores, groups: Tensor, anchors: Tensor) -> Advantage:
    """A planted error: a failed score counts as a reward of zero."""
    return AnchorCentred(WEIGHTS)(Scores.of({k: v.nan_to_num(0) for k, v in scores.values.items()}), groups, anchors)


@ALL
def test_a_failed_score_is_no_score(rule: Rule):
    holds(partial(check_invalid, rule), batches())


def test_the_invalid_check_sees_a_failed_score_that_counts_as_zero():
    refuted(partial(check_invalid, failed_as_zero), batches())


# the released rule


@over(batches(), st.sampled_from([PlainFusion(), StdFusion(), ZScoreFusion()]))
def test_the_released_rule_scales_each_scope_and_adds_them(batch: Batch, fusion):
    rule = ReleasedAnchorRelative({"a": 2.0}, {"b": 1.0}, 0.7, 0.3, fusion, clip=None, gate=NoGate())
    advantage = apply(rule, batch)
    for group in batch.groups.unique():
        rows = (batch.groups == group) & ~batch.anchors
        anchor = (batch.groups == group) & batch.anchors
        total = torch.zeros(int(rows.sum()), dtype=torch.float64)
        for name, weight, share in (("a", 2.0, 0.7), ("b", 1.0, 0.3)):
            values = batch.scores.values[name]
            a = weight * (values[rows] - values[anchor]) / (values[rows | anchor].std() + 1e-8)
            if not isinstance(fusion, PlainFusion):
                a = (a - (a.mean() if isinstance(fusion, ZScoreFusion) else 0)) / (a.std(correction=0) + 1e-8)
            total += share * a
        close(advantage.values[rows], total, atol=1e-5, rtol=1e-5)


def test_branches_without_spread_are_not_blown_up_by_the_released_fusion():
    groups, branches = torch.zeros(3, dtype=torch.long), torch.ones(3, dtype=torch.bool)
    level = torch.full((3,), 0.4, dtype=torch.float64)
    for fusion in (StdFusion(), ZScoreFusion()):
        close(fusion(level, groups, branches), level, atol=0)


def test_either_scope_opens_the_released_gate():
    scores = Scores.of({"a": torch.tensor([1.0, 0.0, 2.0]), "b": torch.tensor([3.0, 0.0, 2.0])})
    groups, anchors = torch.zeros(3, dtype=torch.long), torch.tensor([False, False, True])
    assert not bool(ReleasedAnchorRelative({"a": 1.0})(scores, groups, anchors).active.any())
    rule = ReleasedAnchorRelative({"a": 1.0}, {"b": 1.0})
    assert rule(scores, groups, anchors).active.tolist() == [True, True, False]


# refusals


@ALL
def test_groups_without_exactly_one_anchor_are_refused(rule: AdvantageRule):
    scores = Scores.of({"a": torch.zeros(4), "b": torch.zeros(4)})
    groups = torch.tensor([5, 5, 6, 6])
    assert rule.reads == {Anchors}
    with pytest.raises(ValueError, match="group 5 has 0 anchor branches"):
        rule(scores, groups)
    with pytest.raises(ValueError, match="group 6 has 2 anchor branches"):
        rule(scores, groups, torch.tensor([True, False, True, True]))


@ALL
def test_weights_of_unknown_signals_are_refused(rule: AdvantageRule):
    scores = Scores.of({"c": torch.zeros(2)})
    with pytest.raises(ValueError, match="weights name the reward signals"):
        rule(scores, torch.zeros(2, dtype=torch.long), torch.tensor([True, False]))
