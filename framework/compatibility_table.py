"""What `armillary list --compat` prints: which registered parts fit together, and why the others do not.

Every part is built with its defaults and put to the checks of `framework.compatibility`, so that a part of another
package is in the tables as soon as it is registered. The text is Markdown; docs/compatibility.md ends with it.
"""

import inspect
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar

from framework.compatibility import advantage_gap, regularizer_gap, surrogate_gap
from framework.config.registry import Part
from framework.config.signatures import Parameter, built_kind, spell
from framework.interfaces import AdvantageRule, ExplorationStrategy, Regularizer, SurrogatePolicy
from framework.kernels import Consistency, FlowGRPO, Ode

KERNELS = (Consistency(), FlowGRPO(), Ode())
"""One kernel of each kind: the student's own, one that leaves its path, one without a density. An exploration that has
a parameter ``kernel`` is in the tables with each of them."""

T = TypeVar("T")


class NoExample(ValueError):
    """Why a part cannot be tried without somebody's choice."""


@dataclass(frozen=True)
class Tried(Generic[T]):
    """A part as it stands in the tables. setting: the kernel that it was built with, empty for none."""

    name: str
    setting: str
    part: T


@dataclass(frozen=True)
class Axes:
    """The parts of a recipe that records decide about. left_out: a line for every part that was not tried."""

    explorations: tuple[Tried[ExplorationStrategy], ...]
    surrogates: tuple[Tried[SurrogatePolicy], ...]
    regularizers: tuple[Tried[Regularizer], ...]
    advantages: tuple[Tried[AdvantageRule], ...]
    left_out: tuple[str, ...]


def collect(parts: Mapping[str, Part]) -> Axes:
    """Of everything that is offered, by full name: what belongs to an axis, built."""
    kinds = (ExplorationStrategy, SurrogatePolicy, Regularizer, AdvantageRule)
    found: dict[type, list[Tried[Any]]] = {kind: [] for kind in kinds}
    left_out: list[str] = []
    lasts = [name.rsplit(".", 1)[-1] for name in parts]
    for full, part in sorted(parts.items(), key=lambda item: item[0].rsplit(".", 1)[-1]):
        built = built_kind(part.target)
        kind = next((k for k in kinds if inspect.isclass(built) and issubclass(built, k)), None)
        if kind is None:
            continue
        last = full.rsplit(".", 1)[-1]
        name = last if lasts.count(last) == 1 else full
        settings = [{"kernel": kernel} for kernel in KERNELS] if "kernel" in part.parameters else [{}]
        try:
            found[kind] += [
                Tried(name, ", ".join(type(value).__name__ for value in given.values()), example(part, kind, given))
                for given in (settings if kind is ExplorationStrategy else [{}])
            ]
        except NoExample as reason:
            left_out.append(f"{name}: {reason}")
    explorations, surrogates, regularizers, advantages = (tuple(found[kind]) for kind in kinds)
    return Axes(explorations, surrogates, regularizers, advantages, tuple(left_out))


def example(part: Part, kind: type, given: Mapping[str, Any]) -> Any:
    """A part built with its defaults, ``given`` and stand-ins for names that only a user can choose.

    kind: the interface that it implements. Raises NoExample with the reason where that is not enough.
    """
    required = [p for p in part.parameters.values() if p.required and p.name not in given]
    stand_ins = {parameter.name: stand_in(parameter, kind) for parameter in required}
    try:
        return part.target(**given, **stand_ins)
    except Exception as error:  # anything can happen in a package of someone else
        raise NoExample(f"cannot be built without arguments: {type(error).__name__}: {error}") from error


def stand_in(parameter: Parameter, kind: type) -> Any:
    """A name for a name, several names for several; nothing else is guessed."""
    inside = (parameter.annotation, *typing.get_args(parameter.annotation))
    if kind in inside:
        raise NoExample(f"fits where what it wraps (`{parameter.name}`) fits")
    if parameter.annotation is str:
        return parameter.name
    if typing.get_origin(parameter.annotation) in (Sequence, list, tuple) and set(inside[1:]) in ({str}, {str, ...}):
        return (parameter.name,)
    raise NoExample(f"needs `{parameter.name}`: {spell(parameter.annotation)}, which has no default")


def labelled(tried: Iterable[Tried]) -> str:
    """``NoiseEndpoint (Consistency, Ode)``: the names with their settings; "none" for nothing."""
    settings: dict[str, list[str]] = {}
    for one in tried:
        settings.setdefault(one.name, []).append(one.setting)
    return ", ".join(f"{name} ({', '.join(s)})" if any(s) else name for name, s in settings.items()) or "none"


def fitting(axes: Axes) -> list[str]:
    """A Markdown table: for every surrogate, explorations that admit the same regularizers in one row."""
    rows = ["| surrogate | exploration (kernel) | regularizer |", "|---|---|---|"]
    for surrogate in axes.surrogates:
        by_regularizers: dict[str, list[Tried]] = {}
        for exploration in axes.explorations:
            if surrogate_gap(exploration.part, surrogate.part) is None:
                fit = [r for r in axes.regularizers
                       if regularizer_gap(exploration.part, surrogate.part, r.part) is None]  # fmt: skip
                by_regularizers.setdefault(labelled(fit), []).append(exploration)
        for regularizers, explorations in (by_regularizers or {"–": []}).items():
            rows.append(f"| {surrogate.name} | {labelled(explorations)} | {regularizers} |")
    return rows


def admitted_rules(axes: Axes) -> list[str]:
    """A Markdown table: advantage rules that the same explorations admit in one row."""
    by_explorations: dict[str, list[Tried]] = {}
    for rule in axes.advantages:
        fit = [e for e in axes.explorations if advantage_gap(e.part, rule.part) is None]
        by_explorations.setdefault(labelled(fit), []).append(rule)
    rows = [f"| {labelled(rules)} | {explorations} |" for explorations, rules in by_explorations.items()]
    return ["| advantage rule | exploration (kernel) |", "|---|---|", *rows]


def refused(axes: Axes) -> list[str]:
    """A line for every pair that does not fit, with what a run says about the first of its settings."""
    return [*refused_by_rollout(axes), *refused_regularizers(axes)]


def refused_by_rollout(axes: Axes) -> list[str]:
    """Surrogates and advantage rules that read what an exploration does not write."""
    asked = [(s.name, partial(surrogate_gap, surrogate=s.part)) for s in axes.surrogates]
    asked += [(a.name, partial(advantage_gap, advantage=a.part)) for a in axes.advantages]
    lines = []
    for reader, gap_of in asked:
        gaps: dict[tuple, list[tuple[Tried, str]]] = {}
        for exploration in axes.explorations:
            if (gap := gap_of(exploration.part)) is not None:
                gaps.setdefault((exploration.name, gap.missing), []).append((exploration, str(gap)))
        lines += [f"{labelled(one for one, _ in found)} × {reader}: {found[0][1]}" for found in gaps.values()]
    return lines


def refused_regularizers(axes: Axes) -> list[str]:
    """Regularizers that read what neither surrogate nor exploration writes, where those two fit each other."""
    lines = []
    for surrogate in axes.surrogates:
        admitted = [e for e in axes.explorations if surrogate_gap(e.part, surrogate.part) is None]
        for regularizer in axes.regularizers:
            gaps = {e: regularizer_gap(e.part, surrogate.part, regularizer.part) for e in admitted}
            found = {e: gap for e, gap in gaps.items() if gap is not None}
            if found:
                first = next(iter(found.values()))
                everywhere = len(found) == len(admitted)
                where = "" if everywhere else f"{labelled(found)} × "
                reason = replace(first, writers=first.writers[:1]) if everywhere else first
                lines.append(f"{where}{surrogate.name} × {regularizer.name}: {reason}")
    return lines


def compatibility_table(parts: Mapping[str, Part]) -> str:
    """The whole text for some parts of the registry, by full name."""
    axes = collect(parts)
    signals = [
        f"{one.name} reads the reward signals {', '.join(sorted(one.part.signals))}, which the reward must give"
        for one in axes.regularizers
        if one.part.signals
    ]
    alone = [
        f"{one.name} has no ratio to the policy that made the clips: train.updates_per_rollout must be 1 and "
        f"train.behaviour_decay 0 at every step"
        for one in axes.surrogates
        if one.part.on_policy
    ]
    sections = {
        "What fits": [*fitting(axes), "", *admitted_rules(axes)],
        "What is refused, and why": bullets(refused(axes)),
        "What else a run asks for": bullets([*signals, *alone]),
        "Not in the tables": bullets(axes.left_out),
    }
    return "\n".join("\n".join([f"## {title}", "", *lines, ""]) for title, lines in sections.items() if lines).rstrip()


def bullets(lines: Iterable[str]) -> list[str]:
    """Markdown list items."""
    return [f"* {line}" for line in lines]
