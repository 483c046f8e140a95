"""The Gibbs surrogate asks where the routes acted, and its loss over whole groups is the paper's."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from framework.flow import velocity_distance
from framework.interfaces import GeneratorRecipe
from framework.records import Anchors, AnchorShift, BranchLogits, Displacements, Endpoints, EndpointShift
from framework.rng import Streams
from framework.schedules import FewStepSchedule
from framework.types import Advantage, BranchPlan, GroupPlan, Probes, Scene, Tape
from strategies.regularizers.branch_kl import BranchKL
from strategies.surrogates.gibbs_tve import (
    AutoTemperature,
    FixedTemperature,
    GibbsTVE,
    energy_gradient,
    log_gibbs,
)
from tests.support import close, holds, normal, over, refuted

SEEDS = st.integers(0, 2**20)
RECIPE = GeneratorRecipe("test", 3, 3, (2, 2, 2), FewStepSchedule())
FIXED = GibbsTVE(FixedTemperature(0.3))


LOWER, UPPER = 0.9, 1.2


# the class on a tape


def make_tape(prompts: int, branches: int, blocks: int, routed: int, steps: tuple[bool, ...], seed: int) -> Tape:
    """Random records; the anchor is the last clip of its group."""
    count, frames = prompts * (branches + 1), 3 * blocks
    plan = (*(BranchPlan(0) for _ in range(branches)), BranchPlan(0, anchor=True))
    plans = tuple(GroupPlan(7 + g, Scene.single(f"prompt {g}"), 1, blocks, 0, plan) for g in range(prompts))
    shape = (count, 4, 2, frames, 2, 2)
    moved = Displacements(normal(seed, *shape), normal(seed + 1, *shape), RECIPE.schedule.sigmas, routed, steps)
    tape = Tape(plans, {})
    ends = Endpoints(normal(seed + 2, count, 2, frames, 2, 2), normal(seed + 3, prompts, 2, 3, 2, 2), 3)
    return Tape(plans, {Displacements: moved, Endpoints: ends, Anchors: Anchors(tape.anchors)})


HALF = (True, True, False, False)


@st.composite
def tapes(draw, branches: int = 5) -> Tape:
    blocks = draw(st.integers(1, 3))
    steps = draw(st.sampled_from([HALF, (True, False, False, False), (True,) * 4]))
    return make_tape(
        draw(st.integers(1, 3)),
        draw(st.integers(2, branches)),
        blocks,
        draw(st.integers(1, blocks)),
        steps,
        draw(SEEDS),
    )


def probed(surrogate: GibbsTVE, tape: Tape) -> Probes:
    (probes,) = surrogate.probes(tape, RECIPE, Streams(0))
    return probes


def views_for(probes: Probes, seed: int, on_policy: bool = False) -> dict[str, Tensor]:
    """Three policies; the old one reproduces the anchor, as the policy that generated it does."""
    recorded, anchors = probes.extra["velocity"], probes.extra["anchor"]
    old = recorded + 0.5 * normal(seed, *recorded.shape) * (~anchors).view(-1, 1, 1, 1, 1, 1)
    current = old.clone() if on_policy else old + 0.2 * normal(seed + 1, *recorded.shape)
    return {"current": current, "behaviour": old, "reference": old + 0.1 * normal(seed + 2, *recorded.shape)}


def advantage_for(tape: Tape, seed: int) -> Advantage:
    values = normal(seed, len(tape.groups)).where(~tape.anchors, 0)
    return Advantage(values, ~tape.anchors, tape.groups)


def check_probes(make: Callable[[Tape], Probes], tape: Tape) -> None:
    """Routed steps of routed blocks, nothing else, in group order with the anchors."""
    probes, moved, ends = make(tape), tape[Displacements], tape[Endpoints]
    frames, steps = 3 * moved.blocks, [k for k in range(4) if moved.steps[k]]
    assert len(probes) == len(tape.groups) and probes.noisy.shape[1] == len(steps) and probes.noisy.shape[3] == frames
    for s, k in enumerate(steps):
        assert torch.equal(probes.noisy[:, s], moved.states[:, k, :, :frames])
        assert torch.equal(probes.extra["velocity"][:, s], moved.velocities[:, k, :, :frames])
        assert bool((probes.sigma[:, s] == torch.tensor(moved.sigmas[k])).all())
    assert probes.sigma.shape == (len(probes), len(steps), frames)
    assert torch.equal(probes.clean, ends.latents[:, :, :frames])
    assert probes.prefix is ends.prefix and probes.start == 3 and not probes.history_grad
    assert torch.equal(probes.extra["anchor"], tape.anchors) and probes.rows.tolist() == list(range(len(probes)))
    assert probes.scenes == tuple(plan.scene for plan in tape.plans)


def test_the_probes_are_the_routed_steps_of_the_routed_blocks():
    holds(partial(check_probes, partial(probed, FIXED)), tapes())


def shifted_steps(tape: Tape) -> Probes:
    moved = tape[Displacements]
    return probed(
        FIXED, replace(tape, records={**tape.records, Displacements: replace(moved, steps=moved.steps[::-1])})
    )


def all_blocks(tape: Tape) -> Probes:
    whole = replace(tape[Displacements], blocks=tape.plans[0].blocks)
    return probed(FIXED, replace(tape, records={**tape.records, Displacements: whole}))


@pytest.mark.parametrize("mutant", [shifted_steps, all_blocks])
def test_the_probe_check_sees_other_steps_and_blocks(mutant: Callable[[Tape], Probes]):
    refuted(partial(check_probes, mutant), tapes())


def check_on_policy(surrogate: GibbsTVE, tape: Tape, seed: int) -> None:
    """At θ = old the ratio is exactly 1, in float32 too, and the anchor's energy exactly 0."""
    probes = probed(surrogate, tape)
    views = {name: view.float() for name, view in views_for(probes, seed, on_policy=True).items()}
    probes = replace(probes, extra={**probes.extra, "velocity": probes.extra["velocity"].float()})
    result = surrogate.loss(views, probes, advantage_for(tape, seed))
    branches = ~tape.anchors
    assert bool((result.metrics["ratio_mean"] == 1).all()) and bool((result.metrics["ratio_max_deviation"] == 0).all())
    assert bool((result.metrics["anchor_energy"] == 0).all())
    assert not bool(result.metrics["clip_fraction_low"].any() or result.metrics["clip_fraction_high"].any())
    values = advantage_for(tape, seed).values
    close(result.per_clip[branches], -values[branches], atol=0)
    assert bool((result.per_clip[~branches] == 0).all())


class ReseededReplay(GibbsTVE):
    """A planted error: the two policies are replayed behind contexts of different noise, as in the release."""

    def statistics(self, views, probes):
        noisy = views["behaviour"] + 1e-3 * normal(1, *views["behaviour"].shape).to(views["behaviour"])
        return super().statistics({**views, "behaviour": noisy}, probes)


class SwappedClips(GibbsTVE):
    """A planted error: a clip is replayed as its neighbour."""

    def statistics(self, views, probes):
        return super().statistics({**views, "current": views["current"].roll(1, 0)}, probes)


@pytest.mark.parametrize("temperature", [FixedTemperature(0.3), AutoTemperature()])
@pytest.mark.parametrize("space", ["v", "x0"])
def test_at_the_old_policy_the_ratio_is_one_and_the_anchor_has_no_energy(temperature, space: str):
    holds(partial(check_on_policy, GibbsTVE(temperature, space)), tapes(), SEEDS, examples=20)


@pytest.mark.parametrize("mutant", [ReseededReplay, SwappedClips])
def test_the_on_policy_check_sees_another_replay(mutant: type[GibbsTVE]):
    refuted(partial(check_on_policy, mutant()), tapes(), SEEDS)


def check_paper_loss(surrogate: GibbsTVE, tape: Tape, seed: int, gated: bool, failed: bool = False) -> None:
    """The trainer's mean over active clips is the paper's L averaged over the prompts that are not gated, each over
    the branches that were scored and weighing as many."""
    probes, advantage = probed(surrogate, tape), advantage_for(tape, seed)
    views = views_for(probes, seed + 1)
    active = advantage.active.clone()
    if gated and len(tape.plans) > 1:
        active[: len(tape.plans[0].branches)] = False
    active[-2] &= not failed
    result = surrogate.loss(views, probes, replace(advantage, active=active))
    mean = result.per_clip[active].sum() / active.sum()
    total = 0.0
    for group in tape.groups.unique():
        rows = torch.nonzero((tape.groups == group) & active).squeeze(1)
        if not len(rows):
            continue
        squares = {p: (v - probes.extra["velocity"]).square().flatten(2).mean(2) for p, v in views.items()}
        if surrogate.space == "x0":
            squares = {p: s * probes.sigma[:, :, 0].square() for p, s in squares.items()}
        scores = {p: [math.exp(-float(s[i].mean()) / 0.3) for i in rows] for p, s in squares.items()}
        terms = []
        for place, row in enumerate(rows):
            now, before = (scores[p][place] / sum(scores[p]) for p in ("current", "behaviour"))
            a = float(advantage.values[row])
            terms.append(min(now / before * a, min(max(now / before, 0.9), 1.2) * a))
        total -= sum(terms)
    close(mean, torch.tensor(total / int(active.sum()), dtype=torch.float64), atol=1e-6)  # σ is float32


class AnchorInTheMean(GibbsTVE):
    """A planted error: a group's loss is divided by its anchor as well."""

    def objective(self, statistics, advantage):
        loss = super().objective(statistics, advantage)
        size = int((advantage.groups == advantage.groups[0]).sum())
        return replace(loss, per_clip=loss.per_clip * (size - 1) / size)


@pytest.mark.parametrize("space", ["v", "x0"])
def test_the_mean_over_active_clips_is_the_papers_loss_over_open_prompts(space: str):
    surrogate = GibbsTVE(FixedTemperature(0.3), space)
    holds(partial(check_paper_loss, surrogate), tapes(), SEEDS, st.booleans(), st.booleans(), examples=25)


def test_the_loss_check_sees_a_mean_over_the_anchor_too():
    refuted(partial(check_paper_loss, AnchorInTheMean(FixedTemperature(0.3))), tapes(), SEEDS, st.booleans())


def check_failed_reward(surrogate: GibbsTVE, tape: Tape, seed: int) -> None:
    """A branch without a score gets no gradient and moves no sibling, whatever its energies; with the advantages of the
    paper's rule, which are not centred. A group without any active clip has finite gradients."""
    probes, given = probed(surrogate, tape), advantage_for(tape, seed)
    last, first = len(tape.groups) - 2, tape.groups == tape.groups[0]
    active = given.active & ~first if len(tape.plans) > 1 else given.active.clone()
    active[last] = False
    advantage = replace(given, values=given.values.abs().where(active, 0), active=active)
    statistics = dict(surrogate.statistics(views_for(probes, seed + 1), probes))
    results = []
    for shift in (0.0, 0.7):
        moved = {name: value.clone() for name, value in statistics.items()}
        for name in ("energy", "old_energy", "reference_energy"):
            moved[name][last] += shift
        energy = moved["energy"].requires_grad_()
        result = surrogate.objective(moved, advantage)
        penalty = BranchKL(1.0).penalty(result, None)
        (gradient,) = torch.autograd.grad(((result.per_clip + penalty) * active).sum(), energy)
        assert bool(gradient.isfinite().all()) and bool((gradient[~active] == 0).all())
        results.append(gradient)
    close(results[0], results[1], atol=1e-12)


class FailedAsCandidate(GibbsTVE):
    """A planted error: a branch without a score counts as one of advantage 0."""

    def objective(self, statistics, advantage):
        return super().objective(statistics, replace(advantage, active=statistics["anchor"] == 0))


@pytest.mark.parametrize("temperature", [FixedTemperature(0.3), AutoTemperature()])
def test_a_branch_whose_reward_failed_is_no_candidate(temperature):
    holds(partial(check_failed_reward, GibbsTVE(temperature)), tapes(), SEEDS, examples=25)


def test_the_check_of_failed_rewards_sees_a_candidate_of_advantage_zero():
    refuted(partial(check_failed_reward, FailedAsCandidate()), tapes(), SEEDS)


def check_permutation(surrogate: GibbsTVE, tape: Tape, seed: int) -> None:
    """Other places for the branches of a group permute π and leave the loss."""
    probes, advantage = probed(surrogate, tape), advantage_for(tape, seed)
    views, size = views_for(probes, seed + 1), len(tape.plans[0].branches)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    place = torch.cat([g * size + order for g in range(len(tape.plans))])
    moved = replace(probes, extra={name: value[place] for name, value in probes.extra.items()})
    one = surrogate.loss(views, probes, advantage)
    two = surrogate.loss({name: view[place] for name, view in views.items()}, moved, advantage[place])
    close(two.written[BranchLogits].current, one.written[BranchLogits].current[place], atol=1e-10)
    close(two.per_clip.sum(), one.per_clip.sum(), atol=1e-10)


class AnchorLast(GibbsTVE):
    """A planted error: the anchor is taken to be the last clip of a group."""

    def statistics(self, views, probes):
        size = len(probes) // len(probes.scenes)
        last = torch.arange(len(probes)) % size == size - 1
        return super().statistics(views, replace(probes, extra={**probes.extra, "anchor": last}))


def test_permuting_branches_permutes_the_policy_and_leaves_the_loss():
    holds(partial(check_permutation, GibbsTVE()), tapes(), SEEDS, examples=25)


def test_the_permutation_check_sees_an_anchor_found_by_place():
    refuted(partial(check_permutation, AnchorLast()), tapes(), SEEDS)


def check_common_temperature(surrogate: GibbsTVE, tape: Tape, seed: int) -> None:
    """All three policies are measured in one τ, which no gradient reaches: dL/dE has the closed form at that τ."""
    probes, advantage = probed(surrogate, tape), advantage_for(tape, seed)
    views = views_for(probes, seed + 1)
    statistics = dict(surrogate.statistics(views, probes))
    tau = surrogate.temperature(statistics["old_energy"], tape.groups, ~tape.anchors)
    energy = statistics["energy"].requires_grad_()
    result = surrogate.objective(statistics | {"energy": energy}, advantage)
    (gradient,) = torch.autograd.grad(result.per_clip.sum(), energy)
    log_prob = log_gibbs(energy.detach(), tau, tape.groups, ~tape.anchors)
    close(result.written[BranchLogits].current.detach(), log_prob, atol=1e-12)
    reference = log_gibbs(statistics["reference_energy"], tau, tape.groups, ~tape.anchors)
    close(result.written[BranchLogits].reference, reference, atol=1e-12)
    ratio = result.metrics["ratio_mean"]
    for group in tape.groups.unique():
        rows = torch.nonzero((tape.groups == group) & ~tape.anchors).squeeze(1)
        closed = energy_gradient(log_prob[rows], ratio[rows], advantage.values[rows], LOWER, UPPER, 1.0) * len(rows)
        close(gradient[rows], closed.unsqueeze(1) / tau[rows] / tau.shape[1], atol=1e-8, rtol=1e-8)
    assert bool((gradient[tape.anchors] == 0).all())


class OwnTemperature(GibbsTVE):
    """A planted error: the current energies set their own temperature."""

    def objective(self, statistics, advantage):
        own = self.temperature(statistics["energy"], advantage.groups, statistics["anchor"] == 0)
        old = self.temperature(statistics["old_energy"], advantage.groups, statistics["anchor"] == 0)
        return super().objective({**statistics, "energy": statistics["energy"] * old / own}, advantage)


@pytest.mark.parametrize("temperature", [FixedTemperature(0.3), AutoTemperature()])
def test_one_temperature_without_gradient_serves_all_policies(temperature):
    holds(partial(check_common_temperature, GibbsTVE(temperature)), tapes(), SEEDS, examples=25)


def test_the_temperature_check_sees_one_per_policy():
    refuted(partial(check_common_temperature, OwnTemperature()), tapes(), SEEDS)


# what it hands on


@over(tapes(), SEEDS, examples=20)
def test_the_reference_is_written_only_where_somebody_reads_it(tape: Tape, seed: int):
    probes, advantage = probed(FIXED, tape), advantage_for(tape, seed)
    views = views_for(probes, seed)
    unread = {name: view for name, view in views.items() if name != "reference"}
    assert FIXED.loss(unread, probes, advantage).written == {}
    written = FIXED.loss(views, probes, advantage).written
    assert set(written) == {EndpointShift, BranchLogits, AnchorShift} == set(GibbsTVE.writes)
    assert not written[BranchLogits].reference.requires_grad
    distance = velocity_distance(views["current"], views["reference"])
    close(written[EndpointShift].distance, distance, atol=1e-12)
    for group in tape.groups.unique():
        rows = tape.groups == group
        close(written[AnchorShift].distance[rows], distance[rows & tape.anchors].expand(int(rows.sum())), atol=1e-12)


def test_metrics_describe_each_group_and_carry_no_graph():
    tape = make_tape(2, 4, 2, 1, HALF, 3)
    probes = probed(FIXED, tape)
    views = views_for(probes, 5)
    views["current"].requires_grad_()
    metrics = FIXED.loss(views, probes, advantage_for(tape, 1)).metrics
    assert not any(value.requires_grad for value in metrics.values())
    assert {tuple(value.shape) for value in metrics.values()} == {(10,)}
    log_prob = FIXED.loss(views, probes, advantage_for(tape, 1)).written[BranchLogits].current.detach()
    for group in tape.groups.unique():
        rows = (tape.groups == group) & ~tape.anchors
        entropy = -(log_prob[rows] * log_prob[rows].exp()).sum()
        close(metrics["branch_entropy"][rows], entropy.expand(4), atol=1e-12)
        largest = (metrics["ratio_mean"][rows] - 1).abs().max()
        close(metrics["ratio_max_deviation"][rows], largest.expand(4), atol=1e-12)
    close(metrics["temperature"], torch.full((10,), 0.3), atol=1e-7)


# refusals


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: GibbsTVE(space="eps"), r"GibbsTVE\.space"),
        (lambda: GibbsTVE(clip_low=0.0), r"GibbsTVE\.clip_low"),
        (lambda: GibbsTVE(clip_low=1.5), r"GibbsTVE\.clip_low"),
        (lambda: GibbsTVE(clip_high=0.0), r"GibbsTVE\.clip_high"),
        (lambda: GibbsTVE(log_ratio_limit=0.0), r"GibbsTVE\.log_ratio_limit"),
        (lambda: FixedTemperature(0.0), r"FixedTemperature\.value"),
        (lambda: FixedTemperature(math.nan), r"FixedTemperature\.value"),
        (lambda: AutoTemperature(-0.1), r"AutoTemperature\.relative_floor"),
        (lambda: AutoTemperature(floor=0.0), r"AutoTemperature\.floor"),
    ],
)
def test_meaningless_settings_are_refused_at_construction(build: Callable, name: str):
    with pytest.raises(ValueError, match=name):
        build()


@pytest.mark.parametrize(("blocks", "steps"), [(0, HALF), (1, (False,) * 4)])
def test_a_rollout_that_routed_nothing_is_refused(blocks: int, steps: tuple[bool, ...]):
    with pytest.raises(ValueError, match="nothing to measure"):
        probed(FIXED, make_tape(1, 2, 1, blocks, steps, 0))


def test_a_group_without_an_anchor_or_with_one_branch_is_refused():
    tape = make_tape(2, 2, 1, 1, HALF, 0)
    without = {**tape.records, Anchors: Anchors(torch.zeros_like(tape.anchors))}
    with pytest.raises(ValueError, match="group 7 has 0 anchors and 3 branches"):
        probed(FIXED, Tape(tape.plans, without))
    with pytest.raises(ValueError, match="group 7 has 1 anchors and 1 branches"):
        probed(FIXED, make_tape(1, 1, 1, 1, HALF, 0))
