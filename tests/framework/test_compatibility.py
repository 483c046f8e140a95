"""A recipe is valid when everything read was written upstream; what is refused is refused with a sentence."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import strategies as st

from framework.advantages import GroupRelative
from framework.compatibility import IncompatibleRecipe, check_recipe, check_updates, missing_records
from framework.interfaces import AdvantageRule, Regularizer, Schedule, SurrogatePolicy
from framework.kernels import Consistency, Ode
from framework.optimization import Constant, Ramp
from framework.records import Endpoints, EndpointShift, OnPolicyTransitions, Predictions, Record, Transitions
from framework.rng import Streams
from framework.types import Advantage, Objective, Tape
from strategies.exploration.noise_endpoint import NoiseEndpoint
from strategies.regularizers.none import NoRegularizer
from strategies.regularizers.several import Several
from strategies.regularizers.velocity_kl import VelocityKL
from strategies.surrogates.gaussian_kernel import GaussianRatio, GaussianRegression, GaussianReinforce
from strategies.surrogates.gibbs_tve import GibbsTVE
from strategies.surrogates.nft import NFT
from tests.routed import plans_at, rolled
from tests.support import holds, normal, refuted, tiny_generator

Kinds = frozenset[type[Record]]
Checker = Callable[[Iterable[type[Record]], Iterable[type[Record]]], list[type[Record]]]
TREE: dict[str, type[Record]] = {}


def grow(name: str, *bases: type[Record]) -> type[Record]:
    TREE[name] = type(name, bases or (Record,), {})
    return TREE[name]


A, B = grow("A"), grow("B")
A1, A2 = grow("A1", A), grow("A2", A)
A11 = grow("A11", A1)
AB = grow("AB", A2, B)
ANCESTORS = {"A": {"A"}, "B": {"B"}, "A1": {"A", "A1"}, "A2": {"A", "A2"}, "A11": {"A", "A1", "A11"},
             "AB": {"A", "A2", "B", "AB"}}  # fmt: skip
"""What each record counts as, written out by hand."""

KINDS = st.frozensets(st.sampled_from(sorted(TREE)))


def check_missing(checker: Checker, reads: frozenset[str], writes: frozenset[str]) -> None:
    """Missing is what is read and is an ancestor of nothing that is written."""
    provided = set().union(*(ANCESTORS[name] for name in writes))
    found = checker([TREE[name] for name in reads], iter([TREE[name] for name in writes]))
    assert [kind.__name__ for kind in found] == sorted(reads - provided)


def exact_types(reads: Iterable[type[Record]], written: Iterable[type[Record]]) -> list[type[Record]]:
    """Blind to subclasses."""
    return sorted(set(reads) - set(written), key=lambda r: r.__name__)


def upside_down(reads: Iterable[type[Record]], written: Iterable[type[Record]]) -> list[type[Record]]:
    """A base taken for its subclass."""
    written = tuple(written)
    return sorted((r for r in reads if not any(issubclass(r, w) for w in written)), key=lambda r: r.__name__)


def first_only(reads: Iterable[type[Record]], written: Iterable[type[Record]]) -> list[type[Record]]:
    """An iterator read once."""
    rest = iter(written)
    return sorted((r for r in reads if not any(issubclass(w, r) for w in rest)), key=lambda r: r.__name__)


def test_what_is_read_must_be_written_itself_or_as_a_subclass():
    holds(partial(check_missing, missing_records), KINDS, KINDS, examples=200)


@pytest.mark.parametrize("mutant", [exact_types, upside_down, first_only])
def test_the_records_check_sees_another_logic(mutant: Checker):
    refuted(partial(check_missing, mutant), KINDS, KINDS)


# whole recipes


def reading(*kinds: type[Record]) -> SurrogatePolicy:
    """A surrogate that reads records and nothing else."""

    class Reader(SurrogatePolicy):
        reads = frozenset(kinds)

        def probes(self, tape, recipe, generator):
            raise NotImplementedError

        def statistics(self, views, probes):
            raise NotImplementedError

        def objective(self, statistics, advantage):
            raise NotImplementedError

    return Reader()


class AnchorRule(AdvantageRule):
    """An advantage rule that reads a record."""

    reads = frozenset({OnPolicyTransitions})

    def __call__(self, scores, groups, anchors=None):
        raise NotImplementedError


class ShiftOfEndpoints(Regularizer):
    """Reads what the rollout and what the surrogate leaves."""

    reads = frozenset({EndpointShift, Predictions})
    views = frozenset({"reference"})

    def penalty(self, objective, marks):
        raise NotImplementedError


def test_a_density_under_a_deterministic_sampler_is_refused_with_a_sentence():
    with pytest.raises(IncompatibleRecipe) as refusal:
        check_recipe(NoiseEndpoint(kernel=Ode()), reading(Transitions), GroupRelative(), NoRegularizer())
    sentence = str(refusal.value)
    assert "\n" not in sentence
    for part in (
        "Reader reads Transitions",
        "Sampler steps with a density",
        "NoiseEndpoint",
        "kernel Ode",
        "Endpoints",
    ):
        assert part in sentence


def test_the_same_surrogate_fits_a_stochastic_sampler():
    keep = check_recipe(NoiseEndpoint(kernel=Consistency()), reading(Transitions), GroupRelative(), NoRegularizer())
    assert keep == {Transitions}


def test_an_advantage_rule_is_checked_against_the_rollout():
    with pytest.raises(IncompatibleRecipe, match=r"AnchorRule reads OnPolicyTransitions \(Transitions whose mean"):
        check_recipe(NoiseEndpoint(kernel=Ode()), NFT(), AnchorRule(), NoRegularizer())
    keep = check_recipe(NoiseEndpoint(), NFT(), AnchorRule(), NoRegularizer())
    assert keep == {Endpoints, OnPolicyTransitions}


def test_a_regularizer_may_read_what_the_surrogate_writes_and_it_is_not_kept_by_the_rollout():
    assert check_recipe(NoiseEndpoint(), NFT(), GroupRelative(), VelocityKL()) == {Endpoints}
    assert check_recipe(NoiseEndpoint(), NFT(), GroupRelative(), ShiftOfEndpoints()) == {Endpoints, Predictions}


def test_a_regularizer_without_its_measurement_is_refused():
    with pytest.raises(IncompatibleRecipe, match=r"VelocityKL reads EndpointShift .*but Reader writes nothing"):
        check_recipe(NoiseEndpoint(), reading(Endpoints), GroupRelative(), VelocityKL())


class Forgetful(Regularizer):
    """Reads a distance from the reference and forgets to have it asked."""

    reads = frozenset({EndpointShift})

    def penalty(self, objective, marks):
        return objective.written[EndpointShift].distance


class AsksTheReference(NFT):
    """A surrogate that has the reference asked on its own account."""

    views = NFT.views | {"reference"}


def test_a_distance_from_a_reference_that_nobody_asks_is_refused_with_the_view_that_is_missing():
    with pytest.raises(IncompatibleRecipe) as refusal:
        check_recipe(NoiseEndpoint(), NFT(), GroupRelative(), Forgetful())
    sentence = str(refusal.value)
    assert "\n" not in sentence
    assert "Forgetful reads EndpointShift (How far the current policy's velocities moved" in sentence
    assert sentence.endswith("; add ['reference'] to Forgetful.views, and it is measured")


def test_a_reference_that_the_surrogate_has_asked_or_another_part_serves_everybody():
    assert check_recipe(NoiseEndpoint(), AsksTheReference(), GroupRelative(), Forgetful()) == {Endpoints}
    assert check_recipe(NoiseEndpoint(), NFT(), GroupRelative(), Several([Forgetful(), VelocityKL()])) == {Endpoints}


def test_adding_a_view_is_not_advised_where_it_would_not_help():
    with pytest.raises(IncompatibleRecipe) as refusal:
        check_recipe(NoiseEndpoint(), reading(Endpoints), GroupRelative(), Forgetful())
    assert "views" not in str(refusal.value)


@pytest.fixture(scope="module")
def tape() -> Tape:
    """A routed rollout, its transitions taken for on-policy ones as well: everything that a surrogate reads."""
    made = rolled(plans_at(2))
    steps = made[Transitions]
    on_policy = OnPolicyTransitions(steps.states, steps.next_states, steps.grid, steps.kernel)
    return replace(made, records={**made.records, OnPolicyTransitions: on_policy})


def objective_of(surrogate: SurrogatePolicy, tape: Tape, names: frozenset[str]) -> Objective:
    """What is written where some policies are asked; they answer with noise."""
    (probes,) = surrogate.probes(tape, tiny_generator().recipe, Streams(0))
    views = {name: normal(i, *probes.noisy.shape) for i, name in enumerate(sorted(names))}
    groups = tape.groups[probes.rows]
    advantage = Advantage(torch.zeros(len(groups)), torch.ones(len(groups), dtype=torch.bool), groups)
    return surrogate.loss(views, probes, advantage)


@pytest.mark.parametrize("surrogate", [NFT(), GaussianReinforce(), GaussianRegression(), GaussianRatio(), GibbsTVE()])
def test_a_surrogate_writes_what_it_says_where_the_views_of_a_record_are_asked(surrogate: SurrogatePolicy, tape: Tape):
    """What the check takes for granted."""
    for names in (surrogate.views, surrogate.views | {"reference"}):
        written = frozenset(objective_of(surrogate, tape, names).written)
        assert written == {record for record in surrogate.writes if record.views <= names}


class Always(Schedule):
    """A behaviour policy that lags from some step on."""

    def __init__(self, decay: float, since: int = 0) -> None:
        self.decay, self.since = decay, since

    def __call__(self, step: int) -> float:
        return self.decay if step >= self.since else 0.0


def check_updates_are_refused(
    check: Callable[..., None], on_policy: bool, updates: int, decay: float, since: int, steps: int
) -> None:
    """Refused exactly where the surrogate has no ratio and some clip it would learn from is of another policy."""
    surrogate = GaussianRegression() if on_policy else GaussianRatio()
    off_policy = updates > 1 or (decay > 0 and since < steps)
    try:
        check(surrogate, updates, Always(decay, since), steps)
    except IncompatibleRecipe as error:
        sentence = str(error)
        assert on_policy and off_policy
        assert "\n" not in sentence and "GaussianRatio" in sentence and "no ratio" in sentence
        assert ("train.updates_per_rollout=" in sentence) == (updates > 1)
        assert (f"gives {decay:g} at step {since}" in sentence) == (updates == 1)
    else:
        assert not (on_policy and off_policy)


UPDATES = (st.booleans(), st.integers(1, 3), st.sampled_from([0.0, 0.001, 0.9]), st.integers(0, 6), st.integers(1, 5))


def looks_at_the_first_step_only(surrogate: SurrogatePolicy, updates: int, decay: Schedule, steps: int) -> None:
    """A planted error: a ramp starts at 0."""
    check_updates(surrogate, updates, decay, 1)


def looks_at_the_schedule_only(surrogate: SurrogatePolicy, updates: int, decay: Schedule, steps: int) -> None:
    """A planted error."""
    check_updates(surrogate, 1, decay, steps)


def blind_to_the_surrogate(surrogate: SurrogatePolicy, updates: int, decay: Schedule, steps: int) -> None:
    """A planted error: a ratio makes no difference."""
    check_updates(GaussianRegression(), updates, decay, steps)


def test_a_surrogate_without_a_ratio_takes_one_update_of_its_own_rollout():
    holds(partial(check_updates_are_refused, check_updates), *UPDATES, examples=200)


@pytest.mark.parametrize("mutant", [looks_at_the_first_step_only, looks_at_the_schedule_only, blind_to_the_surrogate])
def test_the_updates_check_sees_a_planted_error(mutant: Callable[..., None]):
    refuted(partial(check_updates_are_refused, mutant), *UPDATES)


def test_a_released_ramp_is_refused_at_the_step_where_it_leaves_zero():
    with pytest.raises(IncompatibleRecipe, match=r"behaviour_decay=Ramp gives 0\.001 at step 1, from where on"):
        check_updates(GaussianReinforce(), 1, Ramp(), 60)
    check_updates(GaussianReinforce(), 1, Constant(0.0), 60)


@pytest.mark.parametrize("kernel", [Consistency(), Consistency(0.3), Ode()])
def test_the_rollout_writes_transitions_exactly_where_they_have_a_density(kernel):
    written = NoiseEndpoint(kernel=kernel).writes()
    assert {Endpoints, Predictions} <= written
    assert (missing_records([Transitions], written) == []) == kernel.stochastic
