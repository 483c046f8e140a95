"""What a configuration says, before anything is built: bindings, what a command reaches of them, what is wrong.

Everything here works on values as they were written, so that every mistake is found before the first weight is loaded.
Scopes and macros mean what they mean in gin: a reference without a scope is built in the scope of whoever holds it, a
binding holds in its scope and all scopes inside, a macro ``%M`` is a scope ``M`` of its own.
"""

import ast
import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from framework.config.registry import ConfigError, Part, Registry, did_you_mean
from framework.config.signatures import EMPTY, Built, Parameter, Unbuilt, built_kind, fits, spell

MACRO, SINGLETON = "gin.macro", "gin.singleton"
BUILTIN = {
    MACRO: Part(MACRO, lambda value: value, {"value": Parameter("value", Any, EMPTY)}),
    SINGLETON: Part(
        SINGLETON, lambda constructor: constructor(), {"constructor": Parameter("constructor", Callable, EMPTY)}
    ),
}


class Required:
    """The value ``%gin.REQUIRED``."""

    def __repr__(self) -> str:
        return "%gin.REQUIRED"


REQUIRED = Required()


@dataclass(frozen=True)
class Reference:
    """``@scope/name()``, ``@scope/name`` or ``%MACRO``."""

    scope: str
    name: str
    called: bool

    def __repr__(self) -> str:
        if self.name == MACRO:
            return f"%{self.scope}"
        return f"@{self.scope}{'/' if self.scope else ''}{self.name}{'()' if self.called else ''}"


class Key(NamedTuple):
    """What is bound: a parameter of a name, in a scope ("" for everywhere)."""

    scope: str
    name: str
    parameter: str

    def __str__(self) -> str:
        scope = f"{self.scope}/" if self.scope else ""
        return self.scope if self.name == MACRO else f"{scope}{self.name}.{self.parameter}"


@dataclass(frozen=True)
class Binding:
    """A value as written, where, e.g. ``embedded/nft.gin:12``, and its number among all bindings."""

    value: Any
    where: str
    order: int


@dataclass
class Reached:
    """What building a name uses. calls: per (scope, name) the binding of each bound parameter; used: all keys seen.

    built: the calls that are built, and not handed on for somebody to call with arguments of their own.
    """

    calls: dict[tuple[str, str], dict[str, Key]] = field(default_factory=dict)
    used: set[Key] = field(default_factory=set)
    built: set[tuple[str, str]] = field(default_factory=set)
    referrer: dict[tuple[str, str], Key] = field(default_factory=dict)


def values_in(value: Any) -> Iterator[Any]:
    """The value and everything inside its containers."""
    yield value
    if isinstance(value, list | tuple):
        for item in value:
            yield from values_in(item)
    elif isinstance(value, dict):
        for pair in value.items():
            yield from values_in(pair)


def references(value: Any) -> list[Reference]:
    """All references inside a value."""
    return [item for item in values_in(value) if isinstance(item, Reference)]


def scopes_of(scope: str) -> list[str]:
    """``a/b`` → ``["", "a", "a/b"]``: where a binding may stand that holds in ``a/b``."""
    names = scope.split("/") if scope else []
    return ["/".join(names[:n]) for n in range(len(names) + 1)]


class Bindings:
    """An ordered table of bindings; a later one of the same key replaces an earlier one."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.table: dict[Key, Binding] = {}
        self._replaced: dict[Key, list[tuple[Any, int]]] = {}  # earlier values and when they were replaced
        self._written = 0

    def part(self, name: str) -> Part:
        """The part, command or gin builtin of that name. Raises ConfigError when there is none."""
        return BUILTIN[name] if name in BUILTIN else self.registry.find(name)

    def set(self, key: Key, value: Any, where: str) -> None:
        """Bind. Raises ConfigError for an unknown name or parameter, in the key or in the value."""
        if write_value(value) is None:
            raise ConfigError(
                f"{where}: {key}: values are None, bools, numbers, text, lists, tuples, dicts, @parts, %MACROS"
            )
        try:
            self.part(key.name).parameter(key.parameter)
            for reference in references(value):
                self.part(reference.name)
        except ConfigError as error:
            hint = self._parameters_of(f"{key.name}.{key.parameter}")
            raise ConfigError(f"{where}: {hint or error}") from error.__cause__
        self._written += 1
        if key in self.table:
            self._replaced.setdefault(key, []).append((self.table[key].value, self._written))
        self.table[key] = Binding(value, where, self._written)

    def _parameters_of(self, name: str) -> str | None:
        """What to write in place of a binding of a part itself, e.g. ``nft.NFT = 3``; None for what is no part."""
        try:
            parameters = self.registry.find(name).parameters
        except ConfigError:
            return None
        return f"{name} is a part, which gets no value itself; bind one of its parameters: {', '.join(parameters)}"

    def _bound(self, scope: str, name: str) -> tuple[dict[str, Key], list[Key]]:
        """(the binding that wins for each parameter, all that hold) for a name that is built in ``scope``."""
        holding = [
            key for place in scopes_of(scope) for key in self.table if (key.scope, key.name) == (place, name)
        ]  # outer scopes first, so that inner ones replace them
        return {key.parameter: key for key in holding}, holding

    def reach(self, root: str, as_of: int | None = None) -> Reached:
        """What building ``root`` uses. Raises ConfigError when something is built from itself.

        as_of: also follow values that were replaced only after binding number ``as_of`` was written.
        """
        reached = Reached(built={("", root)})

        def visit(scope: str, name: str, path: tuple[tuple[str, str], ...]) -> None:
            call = (scope, name)
            if call in path and as_of is None:
                loop = " → ".join(str(Reference(*one, True)) for one in (*path[path.index(call) :], call))
                raise ConfigError(f"{self.table[reached.referrer[call]].where}: built from itself: {loop}")
            if call in reached.calls:
                return
            reached.calls[call], holding = self._bound(scope, name)
            reached.used.update(holding)
            for key in reached.calls[call].values() if as_of is None else holding:
                replaced = [old for old, when in self._replaced.get(key, ()) if as_of is not None and when > as_of]
                for reference in references([self.table[key].value, *replaced]):
                    inner = (reference.scope or scope, reference.name)
                    if reference.called or name == SINGLETON:
                        reached.built.add(inner)
                    reached.referrer.setdefault(inner, key)
                    visit(*inner, (*path, call))

        visit("", root, ())
        return reached

    def check(self, root: str, reached: Reached) -> None:
        """Raises ConfigError for an undefined macro, a value left REQUIRED, a missing one or one of a wrong type."""
        for (scope, name), bound in reached.calls.items():
            if name == MACRO and not bound:
                referrer = reached.referrer[scope, name]
                macros = [key.scope for key in self.table if key.name == MACRO]
                raise ConfigError(
                    f"{self.table[referrer].where}: {referrer} uses %{scope}, which is not defined"
                    f"{did_you_mean(scope, macros)}; macros: {', '.join(macros) or 'none'}"
                )
            for key in bound.values():
                if any(value is REQUIRED for value in values_in(self.table[key].value)):
                    raise ConfigError(self._unset(key, reached))
        for (scope, name), bound in reached.calls.items():
            part = self.part(name)
            missing = [p for p in part.parameters.values() if p.required and p.name not in bound]
            handed_on = (scope, name) not in reached.built and inspect.isroutine(part.target)
            if missing and not handed_on:
                at = f"{scope}/{name}" if name == SINGLETON else name
                where = f"{self.table[reached.referrer[scope, name]].where}: " if name != root else ""
                needed = ", ".join(f"{at}.{p.name} ({spell(p.annotation)})" for p in missing)
                raise ConfigError(f"{where}no value for {needed}; write {at}.{missing[0].name} = …")
            for parameter, key in bound.items():
                annotation = part.parameter(parameter).annotation
                if not fits(self._stand_in(self.table[key].value, scope), annotation):
                    raise ConfigError(self._misfit(key, annotation))

    def _stand_in(self, value: Any, scope: str) -> Any:
        """The value with macros replaced by what they say and references by what they will become."""
        if isinstance(value, list | tuple):
            return type(value)(self._stand_in(item, scope) for item in value)
        if isinstance(value, dict):
            return {key: self._stand_in(item, scope) for key, item in value.items()}
        if not isinstance(value, Reference):
            return value
        scope = value.scope or scope
        if value.name in BUILTIN:
            bound, _ = self._bound(scope, value.name)
            if not bound:
                return Built(None)
            inner = self._stand_in(self.table[next(iter(bound.values()))].value, scope)
            if value.name == MACRO:
                return inner
            return Built(built_kind(inner.target) if isinstance(inner, Unbuilt) else None)
        target = self.part(value.name).target
        return Built(built_kind(target)) if value.called else Unbuilt(target)

    def _misfit(self, key: Key, annotation: Any) -> str:
        binding = self.table[key]
        got, where = repr(binding.value), binding.where
        if isinstance(binding.value, Reference) and binding.value.name == MACRO:
            macro = self.table[Key(binding.value.scope, MACRO, "value")]
            got, where = f"{binding.value.scope} = {macro.value!r}", macro.where
            binding = macro
        hint = ""
        if isinstance(binding.value, Reference) and not binding.value.called:
            hint = "; write () behind it to build it"
        elif isinstance(binding.value, bool | int | float | str | None):
            hint = f" ({type(binding.value).__name__})"
        return f"{where}: {key} must be {spell(annotation)}, got {got}{hint}"

    def _unset(self, key: Key, reached: Reached) -> str:
        user = reached.referrer[key.scope, MACRO] if key.name == MACRO else key
        annotation = self.part(user.name).parameter(user.parameter).annotation
        fitting = [
            name
            for name, part in self.registry.offered()[0].items()
            if annotation is not Any and built_kind(part.target) and fits(Built(built_kind(part.target)), annotation)
        ]
        value = f"@{fitting[0]}()" if fitting else f"<{spell(annotation)}>"
        choice = f" (one of: {', '.join(fitting)})" if len(fitting) > 1 else ""
        return f"{self.table[key].where}: {key} is required and not set; write {key} = {value}{choice}"

    def _was_used(self, key: Key, roots: Iterable[str]) -> bool:
        return any(key in self.reach(root, self.table[key].order).used for root in roots)

    def unused(self, root: str, reached: Reached, others: Mapping[str, Reached]) -> str | None:
        """One line about bindings that this command does not use and no other command would either.

        A binding for something that a later line replaced is no mistake: that is how one file varies another.
        """
        used = reached.used.union(*(other.used for other in others.values()))
        dead = [key for key in self.table if key not in used and not self._was_used(key, [root, *others])]
        if not dead:
            return None
        built = {name for _, name in reached.calls}
        first, reason = dead[0], ""
        if first.name == MACRO:
            known = sorted({scope for scope, name in reached.calls if name == MACRO} - {first.scope})
            reason = f"nothing refers to %{first.scope}{did_you_mean(first.scope, known)}"
        elif first.name in built:
            scopes = sorted({scope or "(none)" for scope, name in reached.calls if name == first.name})
            near = difflib.get_close_matches(first.scope, scopes, n=1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            reason = f"{first.name} is not built in scope {first.scope!r}{meant}; its scopes: {', '.join(scopes)}"
        else:
            names = sorted(built - {root, *BUILTIN})
            reason = f"this run does not build {first.name}; it builds: {', '.join(names) or 'nothing'}"
        rest = f" (and {len(dead) - 1} more: {', '.join(map(str, dead[1:4]))})" if len(dead) > 1 else ""
        return f"{self.table[first].where}: {first} is bound but never used: {reason}{rest}"


def write_value(value: Any) -> str | None:
    """The value as gin reads it back, None for what has no such spelling."""
    if isinstance(value, Reference | Required):
        return repr(value)
    if type(value) in (list, tuple):
        items = [write_value(item) for item in value]
        if None in items:
            return None
        inner = ", ".join(item for item in items if item is not None)
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    if type(value) is dict:
        pairs = [(write_value(key), write_value(item)) for key, item in value.items()]
        return None if None in sum(pairs, ()) else "{" + ", ".join(f"{key}: {item}" for key, item in pairs) + "}"
    if type(value) is float and value in (float("inf"), -float("inf")):
        return "1e999" if value > 0 else "-1e999"
    if value is None or type(value) in (bool, int, float, str):
        text = repr(value)
        return text if text != "nan" and ast.literal_eval(text) == value else None
    return None


def write_operative(bindings: Bindings, root: str, reached: Reached, others: Iterable[Reached]) -> str:
    """A gin file that gives this run again: plugins, every binding that was used, every default that was taken.

    Bindings that only other commands use are kept, so that the file of a training run also serves its evaluation.
    """
    used = reached.used.union(*(other.used for other in others))
    lines: dict[Key, str] = {}
    for key in used:
        lines[key] = f"{key} = {write_value(bindings.table[key].value)}"
    for (_, name), bound in reached.calls.items():
        for parameter in bindings.part(name).parameters.values():
            text = None if parameter.required else write_value(parameter.default)
            if parameter.name not in bound and text is not None:
                key = Key("", name, parameter.name)
                lines[key] = f"{key} = {text}"
    sections: dict[tuple[int, str], list[str]] = {}
    for key in sorted(lines):
        rank = 0 if key.name == MACRO else 1 if key.name == root else 2
        sections.setdefault((rank, "" if rank == 0 else key.name), []).append(lines[key])
    head = [f"# armillary {root}: every binding and default in force", *bindings.registry.import_lines()]
    blocks = ["\n".join(head)] + ["\n".join(lines) for _, lines in sorted(sections.items())]
    return "\n\n".join(blocks) + "\n"
