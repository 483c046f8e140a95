"""Rewards side by side keep their signals; a weighted one fails where any part fails; the control knows nothing."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from framework.interfaces import RewardModel
from framework.types import Scores, VideoBatch, Window
from rewards.composite import CompositeReward, WeightedReward
from rewards.random_control import RandomReward
from tests.support import Brightness, close, holds, normal, over, refuted


@dataclass(frozen=True)
class Fixed(RewardModel):
    """Scores drawn from a seed, some of them failed."""

    seed: int
    names: tuple[str, ...] = ("a", "b")
    failing: float = 0.3

    @property
    def signals(self) -> tuple[str, ...]:
        return self.names

    def score(self, videos: VideoBatch) -> Scores:
        values = normal(self.seed, len(self.names), len(videos))
        failed = torch.rand(values.shape, generator=torch.Generator().manual_seed(self.seed)) < self.failing
        return Scores.of(dict(zip(self.names, values.masked_fill(failed, torch.nan), strict=True)))


def clips(seed: int, count: int) -> VideoBatch:
    random = torch.Generator().manual_seed(seed)
    frames = torch.randint(256, (count, 2, 3, 4, 4), generator=random, dtype=torch.uint8)
    return VideoBatch(frames, 8.0, ((Window(0, 2, "p"),),) * count)


SEEDS = st.integers(0, 2**20)
COUNTS = st.integers(1, 6)


@over(SEEDS, COUNTS)
def test_rewards_side_by_side_keep_their_own_signals(seed: int, count: int):
    videos, models = clips(seed, count), (Fixed(seed), Brightness())
    together = CompositeReward(models).score(videos)
    assert tuple(together.values) == CompositeReward(models).signals == ("a", "b", "bright", "red")
    for model in models:
        for name, value in model.score(videos).values.items():
            assert torch.equal(together.values[name].nan_to_num(9), value.nan_to_num(9))


def test_two_rewards_of_one_signal_and_no_reward_are_refused():
    with pytest.raises(ValueError, match=r"distinct signals.*\['bright', 'red'\]"):
        CompositeReward((Brightness(), Brightness()))
    with pytest.raises(ValueError, match="at least one model"):
        CompositeReward(())


Weigh = Callable[[Fixed, dict[str, float], VideoBatch], Scores]


def real(model: Fixed, weights: dict[str, float], videos: VideoBatch) -> Scores:
    return WeightedReward(model, weights, "w").score(videos)


def failures_as_zero(model: Fixed, weights: dict[str, float], videos: VideoBatch) -> Scores:
    """A planted error: a failed part counts as a zero."""
    raw, scale = model.score(videos), sum(abs(w) for w in weights.values())
    return Scores.of({"w": sum(w * raw.values[k].nan_to_num(0) for k, w in weights.items()) / scale})  # type: ignore


def unscaled(model: Fixed, weights: dict[str, float], videos: VideoBatch) -> Scores:
    scores, scale = real(model, weights, videos), sum(abs(w) for w in weights.values())
    return Scores({"w": scores.values["w"] * scale}, scores.valid)


def check_weighted(weigh: Weigh, seed: int, count: int, weights: tuple[float, float]) -> None:
    """Σ w r / Σ |w|, clip by clip; invalid where any weighed part is."""
    videos, model = clips(seed, count), Fixed(seed)
    found, raw = weigh(model, {"a": weights[0], "b": weights[1]}, videos), model.score(videos).values
    for i in range(count):
        parts = [raw[name][i].item() for name in ("a", "b")]
        failed = any(part != part for part in parts)
        assert bool(found.valid["w"][i]) == (not failed)
        if not failed:
            expected = sum(w * r for w, r in zip(weights, parts, strict=True)) / sum(map(abs, weights))
            close(found.values["w"][i], torch.tensor(expected), atol=1e-6)


WEIGHTS = st.tuples(st.floats(0.1, 3.0), st.floats(-3.0, -0.1))


def test_a_weighted_reward_is_the_normalised_sum_and_fails_with_its_parts():
    holds(partial(check_weighted, real), SEEDS, COUNTS, WEIGHTS)


@pytest.mark.parametrize("mutant", [failures_as_zero, unscaled])
def test_the_weight_check_sees_failures_taken_for_zeros_and_a_sum(mutant: Weigh):
    refuted(partial(check_weighted, mutant), SEEDS, COUNTS, WEIGHTS)


@pytest.mark.parametrize("weights", [{"sharpness": 1.0}, {"bright": 0.0}, {}])
def test_weights_of_nothing_are_refused(weights: dict[str, float]):
    with pytest.raises(ValueError, match=r"WeightedReward\.weights must weigh signals of \['bright', 'red'\]"):
        WeightedReward(Brightness(), weights)


def check_control(score: Callable[[VideoBatch], Tensor]) -> None:
    """Uniform, the same for the same clip in any company, and unrelated between clips and to what they show."""
    videos = clips(0, 400)
    scores = score(videos)
    assert torch.equal(score(VideoBatch(videos.frames[100:200], 8.0, videos.windows[:100])), scores[100:200])
    quantiles = scores.quantile(torch.linspace(0.1, 0.9, 9))
    assert float((quantiles - torch.linspace(0.1, 0.9, 9)).abs().max()) < 0.08
    shown = Brightness().score(videos).values["bright"]
    assert abs(float(torch.corrcoef(torch.stack([scores, shown]))[0, 1])) < 0.15


def test_the_random_control_is_repeatable_and_sees_nothing():
    check_control(lambda videos: RandomReward().score(videos).values["VQ"])
    values = RandomReward().score(clips(0, 400)).values
    assert abs(float(torch.corrcoef(torch.stack([values["VQ"], values["TA"]]))[0, 1])) < 0.15


@pytest.mark.parametrize(
    "mutant",
    [
        lambda videos: torch.rand(len(videos)),  # another score at every look
        lambda videos: Brightness().score(videos).values["bright"],  # a reward after all
    ],
)
def test_the_control_check_sees_scores_that_change_or_that_mean_something(mutant: Callable[[VideoBatch], Tensor]):
    with pytest.raises(AssertionError):
        check_control(mutant)
