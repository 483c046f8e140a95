"""The selective KL flags what the primary signal over-rates, exactly that, and leaves everybody else alone."""

import itertools
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from framework.compatibility import IncompatibleRecipe, check_signals
from framework.optimization import AdamW
from framework.records import EndpointShift
from framework.types import Objective, Scores
from rewards.shapes import ShapesReward
from strategies.regularizers.selective_kl import (
    AdaptiveRatio,
    AtRandom,
    ConstantRatio,
    OverRated,
    Selection,
    SelectiveKL,
    UnderRated,
    midranks,
    rank_gap,
    risk_threshold,
)
from tests.framework.test_trainer import make_trainer
from tests.support import close, holds, normal, over, refuted

SEEDS = st.integers(0, 2**20)


def selective(selection: Selection | None = None, ratio: float = 0.1, **changes) -> SelectiveKL:
    return SelectiveKL("main", ("one", "two"), ratio=ConstantRatio(ratio), selection=selection, **changes)


def mask_of(regularizer: SelectiveKL, scores: Scores, groups: Tensor, anchors: Tensor | None = None) -> Tensor:
    return regularizer.prepare(scores, groups, anchors).per_clip.bool()


# ranks


def midranks_oracle(values: list[float], groups: list[int]) -> list[float]:
    ranks = []
    for i, value in enumerate(values):
        siblings = [values[j] for j in range(len(values)) if groups[j] == groups[i] and j != i]
        ranks.append(sum(s < value for s in siblings) + 0.5 * sum(s == value for s in siblings))
    return ranks


def check_midranks(rank: Callable[[Tensor, Tensor], Tensor], values: list[float], seed: int) -> None:
    groups = torch.randint(3, (len(values),), generator=torch.Generator().manual_seed(seed))
    found = rank(torch.tensor(values), groups)
    close(found, torch.tensor(midranks_oracle(values, groups.tolist()), dtype=torch.float64), atol=0)


def over_the_batch(values: Tensor, groups: Tensor) -> Tensor:
    return midranks(values, torch.zeros_like(groups))


def by_sorting(values: Tensor, groups: Tensor) -> Tensor:
    """A planted error: equal scores get different ranks, in the order of the clips."""
    return torch.stack([((values[groups == g] < v).sum() + (values[:i][groups[:i] == g] == v).sum()).double()
                        for i, (v, g) in enumerate(zip(values, groups, strict=True))])  # fmt: skip


TIED = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=2, max_size=10)


def test_ranks_are_taken_among_siblings_and_ties_share_theirs():
    holds(partial(check_midranks, midranks), TIED, SEEDS)


@pytest.mark.parametrize("mutant", [over_the_batch, by_sorting])
def test_the_rank_check_sees_mixed_prompts_and_broken_ties(mutant):
    refuted(partial(check_midranks, mutant), TIED, SEEDS)


@over(SEEDS, st.integers(1, 3))
def test_gaps_sum_to_zero_and_change_their_sign_with_the_roles(seed: int, groups: int):
    ids = torch.arange(groups).repeat(6)
    primary, auxiliary = normal(seed, len(ids)), normal(seed + 1, len(ids))
    gap = rank_gap(primary, [auxiliary], ids)
    assert abs(float(gap.sum())) < 1e-9
    close(gap, -rank_gap(auxiliary, [primary], ids), atol=0)
    close(gap, rank_gap((3 * primary).exp(), [auxiliary - 100, auxiliary * 7], ids), atol=0)


# the planted hack


def hacked(seed: int, prompts: int = 1, difficulty: float = 0.0) -> tuple[Scores, Tensor, Tensor]:
    """36 clips of which 4 have the highest primary and the lowest auxiliary scores → (scores, groups, the four)."""
    primary, one, two = (normal(seed + k, 36) for k in range(3))
    groups = torch.arange(36) % prompts
    shared = 0.5 * normal(seed + 3, 36)  # the signals agree in part
    primary, one, two = (x + shared for x in (primary, one, two))
    hacks = torch.zeros(36, dtype=torch.bool)
    hacks[torch.randperm(36, generator=torch.Generator().manual_seed(seed))[:4]] = True
    primary[hacks] = 10 + normal(seed + 4, 4)
    one[hacks], two[hacks] = -10 + normal(seed + 5, 4), -10 + normal(seed + 6, 4)
    primary = primary + difficulty * groups
    return Scores.of({"main": primary, "one": one, "two": two}), groups, hacks


def share_of_four(selection: Selection, seed: int) -> tuple[Tensor, Tensor]:
    """(mask, hacks), ρ such that the threshold lies between the fourth and the fifth largest gap."""
    scores, groups, hacks = hacked(seed)
    gap = rank_gap(scores.values["main"], [scores.values["one"], scores.values["two"]], groups)
    ratio = 3.5 / (int((gap >= 0).sum()) - 1)
    return mask_of(selective(selection, ratio), scores, groups), hacks


def check_the_hack_is_masked_exactly(selection: Selection, seed: int) -> None:
    mask, hacks = share_of_four(selection, seed)
    assert torch.equal(mask, hacks)


def check_the_hack_is_not_masked_at_all(selection: Selection, seed: int) -> None:
    mask, hacks = share_of_four(selection, seed)
    assert mask.any() and not (mask & hacks).any()


def test_a_planted_hack_of_four_clips_is_masked_exactly():
    holds(partial(check_the_hack_is_masked_exactly, OverRated()), SEEDS)


@pytest.mark.parametrize("control", [UnderRated(), AtRandom()])
def test_the_hack_check_sees_the_controls(control: Selection):
    refuted(partial(check_the_hack_is_masked_exactly, control), SEEDS)


def test_with_the_inverted_sign_no_hack_is_masked():
    holds(partial(check_the_hack_is_not_masked_at_all, UnderRated()), SEEDS)
    refuted(partial(check_the_hack_is_not_masked_at_all, OverRated()), SEEDS)


def check_difficulty_is_removed(within_prompt: bool, seed: int, difficulty: float) -> None:
    easy, hard = (hacked(seed, prompts=3, difficulty=d) for d in (0.0, difficulty))
    masks = [mask_of(selective(within_prompt=within_prompt), scores, groups) for scores, groups, _ in (easy, hard)]
    assert torch.equal(*masks)


DIFFICULTIES = st.floats(5.0, 50.0)


def test_how_easy_a_prompt_is_does_not_reach_the_mask():
    holds(partial(check_difficulty_is_removed, True), SEEDS, DIFFICULTIES)


def test_the_difficulty_check_sees_ranks_over_all_prompts():
    refuted(partial(check_difficulty_is_removed, False), SEEDS, DIFFICULTIES)


# the share


def mask_oracle(gap: list[float], ratio: float) -> list[bool]:
    positive = sorted(g for g in gap if g >= 0)
    if not positive:
        return [False] * len(gap)
    place = (len(positive) - 1) * (1 - ratio)
    low = int(place)
    high = min(low + 1, len(positive) - 1)
    threshold = positive[low] + (place - low) * (positive[high] - positive[low])
    return [g > threshold for g in gap]


def check_share(per_prompt: bool, seed: int, prompts: int, ratio: float) -> None:
    """The percentile is pooled over all prompts: ρ of the non-negative gaps are flagged, fewer where some tie."""
    groups = torch.arange(prompts).repeat_interleave(8)
    scores = Scores.of({name: normal(seed + k, len(groups)) for k, name in enumerate(("main", "one", "two"))})
    if per_prompt:
        parts = [
            mask_of(selective(ratio=ratio), rows_of(scores, groups == g), torch.zeros(8, dtype=torch.long))
            for g in range(prompts)
        ]
        mask = torch.cat(parts)
    else:
        mask = mask_of(selective(ratio=ratio), scores, groups)
    gap = rank_gap(scores.values["main"], [scores.values["one"], scores.values["two"]], groups)
    assert mask.tolist() == mask_oracle((gap / 8).tolist(), ratio)
    assert mask.sum() <= math.ceil(ratio * (int((gap >= 0).sum()) - 1) + 1e-9)


def rows_of(scores: Scores, rows: Tensor) -> Scores:
    return Scores.of({name: value[rows] for name, value in scores.values.items()})


RATIOS = st.floats(0.02, 0.2)


def test_the_ratio_is_a_share_of_the_non_negative_gaps_of_the_whole_step():
    holds(partial(check_share, False), SEEDS, st.integers(1, 6), RATIOS)


def test_the_share_check_sees_a_percentile_per_prompt():
    refuted(partial(check_share, True), SEEDS, st.integers(4, 6), RATIOS)


@over(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.floats(0.01, 1.0))
def test_the_threshold_is_the_linear_percentile(positive: list[float], ratio: float):
    found = risk_threshold(torch.tensor(positive, dtype=torch.float64), ratio)
    assert found == float(np.percentile(np.array(positive), 100 * (1 - ratio), method="linear"))


def test_signals_that_agree_flag_nobody():
    scores = Scores.of({name: torch.arange(8.0) for name in ("main", "one", "two")})
    assert not mask_of(selective(), scores, torch.zeros(8, dtype=torch.long)).any()


def coarse(seed: int, prompts: int, branches: int) -> tuple[Scores, Tensor]:
    """Few branches whose scores take three values: ranks and gaps tie."""
    random, clips = torch.Generator().manual_seed(seed), prompts * branches
    values = {name: torch.randint(3, (clips,), generator=random).float() for name in ("main", "one", "two")}
    return Scores.of(values), torch.arange(prompts).repeat_interleave(branches)


Masked = Callable[[Scores, Tensor, float], Tensor]


def check_the_ratio_is_a_bound(masked: Masked, seed: int, prompts: int, branches: int, ratio: float) -> None:
    """No more than ⌈ρ (|D⁺| − 1)⌉ clips pay, however many tie, and all whose gap is larger than a payer's do."""
    scores, groups = coarse(seed, prompts, branches)
    mask = masked(scores, groups, ratio)
    gap = rank_gap(scores.values["main"], [scores.values["one"], scores.values["two"]], groups)
    assert int(mask.sum()) <= math.ceil(ratio * (int((gap >= 0).sum()) - 1) + 1e-9)
    assert not mask.any() or float(gap[mask].min()) > float(gap[~mask].max())


def strictly(scores: Scores, groups: Tensor, ratio: float) -> Tensor:
    return mask_of(selective(ratio=ratio), scores, groups)


def ties_included(scores: Scores, groups: Tensor, ratio: float) -> Tensor:
    """A planted error: U ≥ τ."""
    gap = rank_gap(scores.values["main"], [scores.values["one"], scores.values["two"]], groups)
    return gap >= risk_threshold(gap[gap >= 0], ratio)


def the_first_of_a_tie(scores: Scores, groups: Tensor, ratio: float) -> Tensor:
    """A planted error: the share is filled up with whoever comes first."""
    gap = rank_gap(scores.values["main"], [scores.values["one"], scores.values["two"]], groups)
    count = math.ceil(ratio * (int((gap >= 0).sum()) - 1) - 1e-9)
    return torch.zeros_like(gap).index_fill_(0, gap.argsort(descending=True, stable=True)[:count], 1.0).bool()


COARSE = (SEEDS, st.integers(1, 6), st.integers(2, 5), RATIOS)


def test_the_ratio_bounds_who_pays_and_a_tie_is_never_broken():
    holds(partial(check_the_ratio_is_a_bound, strictly), *COARSE, examples=100)


@pytest.mark.parametrize("mutant", [ties_included, the_first_of_a_tie])
def test_the_bound_check_sees_ties_that_pay(mutant: Masked):
    refuted(partial(check_the_ratio_is_a_bound, mutant), *COARSE)


def test_a_largest_gap_that_more_clips_share_than_may_pay_lets_all_of_them_off():
    """Six prompts of four: the primary turns the order of the auxiliaries around in one, in two, in three of them."""
    groups, order = torch.arange(6).repeat_interleave(4), torch.arange(4.0)
    for turned, paying in ((1, 1), (2, 0), (3, 0)):
        main = torch.cat([order.flip(0) if g < turned else order for g in range(6)])
        scores = Scores.of({"main": main, "one": order.repeat(6), "two": order.repeat(6)})
        assert int(strictly(scores, groups, 0.04).sum()) == paying
        assert int(ties_included(scores, groups, 0.04).sum()) == turned


def test_without_a_clip_to_rank_nobody_is_flagged_and_the_ratio_stays():
    regularizer = SelectiveKL("main", ("one", "two"))
    bad = Scores.of({name: torch.full((4,), torch.nan) for name in ("main", "one", "two")})
    marks = regularizer.prepare(bad, torch.zeros(4, dtype=torch.long))
    assert not marks.per_clip.any() and marks.metrics.keys() == {"mask_fraction"}
    assert isinstance(regularizer.ratio, AdaptiveRatio) and not regularizer.ratio.remembered


# who is ranked


def check_outsiders_take_no_part(prepared: Callable[..., Tensor], seed: int) -> None:
    """Clips with a failed signal and anchors are not marked, and the others get what they would get without them."""
    scores, groups, _ = hacked(seed, prompts=2)
    random = torch.Generator().manual_seed(seed + 9)
    failed, anchors = (torch.rand(36, generator=random) < 0.2 for _ in range(2))
    values = {**scores.values, "one": torch.where(failed, torch.nan, scores.values["one"])}
    values["main"] = torch.where(anchors, 1e3, values["main"])
    mask = prepared(selective(ratio=0.3), Scores.of(values), groups, anchors)
    inside = ~(failed | anchors)
    assert not (mask & ~inside).any()
    alone = mask_of(selective(ratio=0.3), rows_of(scores, inside), groups[inside])
    assert torch.equal(mask[inside], alone)


def anchors_ranked(regularizer: SelectiveKL, scores: Scores, groups: Tensor, anchors: Tensor) -> Tensor:
    return mask_of(regularizer, scores, groups) & ~anchors


def failed_as_zero(regularizer: SelectiveKL, scores: Scores, groups: Tensor, anchors: Tensor) -> Tensor:
    filled = Scores.of({name: value.nan_to_num(0) for name, value in scores.values.items()})
    return mask_of(regularizer, filled, groups, anchors)


def test_failed_scores_and_anchors_are_neither_ranked_nor_marked():
    holds(partial(check_outsiders_take_no_part, mask_of), SEEDS)


@pytest.mark.parametrize("mutant", [anchors_ranked, failed_as_zero])
def test_the_outsider_check_sees_anchors_and_failed_scores_among_the_ranks(mutant):
    refuted(partial(check_outsiders_take_no_part, mutant), SEEDS)


@over(SEEDS, st.integers(0, 100))
def test_the_random_control_marks_as_many_others_every_step_and_repeats_itself(seed: int, steps: int):
    scores, groups, _ = hacked(seed)
    method, control, again = (selective(s, 0.3) for s in (OverRated(), AtRandom(seed=3), AtRandom(seed=3)))
    for regularizer in (control, again):
        regularizer.load_state_dict({"steps": steps, "ratio": {}})
    masks = [mask_of(control, scores, groups) for _ in range(4)]
    assert {int(mask.sum()) for mask in masks} == {int(mask_of(method, scores, groups).sum())}
    assert any(not torch.equal(a, b) for a, b in itertools.pairwise(masks))
    assert all(torch.equal(mask, mask_of(again, scores, groups)) for mask in masks)


# the ratio


def test_the_ratio_follows_the_disagreement_within_its_bounds():
    ratio = AdaptiveRatio(base=0.1, step=0.5, low=0.08, high=0.2, memory=2)
    updates = [ratio.update(gap) for gap in (1.0, 2.0, 1.5, 3.0, 1.0, 0.5, 0.7)]
    assert updates == pytest.approx([0.1, 0.15, 0.15, 0.2, 0.1, 0.08, 0.08])
    assert list(ratio.remembered) == [0.5, 0.7]


def check_ratio_resumes(save: Callable[[SelectiveKL], dict], seed: int, cut: int) -> None:
    """A regularizer that is saved and loaded between two steps goes on as if nothing had happened."""
    whole, first, second = (
        SelectiveKL("main", ("one", "two"), ratio=AdaptiveRatio(memory=4), selection=AtRandom()) for _ in range(3)
    )
    steps = [hacked(seed + 10 * step, prompts=2)[:2] for step in range(cut + 3)]
    expected = [whole.prepare(*step) for step in steps]
    for step in steps[:cut]:
        first.prepare(*step)
    second.load_state_dict(save(first))
    for step, wanted in zip(steps[cut:], expected[cut:], strict=True):
        found = second.prepare(*step)
        assert torch.equal(found.per_clip, wanted.per_clip) and found.metrics == wanted.metrics


CUTS = st.integers(4, 8)


def test_the_ratio_its_memory_and_the_random_stream_survive_a_checkpoint():
    holds(partial(check_ratio_resumes, SelectiveKL.state_dict), SEEDS, CUTS, examples=20)


@pytest.mark.parametrize("forgotten", ["steps", "ratio", "remembered"])
def test_the_checkpoint_check_sees_each_forgotten_part(forgotten: str):
    fresh = {"steps": 0, "ratio": 0.1, "remembered": []}

    def save(regularizer: SelectiveKL) -> dict:
        state = regularizer.state_dict()
        inside = state["ratio"] | {key: fresh[key] for key in (forgotten,) if key != "steps"}
        return {"steps": 0 if forgotten == "steps" else state["steps"], "ratio": inside}

    refuted(partial(check_ratio_resumes, save), SEEDS, CUTS, examples=40)


# the penalty


@over(SEEDS, st.floats(0.0, 2.0))
def test_marked_clips_pay_the_velocity_kl_and_the_others_nothing(seed: int, weight: float):
    distance, marks = normal(seed, 5).square(), torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0])
    objective = Objective(torch.zeros(5), {EndpointShift: EndpointShift(distance)})
    regularizer = selective(weight=weight)
    close(regularizer.penalty(objective, marks), weight * marks * distance, atol=1e-12)
    with pytest.raises(ValueError, match="needs the marks"):
        regularizer.penalty(objective, None)


def weights_after(weight: float, marked: bool) -> dict[str, Tensor]:
    """Two steps of training, VQ against MQ, with everybody who is over-rated flagged or nobody."""
    auxiliary = "MQ" if marked else "TA"
    regularizer = SelectiveKL("VQ", (auxiliary,), weight=weight, ratio=ConstantRatio(0.9))
    trainer = make_trainer(regularizer=regularizer, optimizer=AdamW(1e-3), reward=ShapesReward())
    if not marked:
        trainer.reward = Agreeing()
    for _ in range(2):
        metrics = trainer.step()
    assert (float(metrics["train/mask_fraction"]) > 0) == marked
    return {name: p.detach().clone() for name, p in trainer.policies.parameters.items()}


class Agreeing(ShapesReward):
    """TA is VQ: nothing is over-rated."""

    def score(self, videos):
        scores = super().score(videos)
        return Scores({**scores.values, "TA": scores.values["VQ"]}, scores.valid)


def test_the_weight_matters_exactly_where_a_clip_is_marked():
    def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
        return all(torch.equal(value, right[name]) for name, value in left.items())

    assert same(weights_after(0.0, marked=False), weights_after(50.0, marked=False))
    assert not same(weights_after(0.0, marked=True), weights_after(50.0, marked=True))


def test_training_logs_the_mask_the_ratio_the_gap_and_the_kl_of_those_who_pay():
    trainer = make_trainer(
        regularizer=SelectiveKL("VQ", ("MQ", "TA"), ratio=AdaptiveRatio(base=0.9, high=0.9)), optimizer=AdamW(1e-3)
    )
    first, second = trainer.step(), trainer.step()
    tags = ("mask_fraction", "risk_ratio", "mean_gap", "kl", "frac_penalised", "kl_penalised", "penalty")
    assert {f"train/{tag}" for tag in tags} <= second.keys()
    assert float(first["train/kl"]) == 0  # the reference is the initial policy
    assert float(second["train/frac_penalised"]) == pytest.approx(float(second["train/mask_fraction"]))
    paid = 1e-2 * float(second["train/kl_penalised"]) * float(second["train/frac_penalised"])
    assert float(second["train/penalty"]) == pytest.approx(paid, rel=1e-4)


# refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"primary": "VQ", "auxiliaries": ("MQ", "VQ")}, "contain the primary signal 'VQ'"),
        ({"primary": "VQ", "auxiliaries": ()}, "at least one signal"),
        ({"primary": "VQ", "auxiliaries": ("MQ", "MQ")}, "each once"),
        ({"primary": "VQ", "auxiliaries": ("MQ",), "weight": -1.0}, r"SelectiveKL\.weight"),
    ],
)
def test_meaningless_signals_and_weights_are_refused_at_construction(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        SelectiveKL(**arguments)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ConstantRatio(0.0), r"ConstantRatio\.value"),
        (lambda: AdaptiveRatio(low=0.3, high=0.2), "low ≤ high"),
        (lambda: AdaptiveRatio(memory=0), "memory of at least 1"),
    ],
)
def test_meaningless_ratios_are_refused_at_construction(build: Callable[[], object], message: str):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_signal_that_the_reward_does_not_give_is_refused_before_the_run():
    check_signals(SelectiveKL("VQ", ("MQ",)), ShapesReward())
    with pytest.raises(IncompatibleRecipe, match=r"SelectiveKL reads the reward signals \['HPS'\]"):
        check_signals(SelectiveKL("HPS", ("MQ",)), ShapesReward())
