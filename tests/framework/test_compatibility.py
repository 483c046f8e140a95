"""A recipe is valid when everything read was written upstream; what is refused is refused with a sentence."""

from collections.abc import Callable, Iterable
from functools import partial

import pytest
from hypothesis import strategies as st

from framework.advantages import GroupRelative
from framework.compatibility import IncompatibleRecipe, check_recipe, missing_records
from framework.interfaces import AdvantageRule, Regularizer, SurrogatePolicy
from framework.kernels import Consistency, Ode
from framework.records import Endpoints, EndpointShift, OnPolicyTransitions, Predictions, Record, Transitions
from strategies.exploration.noise_endpoint import NoiseEndpoint
from strategies.regularizers.none import NoRegularizer
from strategies.regularizers.velocity_kl import VelocityKL
from strategies.surrogates.nft import NFT
from tests.support import holds, refuted

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


@pytest.mark.parametrize("kernel", [Consistency(), Consistency(0.3), Ode()])
def test_the_rollout_writes_transitions_exactly_where_they_have_a_density(kernel):
    written = NoiseEndpoint(kernel=kernel).writes()
    assert {Endpoints, Predictions} <= written
    assert (missing_records([Transitions], written) == []) == kernel.stochastic
