"""Policies are sets of values of one network's parameters: swapped in exactly, put back exactly, trained alone."""

import copy
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from framework.adapters import FullFineTuning
from framework.interfaces import Schedule
from framework.optimization import Constant
from framework.policies import AVERAGE, BEHAVIOUR, CURRENT, REFERENCE, FrozenViews, Policies
from framework.records import endpoint_shift, written_shift
from framework.types import Loss, Objective, Probes, Scene, Statistics, Views
from strategies.regularizers.velocity_kl import VelocityKL
from tests.support import PROMPTS, close, normal, over, perturb, tiny_generator

SETS = (BEHAVIOUR, REFERENCE, AVERAGE)


def make_policies(decay: Schedule | None = None, average: float = 0.9, dtype: torch.dtype = torch.float64) -> Policies:
    """The policies of a fresh network all of whose parameters train: no zero B hides an error."""
    return Policies(tiny_generator(dtype, clip_blocks=2), FullFineTuning(), decay or Constant(0.0), average, seed=0)


def make_probes(
    prompts: int = 2, branches: int = 2, streams: int = 1, seed: int = 0, history_grad: bool = False
) -> Probes:
    n, frames = prompts * branches, 6
    levels = torch.tensor([0.9375, 0.625], dtype=torch.float64)
    block = torch.randint(2, (n, streams, 2), generator=torch.Generator().manual_seed(seed)).repeat_interleave(3, -1)
    return Probes(
        noisy=normal(seed, n, streams, 3, frames, 16, 16),
        sigma=levels[block],
        clean=normal(seed + 1, n, 3, frames, 16, 16),
        start=3,
        prefix=normal(seed + 2, prompts, 3, 3, 16, 16),
        scenes=tuple(map(Scene.single, PROMPTS[:prompts])),
        rows=torch.arange(n),
        history_grad=history_grad,
        extra={"target": normal(seed + 3, n, streams, 3, frames, 16, 16)},
    )


def move(policies: Policies, seed: int) -> None:
    """What an optimiser step does to the current policy."""
    with torch.no_grad():
        for i, parameter in enumerate(policies.parameters.values()):
            parameter += 0.05 * normal(1000 * seed + i, *parameter.shape).to(parameter)
    policies.stepped()


def snapshot(policies: Policies) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in policies.parameters.items()}


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


# use


def check_use_is_exact(policies: Policies, name: str) -> None:
    before = snapshot(policies)
    with policies.use(name):
        assert equal(snapshot(policies), dict(policies.sets[name].weights))
    assert equal(snapshot(policies), before)


@pytest.mark.parametrize("name", SETS)
def test_use_swaps_a_policy_in_and_restores_the_current_one_bit_for_bit(name: str):
    policies = make_policies(Constant(0.5))
    check_use_is_exact(policies, name)
    for step in range(3):
        move(policies, step)
        policies.advance(step)
        check_use_is_exact(policies, name)


def test_the_use_check_sees_a_policy_that_is_not_put_back():
    class Forgetful(Policies):
        @contextmanager
        def use(self, name):
            with torch.no_grad():
                for parameter, value in zip(self.parameters.values(), self.sets[name].weights.values(), strict=True):
                    parameter.copy_(value)
            yield

    policies = Forgetful(tiny_generator(clip_blocks=2), FullFineTuning(), Constant(0.0), 0.9, 0)
    move(policies, 0)
    with pytest.raises(AssertionError):
        check_use_is_exact(policies, REFERENCE)


def test_the_current_policy_comes_back_when_the_work_fails():
    policies = make_policies()
    move(policies, 0)
    before = snapshot(policies)
    with pytest.raises(RuntimeError, match="rollout died"), policies.use(REFERENCE):
        raise RuntimeError("rollout died")
    assert equal(snapshot(policies), before)


def test_a_second_policy_inside_the_first_is_refused_and_nothing_is_lost():
    policies = make_policies(Constant(0.5))
    move(policies, 0)
    policies.advance(0)
    before = snapshot(policies)
    refusal = pytest.raises(RuntimeError, match=r"'reference'.*while 'behaviour' is in use")
    with refusal, policies.use(BEHAVIOUR), policies.use(REFERENCE):
        pass
    assert equal(snapshot(policies), before)
    check_use_is_exact(policies, REFERENCE)


def test_an_unknown_policy_is_an_error():
    with pytest.raises(KeyError, match="teacher"), make_policies().use("teacher"):
        pass


def test_swapping_policies_under_a_live_graph_is_caught_by_autograd():
    policies, probes = make_policies(), make_probes()
    move(policies, 0)
    loss = policies.generator.replay(probes).square().sum()
    with policies.use(REFERENCE):
        pass
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@over(st.lists(st.floats(0, 1), min_size=1, max_size=4), st.floats(0.0, 1.0), examples=10)
def test_behaviour_and_average_follow_their_schedules(decays: list[float], cap: float):
    class Drawn(Schedule):
        def __call__(self, step: int) -> float:
            return decays[step]

    policies = make_policies(Drawn(), average=cap)
    name = next(iter(policies.parameters))
    start = snapshot(policies)[name]
    behaviour, average = start, start
    for step, decay in enumerate(decays):
        move(policies, step)
        policies.advance(step)
        current, slow = snapshot(policies)[name], min(cap, (1 + step) / (10 + step))
        behaviour = decay * behaviour + (1 - decay) * current
        average = slow * average + (1 - slow) * current
    close(policies.sets[BEHAVIOUR].weights[name], behaviour, atol=1e-12)
    close(policies.sets[AVERAGE].weights[name], average, atol=1e-12)
    assert torch.equal(policies.sets[REFERENCE].weights[name], start)
    if decays[-1] == 0:
        assert equal(dict(policies.sets[BEHAVIOUR].weights), snapshot(policies))


def test_resetting_the_reference_moves_it_to_the_current_policy():
    policies, probes = make_policies(), make_probes()
    move(policies, 0)
    policies.reset_reference()
    assert equal(dict(policies.sets[REFERENCE].weights), snapshot(policies))
    views = policies.views(frozenset({CURRENT, REFERENCE}), probes)
    assert torch.equal(views[CURRENT], views[REFERENCE])


# views


def check_views(view_of: Callable[[Policies, frozenset[str], Probes], dict[str, Tensor]], moved: bool) -> None:
    """Every view asked for is the replay under that policy; only the current one carries a graph."""
    policies, probes = make_policies(Constant(0.5)), make_probes()
    if moved:
        move(policies, 0)
        policies.advance(0)
    names = frozenset({CURRENT, *SETS})
    views = view_of(policies, names, probes)
    assert views.keys() == names
    for name, view in views.items():
        with policies.use(name), torch.no_grad():
            close(view.detach(), policies.generator.replay(probes), atol=1e-12)
        assert view.requires_grad == (name == CURRENT)


def current_for_all(policies: Policies, names: frozenset[str], probes: Probes) -> dict[str, Tensor]:
    """A planted error: adapters that were never switched."""
    view = policies.generator.replay(probes)
    return {name: view if name == CURRENT else view.detach() for name in names}


@pytest.mark.parametrize("moved", [False, True])
def test_a_view_is_the_replay_under_its_policy(moved: bool):
    check_views(Policies.views, moved)


def test_the_view_check_sees_adapters_that_were_never_switched():
    with pytest.raises(AssertionError):
        check_views(current_for_all, True)


def test_only_the_views_asked_for_are_computed_and_equal_policies_share_one(monkeypatch):
    policies, probes = make_policies(Constant(0.0)), make_probes()
    replay, calls = policies.generator.replay, []
    monkeypatch.setattr(policies.generator, "replay", lambda p: calls.append(1) or replay(p))
    both = frozenset({CURRENT, BEHAVIOUR})
    policies.views(both, probes)
    assert len(calls) == 1  # all policies are equal at the start
    move(policies, 0)
    policies.views(both, probes)
    assert len(calls) == 3  # behaviour lags now
    policies.advance(0)
    policies.views(both, probes)
    assert len(calls) == 4  # decay 0: behaviour is the current policy again
    assert policies.views(frozenset({CURRENT}), probes).keys() == {CURRENT}
    assert len(calls) == 5
    policies.views(frozenset({CURRENT, REFERENCE}), probes)
    assert len(calls) == 7


@pytest.mark.parametrize("moved", [False, True])
def test_the_kl_to_the_reference_is_exactly_zero_until_the_policy_moves(moved: bool):
    policies, probes = make_policies(), make_probes()
    if moved:
        move(policies, 0)
    views = policies.views(frozenset({CURRENT, REFERENCE}), probes)
    written = written_shift(endpoint_shift(views))
    penalty = VelocityKL(1.0).penalty(Objective(torch.zeros(4), written), None)
    assert bool((penalty > 0).all()) if moved else bool((penalty == 0).all())


# the exact backward


def measure(views: Views, probes: Probes) -> Statistics:
    """The distance of two policies' mix from a target."""
    distance = (views[CURRENT] - 0.3 * views[REFERENCE] - probes.extra["target"]).square().flatten(1).mean(1)
    return {"distance": distance, "weight": probes.extra["target"].flatten(1).mean(1)}


def separate(statistics: Statistics, rows: Tensor) -> Objective:
    """A loss in which no clip knows of another."""
    distance = statistics["distance"] * (2 + statistics["weight"])
    return Objective(distance, metrics={"doubled": 2 * distance})


def siblings(statistics: Statistics, rows: Tensor) -> Objective:
    """A loss in which all clips compete."""
    share = statistics["distance"].log_softmax(0)
    distance = -share * (2 + statistics["weight"])
    return Objective(distance, metrics={"doubled": 2 * distance})


BOTH = frozenset({CURRENT, REFERENCE})
SEPARATE, COUPLED = Loss(BOTH, measure, separate), Loss(BOTH, measure, siblings, coupled=True)


def regression(loss: Loss, policies: Policies, probes: Probes) -> Objective:
    """The objective of all given clips at once."""
    return loss.judge(measure(policies.views(BOTH, probes), probes), probes.rows)


def one_shot(objective: Loss, policies: Policies, probes: Probes, total: int) -> dict[str, Tensor]:
    """Autograd through all clips at once."""
    loss = regression(objective, policies, probes).per_clip.sum() / total
    grads = torch.autograd.grad(loss, list(policies.parameters.values()), allow_unused=True)
    return {name: g for name, g in zip(policies.parameters, grads, strict=True) if g is not None}


def accumulate_means(loss: Loss, policies: Policies, probes: Probes, clips: int, total: int) -> dict[str, Tensor]:
    """A planted error: the mean of each micro-batch, whatever its size."""
    for part in probes.split(clips):
        regression(loss, policies, part).per_clip.mean().backward()
    return {}


def judged_apart(loss: Loss, policies: Policies, probes: Probes, clips: int, total: int) -> dict[str, Tensor]:
    """A planted error: siblings that never meet."""
    return policies.backward(replace(loss, coupled=False), probes, clips, total)


def in_micro_batches(loss: Loss, policies: Policies, probes: Probes, clips: int, total: int) -> dict[str, Tensor]:
    return policies.backward(loss, probes, clips, total)


def with_memory(loss: Loss, policies: Policies, probes: Probes, clips: int, total: int) -> dict[str, Tensor]:
    """The second update of a rollout that asks at the same places."""
    frozen = FrozenViews(reused=True)
    policies.backward(loss, probes, clips, total, frozen)
    for parameter in policies.parameters.values():
        parameter.grad = None
    frozen.rewind()
    return policies.backward(loss, probes, clips, total, frozen)


def check_backward(backward, clips: int, history_grad: bool, loss: Loss = SEPARATE) -> None:
    policies, probes = make_policies(), make_probes(3, 2, streams=2, history_grad=history_grad)
    move(policies, 0)
    expected = one_shot(loss, policies, probes, 5)
    metrics = backward(loss, policies, probes, clips, 5)
    for name, parameter in policies.parameters.items():
        if name in expected:
            assert parameter.grad is not None
            close(parameter.grad, expected[name], atol=1e-9 * float(expected[name].abs().max() + 1e-3))
    if metrics:
        value = regression(loss, policies, probes).per_clip.sum() / 5
        close(metrics["loss"], value.detach(), atol=1e-9)
        close(metrics["doubled"], 2 * metrics["loss"], atol=1e-9)
        assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("loss", [SEPARATE, COUPLED], ids=["separate", "coupled"])
@pytest.mark.parametrize("history_grad", [False, True])
@pytest.mark.parametrize("clips", [1, 2, 4, 6, 48])
def test_the_gradient_does_not_depend_on_the_micro_batch(clips: int, history_grad: bool, loss: Loss):
    check_backward(in_micro_batches, clips, history_grad, loss)


@pytest.mark.parametrize("loss", [SEPARATE, COUPLED], ids=["separate", "coupled"])
def test_frozen_policies_that_are_asked_once_a_rollout_give_the_same_gradient(loss: Loss, monkeypatch):
    check_backward(with_memory, 2, False, loss)
    policies, probes = make_policies(), make_probes(3, 2, streams=2)
    move(policies, 0)
    replay, calls = policies.generator.replay, []
    monkeypatch.setattr(policies.generator, "replay", lambda p: calls.append(1) or replay(p))
    with_memory(loss, policies, probes, 48, 5)
    assert len(calls) == 3  # the reference once, the current policy twice


def test_the_micro_batch_check_sees_siblings_that_never_meet():
    with pytest.raises(AssertionError):
        check_backward(judged_apart, 2, False, COUPLED)


def test_the_micro_batch_check_sees_a_mean_of_means():
    with pytest.raises(AssertionError):
        check_backward(accumulate_means, 4, False)


# what is kept


def test_all_sets_survive_a_checkpoint():
    policies, probes = make_policies(Constant(0.5)), make_probes()
    for step in range(2):
        move(policies, step)
        policies.advance(step)
    other = make_policies(Constant(0.5))
    perturb(other.generator.network, 9)
    state = copy.deepcopy(policies.state_dict())
    other.load_state_dict(state)
    names = frozenset({CURRENT, *SETS})
    restored = other.views(names, probes)
    for name, view in policies.views(names, probes).items():
        assert torch.equal(view, restored[name])
    for missing in (CURRENT, *SETS):
        with pytest.raises(KeyError, match=missing):
            other.load_state_dict({name: values for name, values in state.items() if name != missing})


def test_probes_of_a_stale_start_are_refused():
    policies, probes = make_policies(), make_probes()
    with pytest.raises(ValueError, match=r"Probes\.start=6.*3 frames"):
        policies.generator.replay(replace(probes, start=6))
