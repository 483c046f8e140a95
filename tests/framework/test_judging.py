"""Scoring behind the rollout of the next group: the same numbers in the same order, and nothing outlives its step."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from framework import rollout
from framework.distributed import World
from framework.interfaces import RewardFailed
from framework.judging import Judging, joined_records, joined_scores
from framework.kernels import Consistency
from framework.nonfinite import NonFinite, Skip
from framework.optimization import AdamW
from framework.records import Endpoints, Predictions
from framework.rollout import roll_out
from framework.types import Scores, Tape, VideoBatch
from rewards.shapes import ShapesReward
from strategies.surrogates import nft
from tests.framework.test_trainer import make_trainer, moved, timeless, weights
from tests.ranks import RECIPES, make
from tests.support import PROMPTS, Brightness, close, group_plans, tiny_generator

KEEP = frozenset({Endpoints, Predictions})


class Watched(Brightness):
    """Says on which thread each batch was scored; may wait for something, or fail at some batch."""

    def __init__(self, until: Callable[[int], None] = lambda batch: None, fails: int | None = None) -> None:
        self.until, self.fails = until, fails
        self.prompts: list[list[str]] = []
        self.threads: set[str] = set()
        self.running = 0

    def score(self, videos: VideoBatch) -> Scores:
        self.running += 1
        try:
            self.threads.add(threading.current_thread().name)
            self.prompts.append(videos.prompts)
            self.until(len(self.prompts) - 1)
            if self.fails == len(self.prompts) - 1:
                raise RewardFailed(f"batch {self.fails}")
            return super().score(videos)
        finally:
            self.running -= 1


def judged(groups_at_once: int | None, reward: Any = None, start: int = 0, dtype: torch.dtype = torch.float64) -> tuple:
    """(tape, scores) of three groups."""
    generator = tiny_generator(dtype)
    plans = group_plans(PROMPTS[:3], branches=2, first_block=start, blocks=2)
    with Judging(generator, reward or Brightness(), groups_at_once) as judging:
        tape = judging.roll_out(plans, Consistency(), KEEP)
        return tape, judging.scores()


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("groups_at_once", [1, 2, 3, 7])
def test_scores_and_records_are_those_of_all_groups_at_once_in_the_same_order(groups_at_once: int, start: int) -> None:
    tape, scores = judged(groups_at_once, start=start)
    whole, expected = judged(None, start=start)
    assert tape.plans == whole.plans and tape.records.keys() == whole.records.keys()
    for kind, record in whole.records.items():
        other = tape.records[kind]
        for name, value in vars(record).items():
            if isinstance(value, torch.Tensor):
                close(getattr(other, name), value, atol=1e-9)
            else:
                assert getattr(other, name) == value
    for name, value in expected.values.items():
        close(scores.values[name], value, atol=1e-6)


def test_the_thread_changes_no_bit() -> None:
    _, behind = judged(1, Watched(), dtype=torch.float32)
    generator = tiny_generator()
    for g, plan in enumerate(group_plans(PROMPTS[:3], branches=2, blocks=2)):
        with Judging(generator, Brightness()) as judging:
            judging.roll_out([plan], Consistency(), KEEP)
            alone = judging.scores()
        for name, value in alone.values.items():
            assert torch.equal(behind.values[name][2 * g : 2 * g + 2], value)


def test_groups_are_scored_one_after_the_other_on_one_thread_while_the_next_is_rolled_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun, rolled = ([threading.Event() for _ in range(3)] for _ in range(2))
    seen: list[int] = []

    def until(batch: int) -> None:
        """Scoring a group lasts as long as the rollout of the next one."""
        begun[batch].set()
        assert rolled[min(batch + 1, 2)].wait(20), "nothing was rolled out in the meantime"

    def watched(*arguments: Any) -> Tape:
        tape = roll_out(*arguments)
        assert not seen or begun[len(seen) - 1].wait(20), "the group before was not scored in the meantime"
        seen.append(reward.running)
        rolled[len(seen) - 1].set()
        return tape

    reward = Watched(until)
    monkeypatch.setattr("framework.judging.roll_out", watched)
    judged(1, reward)
    assert reward.prompts == [[prompt] * 2 for prompt in PROMPTS[:3]]
    assert len(reward.threads) == 1 and reward.threads.pop().startswith("scoring")
    assert seen == [0, 1, 1], "one group is scored during the rollout of the next"
    monkeypatch.undo()
    plain = Watched()
    judged(None, plain)
    assert plain.threads == {threading.current_thread().name} and len(plain.prompts) == 1


# a step


def metrics_of(**changes: Any) -> list[dict[str, float]]:
    trainer = make_trainer(optimizer=AdamW(1e-3), **changes)
    return [timeless(trainer.step()) for _ in range(2)]


def test_a_step_is_the_same_whether_groups_are_scored_behind_or_not() -> None:
    for step, expected in zip(metrics_of(groups_at_once=1), metrics_of(), strict=True):
        assert step == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert metrics_of(groups_at_once=1, reward=ShapesReward()) == metrics_of(groups_at_once=1)
    assert metrics_of(groups_at_once=2) == metrics_of(), "all groups in one part, though on the thread"
    metrics = make_trainer(groups_at_once=1).step()
    assert {"time/scoring_s", "time/reward_s"} <= metrics.keys() and "time/scoring_s" not in make_trainer().step()


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_learns_the_same_from_groups_that_are_scored_behind(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (rollout, nft):  # `make` draws in float64 and leaves it so; here that ends with the test
        monkeypatch.setattr(module, "draw_noise", module.draw_noise)
    behind, expected = (make(recipe, World(), groups_at_once=n) for n in (1, None))
    assert timeless(behind.step()) == pytest.approx(timeless(expected.step()), rel=1e-6, abs=1e-9)
    for name, parameter in expected.policies.parameters.items():
        close(behind.policies.parameters[name], parameter, atol=1e-9)


@pytest.mark.parametrize("fails", [0, 1])
def test_an_error_of_the_scoring_thread_ends_the_step_and_nothing_is_scored_after_it(fails: int) -> None:
    reward = Watched(fails=fails)
    trainer = make_trainer(reward=reward, groups_at_once=1)
    before, threads = weights(trainer), threading.active_count()
    with pytest.raises(RewardFailed, match=f"batch {fails}"):
        trainer.step()
    assert reward.running == 0 and threading.active_count() == threads
    asked = len(reward.prompts)
    time.sleep(0.1)
    assert len(reward.prompts) == asked and moved(before, weights(trainer)) == 0


def test_an_error_of_the_rollout_waits_for_what_is_being_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    reward, calls = Watched(0.1), []

    def breaks(*arguments: Any) -> Tape:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return roll_out(*arguments)

    monkeypatch.setattr("framework.judging.roll_out", breaks)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(reward=reward, groups_at_once=1).step()
    assert reward.running == 0 and len(reward.prompts) == 1


def test_latents_that_are_not_finite_are_never_scored() -> None:
    reward = Watched()
    trainer = make_trainer(reward=reward, groups_at_once=1, nonfinite=Skip())
    with torch.no_grad():
        next(iter(trainer.policies.parameters.values())).fill_(torch.nan)
    assert trainer.step() == {"train/skipped_steps": 1.0} and not reward.prompts
    trainer.nonfinite = Skip(limit=1)
    with pytest.raises(NonFinite, match="non-finite latents"):
        trainer.step()


# joining


def test_windows_are_filled_up_and_what_differs_between_groups_is_refused() -> None:
    one = Scores.of({"a": torch.zeros(2)})
    two = replace(Scores.of({"a": torch.ones(1)}), windows={"a": torch.ones(1, 2)})
    joined = joined_scores([one, two])
    assert joined.values["a"].tolist() == [0, 0, 1] and joined.windows["a"].isnan().tolist() == [[True] * 2] * 2 + [
        [False] * 2
    ]
    assert joined_scores([one, one]).windows == {}
    ends = Endpoints(torch.zeros(1, 3, 3, 2, 2), None, 3)
    for other in (replace(ends, start=6), replace(ends, prefix=torch.zeros(1))):
        with pytest.raises(ValueError, match="differs between groups of one step"):
            joined_records([ends, other])
