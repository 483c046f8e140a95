"""Pair by pair: a recipe that is allowed trains and its regularizer acts, any other is refused with its reason."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from torch import Tensor

from framework.adapters import FullFineTuning
from framework.advantages import GroupCentred, GroupRelative, PerRewardCentred, PrimaryOnly, SumFirst
from framework.anchored_advantages import AnchorCentred, AnchorRelative, ReleasedAnchorRelative
from framework.compatibility import IncompatibleRecipe, check_recipe, check_signals
from framework.config.registry import Registry
from framework.control_advantages import ShuffledSiblings
from framework.interfaces import AdvantageRule, ExplorationStrategy, Regularizer, RewardModel, SurrogatePolicy
from framework.kernels import Consistency, FlowGRPO, Ode
from framework.optimization import AdamW, Constant
from framework.policies import Policies
from framework.raven_advantages import RavenAdvantage
from framework.records import Anchors, Displacements, Endpoints, Predictions
from framework.rng import Streams
from framework.rollout import canonical, roll_out
from framework.types import Advantage, Loss, Objective, Scene, Scores, Statistics, Tape, VideoBatch
from strategies.exploration.causal_history_routing import CausalHistoryRouting
from strategies.exploration.noise_endpoint import NoiseEndpoint
from strategies.regularizers.anchor_velocity import AnchorVelocityKL
from strategies.regularizers.branch_kl import BranchKL
from strategies.regularizers.kernel_kl import KernelKL
from strategies.regularizers.none import NoRegularizer
from strategies.regularizers.selective_kl import ConstantRatio, SelectiveKL
from strategies.regularizers.several import Several
from strategies.regularizers.velocity_kl import VelocityKL
from strategies.surrogates.gaussian_kernel import GaussianRatio, GaussianRegression, GaussianReinforce
from strategies.surrogates.gibbs_tve import GibbsTVE
from strategies.surrogates.nft import NFT
from tests.framework.test_trainer import make_trainer, weights
from tests.support import PROMPTS, Brightness, tiny_generator

NOISE = NoiseEndpoint(4, stream_blocks=2)
ROUTING = CausalHistoryRouting(
    group_size=3, routed_frames=2, recent=1, sink=0, routed_blocks=1, tail_blocks=1, stream_blocks=4, steps=(True,) * 4
)
SELECTIVE = SelectiveKL("bright", ["dark"], ratio=ConstantRatio(0.5))

EXPLORATIONS: dict[str, ExplorationStrategy] = {
    f"{type(base).__name__}, {type(kernel).__name__}": replace(base, kernel=kernel)
    for base in (NOISE, ROUTING)
    for kernel in (Ode(), Consistency(), FlowGRPO())
}
SURROGATES: dict[str, SurrogatePolicy] = {
    type(s).__name__: s for s in (NFT(), GibbsTVE(), GaussianReinforce(), GaussianRegression(), GaussianRatio())
}
REGULARIZERS: dict[str, Regularizer] = {
    type(r).__name__: r for r in (NoRegularizer(), VelocityKL(), KernelKL(), AnchorVelocityKL(), BranchKL(), SELECTIVE)
} | {"Several": Several((VelocityKL(), SELECTIVE)), "Several, anchor": Several((AnchorVelocityKL(), SELECTIVE))}

ANY_SURROGATE = {"NoRegularizer", "VelocityKL", "SelectiveKL", "Several"}
GAUSSIAN = {"GaussianReinforce", "GaussianRegression", "GaussianRatio"}
ROLLED = {
    "NoiseEndpoint, Ode": {"NFT"},
    "NoiseEndpoint, Consistency": {"NFT"} | GAUSSIAN,
    "NoiseEndpoint, FlowGRPO": {"NFT"} | GAUSSIAN,
    "CausalHistoryRouting, Ode": {"NFT", "GibbsTVE"},
    "CausalHistoryRouting, Consistency": {"NFT", "GibbsTVE", "GaussianRatio"},
    "CausalHistoryRouting, FlowGRPO": {"NFT", "GibbsTVE", "GaussianRatio"},
}
"""What fits which exploration, written out by hand."""
MEASURED = {"NFT": ANY_SURROGATE, "GibbsTVE": ANY_SURROGATE | {"AnchorVelocityKL", "BranchKL", "Several, anchor"}} | {
    name: ANY_SURROGATE | {"KernelKL"} for name in GAUSSIAN
}
"""What fits which surrogate, written out by hand."""
LACKS = {
    "GibbsTVE": r"Displacements \(Predictions under a history other than the canonical one",
    "GaussianReinforce": r"OnPolicyTransitions \(Transitions whose mean was the behaviour policy's own prediction",
    "GaussianRegression": r"OnPolicyTransitions \(Transitions whose mean was the behaviour policy's own prediction",
    "GaussianRatio": r"Transitions \(Sampler steps with a density",
    "KernelKL": r"KernelKL reads KernelShift",
    "AnchorVelocityKL": r"AnchorVelocityKL reads AnchorShift",
    "BranchKL": r"BranchKL reads BranchLogits",
    "Several, anchor": r"Several reads AnchorShift",
}
"""The reason for every refusal."""

Recipe = tuple[str, str, str]
RECIPES = [(e, s, r) for e in EXPLORATIONS for s in SURROGATES for r in REGULARIZERS]


def fits(exploration: str, surrogate: str, regularizer: str) -> bool:
    return surrogate in ROLLED[exploration] and regularizer in MEASURED[surrogate]


def named(recipe: Recipe) -> str:
    return " + ".join(recipe)


@pytest.mark.parametrize("recipe", [r for r in RECIPES if not fits(*r)], ids=named)
def test_a_recipe_that_does_not_fit_is_refused_with_its_reason(recipe: Recipe):
    exploration, surrogate, regularizer = recipe
    reason = LACKS[regularizer if surrogate in ROLLED[exploration] else surrogate]
    with pytest.raises(IncompatibleRecipe, match=reason) as refusal:
        check_recipe(EXPLORATIONS[exploration], SURROGATES[surrogate], GroupRelative(), REGULARIZERS[regularizer])
    assert "\n" not in str(refusal.value)


# what fits trains


class Contrary(RewardModel):
    """Two signals that never agree, so that a selective KL always finds a clip that one of them over-rates."""

    @property
    def signals(self) -> tuple[str, ...]:
        return ("bright", "dark")

    def score(self, videos: VideoBatch) -> Scores:
        bright = videos.frames.float().mean((1, 2, 3, 4))
        return Scores.of({"bright": bright, "dark": -bright})


@dataclass(frozen=True)
class Trained:
    """Two steps of one recipe: the parameters before and after, and the gradient's norm in each step."""

    before: dict[str, Tensor]
    after: dict[str, Tensor]
    grad_norms: tuple[float, ...]


def train(exploration: ExplorationStrategy, surrogate: SurrogatePolicy, regularizer: Regularizer) -> Trained:
    """One prompt a step, every weight trained; no weight decay, which moves weights without a gradient."""
    trainer = make_trainer(
        exploration=exploration, surrogate=surrogate, regularizer=regularizer, reward=Contrary(),
        advantage=GroupRelative({"bright": 1.0}), adaptation=FullFineTuning(),
        optimizer=AdamW(1e-3, weight_decay=0.0), prompts_per_step=1,
    )  # fmt: skip
    before = weights(trainer)
    norms = tuple(float(trainer.step()["train/grad_norm"]) for _ in range(2))
    return Trained(before, weights(trainer), norms)


@cache
def trained(exploration: str, surrogate: str, regularizer: str) -> Trained:
    return train(EXPLORATIONS[exploration], SURROGATES[surrogate], REGULARIZERS[regularizer])


SMALL = 1e-5
"""A gradient this small is rounding: the smallest of the recipes is forty times larger."""


def check_learns(run: Trained) -> None:
    """The gradient of both steps is more than rounding, and every parameter is another."""
    assert min(run.grad_norms) > SMALL
    assert not any(torch.equal(run.before[name], run.after[name]) for name in run.before)


def check_acts(run: Trained, alone: Trained) -> None:
    """The regularizer changed the second step; in the first, policy and reference are equal and every KL is at rest."""
    assert run.grad_norms[0] == pytest.approx(alone.grad_norms[0], rel=1e-3)
    assert any(not torch.equal(run.after[name], alone.after[name]) for name in run.after)


@pytest.mark.parametrize("recipe", [r for r in RECIPES if fits(*r)], ids=named)
def test_a_recipe_that_fits_trains_and_its_regularizer_acts(recipe: Recipe):
    run = trained(*recipe)
    check_learns(run)
    if recipe[2] != "NoRegularizer":
        check_acts(run, trained(recipe[0], recipe[1], "NoRegularizer"))


@dataclass(frozen=True)
class Silent(NFT):
    """A planted error: a loss that no weight can change."""

    def objective(self, statistics: Statistics, advantage: Advantage) -> Objective:
        objective = super().objective(statistics, advantage)
        return replace(objective, per_clip=0 * objective.per_clip)


def test_the_learning_check_sees_a_surrogate_without_a_gradient():
    with pytest.raises(AssertionError):
        check_learns(train(NOISE, Silent(), NoRegularizer()))


def test_the_regularizer_check_sees_one_that_weighs_nothing_and_a_mask_that_marks_nobody():
    alone = trained("NoiseEndpoint, Consistency", "NFT", "NoRegularizer")
    for idle in (VelocityKL(0.0), SelectiveKL("bright", ["dark"], ratio=ConstantRatio(1e-6), weight=0.0)):
        with pytest.raises(AssertionError):
            check_acts(train(NOISE, NFT(), idle), alone)


def gibbs_gradient(tape: Tape) -> float:
    """Norm of the Gibbs policy's gradient on a routed tape, for an advantage of one branch."""
    generator, surrogate = tiny_generator(), GibbsTVE()
    policies = Policies(generator, FullFineTuning(), Constant(0.0), 0.9, seed=0)
    (probes,) = surrogate.probes(tape, generator.recipe, Streams(0))
    advantage = Advantage(torch.tensor([1.0, -1.0, 0.0, 0.0]), ~tape.anchors, tape.groups)
    loss = Loss(surrogate.views, surrogate.statistics, lambda s, rows: surrogate.objective(s, advantage[rows]), True)
    policies.backward(loss, probes, 4, 3)
    return float(torch.stack([p.grad.norm() for p in policies.parameters.values() if p.grad is not None]).norm())


def test_a_gibbs_policy_needs_displacements_because_it_learns_nothing_where_no_history_was_changed():
    generator, streams = tiny_generator(), Streams(0)
    plans = ROUTING.plan([Scene.single(PROMPTS[0])], [0], generator.recipe, streams)
    routed = roll_out(generator, plans, ROUTING.kernel, frozenset({Displacements, Anchors}))
    seen = roll_out(generator, canonical(plans), ROUTING.kernel, frozenset({Predictions, Anchors}))
    plain, route = seen[Predictions], routed[Displacements]
    claimed = Displacements(plain.states, plain.velocities, plain.sigmas, route.blocks, route.steps)
    forged = Tape(routed.plans, {**seen.records, Displacements: claimed})
    assert gibbs_gradient(forged) < 1e-4 * gibbs_gradient(routed)


# advantage rules

PLAIN_RULES = [
    GroupRelative(), GroupCentred(), PerRewardCentred(), PrimaryOnly("bright"), SumFirst({"bright": 1.0}),
    RavenAdvantage(), ShuffledSiblings(GroupRelative()),
]  # fmt: skip
ANCHOR_RULES = [
    AnchorRelative(), AnchorCentred(), ReleasedAnchorRelative(), ShuffledSiblings(AnchorCentred()),
]  # fmt: skip


@pytest.mark.parametrize("rule", [*PLAIN_RULES, *ANCHOR_RULES], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("exploration", EXPLORATIONS)
def test_a_rule_that_compares_with_an_anchor_needs_an_exploration_that_makes_one(exploration: str, rule: AdvantageRule):
    parts = EXPLORATIONS[exploration], NFT(), rule, NoRegularizer()
    if rule in PLAIN_RULES or exploration.startswith("CausalHistoryRouting"):
        assert Endpoints in check_recipe(*parts)
    else:
        reason = f"{type(rule).__name__} reads Anchors .A branch per group that explored nothing.*but NoiseEndpoint"
        with pytest.raises(IncompatibleRecipe, match=reason):
            check_recipe(*parts)


ADMITTED = [(rule, False) for rule in PLAIN_RULES] + [(rule, True) for rule in (*PLAIN_RULES, *ANCHOR_RULES)]


@pytest.mark.parametrize(("rule", "anchored"), ADMITTED)
def test_an_admitted_rule_tells_branches_apart_and_leaves_anchors_out(rule: AdvantageRule, anchored: bool):
    bright = torch.tensor([0.1, 0.5, 0.3, 0.2, 0.4, 0.9, 0.6, 0.5])
    anchors = torch.tensor([False, False, False, anchored] * 2)
    advantage = rule(Scores.of({"bright": bright, "red": bright.square()}), torch.arange(8) // 4, anchors)
    assert bool(advantage.active.any()) and not bool((advantage.active & anchors).any())
    for group in (slice(0, 4), slice(4, 8)):
        values = advantage.values[group][advantage.active[group]]
        assert len(values) == 0 or float(values.std()) > 1e-3


# the registry


def ours(kind: type) -> set[str]:
    """Names of our own registered parts of one interface."""
    parts = Registry().offered()[0].values()
    return {p.target.__name__ for p in parts if isinstance(p.target, type) and issubclass(p.target, kind)
            and p.target.__module__.split(".")[0] in ("strategies", "framework")}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "tried"),
    [
        (ExplorationStrategy, EXPLORATIONS.values()),
        (SurrogatePolicy, SURROGATES.values()),
        (Regularizer, REGULARIZERS.values()),
        (AdvantageRule, [*PLAIN_RULES, *ANCHOR_RULES]),
    ],
)
def test_every_part_of_the_registry_is_tried_here(kind: type, tried: Iterable[object]):
    missing = ours(kind) - {type(part).__name__ for part in tried}
    assert not missing, f"add to the tables of this file: {sorted(missing)}"


def test_a_selective_kl_needs_a_reward_that_gives_its_signals():
    check_signals(SELECTIVE, Contrary())
    with pytest.raises(IncompatibleRecipe, match=r"SelectiveKL reads the reward signals \['dark'\]"):
        check_signals(SELECTIVE, Brightness())
