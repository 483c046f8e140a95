"""Clips without a score: each policy does what it says, alike on all ranks, and never puts a number in their place."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from framework.advantages import GroupRelative
from framework.commands.train import check_settled, start_lines
from framework.distributed import World
from framework.interfaces import RewardFailed, RewardModel
from framework.judging import scored as scored_by
from framework.nonfinite import NonFinite, Skip
from framework.optimization import AdamW
from framework.types import Scores, VideoBatch
from rewards.caching import CachedReward
from rewards.composite import CompositeReward, WeightedReward
from rewards.failure import Mask, Raise, SkipComponent, dropped
from strategies.regularizers.branch_kl import BranchKL
from strategies.regularizers.selective_kl import SelectiveKL
from tests.framework.test_trainer import make_trainer, moved, weights
from tests.ranks import make, results, run_ranks
from tests.support import Brightness, holds, refuted

PATTERNS = st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4)
"""Which of the six clips of some groups have a score."""


@dataclass
class Failing(RewardModel):
    """Brightness of which some clips fail, or everything does."""

    names: tuple[str, ...] = ("bright", "red")
    clips: tuple[int, ...] = ()
    down: bool = False
    asked: int = field(default=0, init=False)

    @property
    def signals(self) -> tuple[str, ...]:
        return self.names

    def score(self, videos: VideoBatch) -> Scores:
        self.asked += 1
        if self.down:
            raise RewardFailed("nobody answers")
        values = list(Brightness().score(videos).values.values())[: len(self.names)]
        failed = torch.isin(torch.arange(len(videos)), torch.tensor(self.clips))
        return Scores.of({n: v.masked_fill(failed, torch.nan) for n, v in zip(self.names, values, strict=True)})


def scored(valid: list[list[bool]]) -> tuple[Scores, Tensor]:
    """(scores of six clips a group, their groups)."""
    flags = torch.tensor(valid)
    values = (torch.arange(flags.numel()) + 1.0).masked_fill(~flags.flatten(), torch.nan)
    return Scores.of({"a": values}), torch.arange(len(valid)).repeat_interleave(6)


def check_mask(settle: Callable[[Scores, Tensor], Scores], valid: list[list[bool]]) -> None:
    """A group keeps its valid clips where half of the six, and three, are left; values that stay are untouched."""
    scores, groups = scored(valid)
    kept = settle(scores, groups)
    for g, group in enumerate(valid):
        rows = groups == g
        expected = torch.tensor(group) if sum(group) >= 3 else torch.zeros(6, dtype=torch.bool)
        assert torch.equal(kept.valid["a"][rows], expected)
    usable = kept.valid["a"]
    assert torch.equal(kept.values["a"][usable], scores.values["a"][usable])
    assert bool(kept.values["a"][~usable].isnan().all()), "never a number"


def mask(**options: Any) -> Mask:
    return Mask(Failing(("a",)), limit=1.0, **options)


def test_a_group_that_lost_half_of_its_clips_leaves_the_step() -> None:
    holds(partial(check_mask, mask().settle), PATTERNS)


@pytest.mark.parametrize("broken", ["keeps every group", "puts zeros"])
def test_the_check_of_the_mask_sees_a_policy_that_does_not(broken: str) -> None:
    def settle(scores: Scores, groups: Tensor) -> Scores:
        if broken == "keeps every group":
            return scores
        settled = mask().settle(scores, groups)
        return Scores({"a": settled.values["a"].nan_to_num(0)}, settled.valid)

    refuted(partial(check_mask, settle), PATTERNS)


def test_a_group_in_which_nothing_failed_stays_however_small_it_is() -> None:
    scores = Scores.of({"a": torch.tensor([1.0, 2.0, 3.0, torch.nan])})
    kept = mask().settle(scores, torch.tensor([0, 0, 1, 1]))
    assert kept.valid["a"].tolist() == [True, True, False, False]


def test_a_run_that_keeps_losing_clips_ends_and_a_resumed_one_knows_how_many_steps_it_was() -> None:
    reward = Mask(Failing(("a",)), limit=0.05, patience=3)
    bad, good = scored([[False] + 5 * [True]]), scored([6 * [True]])
    for scores in (bad, bad, good, bad, bad):
        reward.settle(*scores)
    assert reward.metrics() == {"reward/a/invalid": pytest.approx(1 / 6)}
    again = Mask(Failing(("a",)), limit=0.05, patience=3)
    again.load_state_dict(reward.state_dict())
    with pytest.raises(RewardFailed, match=r"17% of the clips have no score, 3 steps in a row above Mask\.limit=0\.05"):
        again.settle(*bad)


def test_a_reward_that_cannot_score_leaves_clips_without_a_score_and_says_why(
    capsys: pytest.CaptureFixture[str],
) -> None:
    reward = Mask(Failing(down=True), patience=1)
    scores = reward.score(batch(4))
    assert not any(bool(valid.any()) for valid in scores.valid.values())
    assert "4 clips without a score: nobody answers" in capsys.readouterr().out
    with pytest.raises(RewardFailed, match="the last reason: nobody answers"):
        reward.settle(scores, torch.zeros(4, dtype=torch.long))


def test_what_is_wrong_with_the_configuration_is_not_masked() -> None:
    class Wrong(Brightness):
        def score(self, videos: VideoBatch) -> Scores:
            raise ValueError("another size")

    for policy in (Mask, SkipComponent, Raise):
        with pytest.raises(ValueError, match="another size"):
            policy(Wrong()).score(batch(2))


def batch(count: int) -> VideoBatch:
    return VideoBatch.from_signed(torch.zeros(count, 2, 3, 4, 4), 8.0, ["p"] * count)


def test_raise_ends_the_run_at_one_clip_and_names_its_group() -> None:
    trainer = make_trainer(reward=Raise(Failing(clips=(5,))))
    before = weights(trainer)
    with pytest.raises(RewardFailed, match=r"bright is invalid for 1 of 8 clips, the first in group 1"):
        trainer.step()
    assert moved(before, weights(trainer)) == 0
    assert "train/loss" in make_trainer(reward=Raise(Failing())).step()


# in a step


def test_a_masked_group_takes_no_part_in_the_update_and_the_others_learn() -> None:
    reward = Mask(Failing(clips=(0, 1, 2)), limit=1.0)
    trainer = make_trainer(reward=reward, optimizer=AdamW(1e-3))
    before = weights(trainer)
    metrics = trainer.step()
    assert metrics["train/active_clips"] == 4 and metrics["reward/bright/invalid"] == 3 / 8
    assert moved(before, weights(trainer)) > 0
    plain = make_trainer(reward=Failing(clips=(0, 1, 2)))
    assert plain.step()["train/active_clips"] == 5, "without a policy the clip that is left stays"


def test_a_step_without_any_score_is_left_to_the_rule_for_it() -> None:
    with pytest.raises(NonFinite, match="non-finite reward 'bright' for all 8 clips"):
        make_trainer(reward=Mask(Failing(down=True))).step()
    trainer = make_trainer(reward=Mask(Failing(down=True)), nonfinite=Skip(limit=9))
    before = weights(trainer)
    for step in range(2):
        assert trainer.step() == {"train/skipped_steps": step + 1.0}
    with pytest.raises(RewardFailed, match="100% of the clips have no score, 3 steps in a row"):
        trainer.step()
    assert moved(before, weights(trainer)) == 0


def test_a_signal_that_is_only_looked_at_may_fail_and_changes_nothing() -> None:
    def weights_after(*models: RewardModel) -> tuple[dict[str, Tensor], dict]:
        trainer = make_trainer(reward=CompositeReward(models), optimizer=AdamW(1e-3))
        metrics = trainer.step()
        return weights(trainer), metrics

    alone, plain = weights_after(Brightness())
    for side in (Failing(("side",)), Failing(("side",), clips=(1,)), Failing(("side",), down=True)):
        beside, metrics = weights_after(Brightness(), SkipComponent(side))
        assert moved(alone, beside) == 0 and metrics["reward/total"] == plain["reward/total"]
        assert ("reward/side/mean" in metrics) is not side.down
        assert metrics["reward/side/invalid"] == (1.0 if side.down else len(side.clips) / 8)
    learned, _ = weights_after(Brightness(), Failing(("side",)))
    assert moved(alone, learned) > 0, "it would change something if it were learned from"


def test_nothing_can_learn_from_a_signal_that_is_only_looked_at() -> None:
    reward = CompositeReward((Brightness(), SkipComponent(Failing(("side",)))))
    trainer = make_trainer(reward=reward, advantage=GroupRelative({"side": 1.0}))
    with pytest.raises(ValueError, match=r"weights name the reward signals \['side'\]"):
        trainer.step()
    judged = reward.settle(reward.score(batch(4)), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"SelectiveKL reads the reward signals \['side'\]"):
        check_settled(SelectiveKL("bright", ("side",), 0.1), judged)


def test_a_policy_that_nobody_would_ask_is_refused() -> None:
    inner = Mask(Brightness())
    for wrap in (lambda m: WeightedReward(m, {"red": 1.0}), CachedReward):
        for model in (inner, CompositeReward((inner,)), CompositeReward((CompositeReward((inner,)),))):
            with pytest.raises(ValueError, match="cannot hold Mask"):
                wrap(model)
        wrap(CompositeReward((Brightness(),)))


@pytest.mark.parametrize("policy", [Mask, Raise])
def test_a_policy_around_several_rewards_leaves_alone_what_is_only_looked_at(policy: type[Mask | Raise]) -> None:
    def trained(reward: RewardModel) -> dict[str, Tensor]:
        trainer = make_trainer(reward=policy(reward), optimizer=AdamW(1e-3))
        assert "reward/side/invalid" in trainer.step() or reward.signals == Brightness().signals
        return weights(trainer)

    alone = trained(CompositeReward((Brightness(),)))
    for side in (Failing(("side",)), Failing(("side",), down=True)):
        assert moved(alone, trained(CompositeReward((SkipComponent(side), Brightness())))) == 0


def test_a_run_needs_a_signal_that_it_learns_from() -> None:
    for reward in (SkipComponent(Brightness()), Mask(SkipComponent(Brightness()))):
        judged = reward.settle(reward.score(batch(4)), torch.zeros(4, dtype=torch.long))
        with pytest.raises(ValueError, match="no reward signal to learn from"):
            check_settled(BranchKL(1.0), judged)


def test_dropping_leaves_other_signals_alone() -> None:
    scores = Scores.of({"a": torch.ones(2), "b": torch.ones(2)})
    kept = dropped(scores, ("a",), torch.tensor([True, False]))
    assert kept.valid["a"].tolist() == [True, False] and kept.valid["b"].tolist() == [True, True]


# on several ranks


def settled_on(world: World) -> tuple[list, list, float]:
    """What every rank makes of a step in which the reward of the last one is down."""
    reward = Mask(Failing(down=world.rank == world.size - 1), limit=1.0)
    scores = reward.score(batch(4))
    if world.rank == 0:
        scores = Scores(scores.values, scores.valid, {"red": scores.values["red"][:, None].repeat(1, 2)})
    gathered = world.gather_scores(scores, 4 * world.size)
    settled = reward.settle(gathered, torch.arange(world.size).repeat_interleave(4))
    shape = list(gathered.windows["red"].shape)
    return settled.valid["red"].tolist(), shape, reward.metrics()["reward/red/invalid"]


@pytest.mark.slow
def test_a_reward_that_is_down_on_one_rank_is_settled_alike_on_all(tmp_path: Path) -> None:
    outcomes = run_ranks(2, tmp_path, settled_on)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    assert outcomes[0].result == outcomes[1].result == ([True] * 4 + [False] * 4, [8, 2], 0.5)


class Turned(Failing):
    """Gives its scores in another order than it names them, and in another dtype; bright is one too much."""

    def score(self, videos: VideoBatch) -> Scores:
        scores = super().score(videos)
        return Scores.of({name: scores.values[name].double() + i for i, name in enumerate(reversed(self.signals))})


def exchanged(world: World, ordered: bool) -> list[float]:
    """The red of one clip of each rank, which is 0.5, as a rank gets to know it."""
    reward = Failing() if world.rank else Turned()
    scores = scored_by(reward, batch(1)) if ordered else reward.score(batch(1))
    return world.gather_scores(scores, world.size).values["red"].tolist()


@pytest.mark.slow
def test_ranks_exchange_scores_in_one_order_and_dtype(tmp_path: Path) -> None:
    right = [pytest.approx(0.5, abs=0.01)] * 2
    assert results(2, tmp_path, exchanged, True) == [right, right]
    assert results(2, tmp_path / "planted", exchanged, False) != [right, right]


def remembered_at_the_start(world: World) -> int:
    """What the policy remembers of the self-check, in which the reward of the last rank is down."""
    trainer = make("nft", world, reward=Mask(Failing(down=world.rank == world.size - 1), patience=9))
    start_lines(trainer, 1e-3)
    return trainer.reward.state_dict()["in_a_row"]


@pytest.mark.slow
def test_a_failure_at_the_start_of_one_rank_is_remembered_alike_on_all(tmp_path: Path) -> None:
    one, other = results(2, tmp_path, remembered_at_the_start)
    assert one == other
