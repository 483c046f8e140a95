"""What a part accepts: its parameters, and whether a value fits an annotation before the part is built."""

import collections.abc
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

EMPTY = inspect.Parameter.empty


@dataclass(frozen=True)
class Parameter:
    """One argument of a part. ``annotation`` is `Any` and ``default`` is `EMPTY` where the source gives none."""

    name: str
    annotation: Any
    default: Any

    @property
    def required(self) -> bool:
        """Whether a call without it fails."""
        return self.default is EMPTY


@dataclass(frozen=True)
class Built:
    """Stands for the object that a reference ``@part()`` will become. ``kind`` is None where nothing is known."""

    kind: type | None


@dataclass(frozen=True)
class Unbuilt:
    """Stands for a reference ``@part`` without parentheses: the part itself, to be called later."""

    target: Callable[..., Any]


def read_parameters(target: Callable[..., Any]) -> tuple[dict[str, Parameter], bool]:
    """Parameters that can be given by name, and whether any other name is accepted too (``**kwargs``)."""
    signature = inspect.signature(target)
    hints = _hints(target)
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = {
        p.name: Parameter(p.name, hints.get(p.name, Any), p.default)
        for p in signature.parameters.values()
        if p.kind in named
    }
    return parameters, any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values())


def built_kind(target: Callable[..., Any]) -> type | None:
    """The class that calling ``target`` gives: itself, or what a function says it returns."""
    if inspect.isclass(target):
        return target
    returned = _hints(target).get("return")
    if returned is typing.Self and inspect.ismethod(target) and inspect.isclass(target.__self__):
        return target.__self__
    return returned if inspect.isclass(returned) else None


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    function = target.__init__ if inspect.isclass(target) else target
    try:
        return typing.get_type_hints(function)
    except NameError:  # names imported for type checkers only: those parameters stay unchecked
        written = inspect.get_annotations(function)
        return {name: hint for name, hint in written.items() if not isinstance(hint, str)}


def fits(value: Any, annotation: Any) -> bool:
    """Whether a configured value is of the annotated type.

    An int fits float; a bool fits neither; text is no sequence; a list is no tuple. What cannot be decided without
    building (protocols, type variables, functions without a return type) fits.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in (Any, EMPTY, object) or isinstance(annotation, typing.TypeVar | typing.NewType | str):
        return True
    if annotation is None or annotation is types.NoneType:
        return value is None
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, choice) for choice in arguments)
    if origin is typing.Annotated:
        return fits(value, arguments[0])
    if origin is typing.Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    kind = origin if inspect.isclass(origin) else annotation
    if not inspect.isclass(kind):
        return True
    if kind is collections.abc.Callable:
        if isinstance(value, Built):
            return value.kind is None or issubclass(value.kind, collections.abc.Callable)
        return isinstance(value, Unbuilt)
    if isinstance(value, Built):
        return value.kind is None or _is_open_protocol(kind) or issubclass(value.kind, kind)
    if isinstance(value, Unbuilt):
        return False
    return _fits_literal(value, kind, arguments)


def _is_open_protocol(kind: type) -> bool:
    return bool(getattr(kind, "_is_protocol", False)) and not getattr(kind, "_is_runtime_protocol", False)


def _fits_literal(value: Any, kind: type, arguments: tuple[Any, ...]) -> bool:
    if kind is float or kind is int:
        return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    if issubclass(kind, tuple) and isinstance(value, tuple):
        if not arguments:
            return True
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return all(fits(item, arguments[0]) for item in value)
        return len(value) == len(arguments) and all(map(fits, value, arguments))
    if _is_open_protocol(kind) or not isinstance(value, kind):
        return False
    if isinstance(value, str):
        return kind in (str, object)  # text is a Sequence of text, and never what was meant
    if isinstance(value, Mapping) and len(arguments) == 2:
        return all(fits(key, arguments[0]) and fits(item, arguments[1]) for key, item in value.items())
    if isinstance(value, Sequence) and len(arguments) == 1:
        return all(fits(item, arguments[0]) for item in value)
    return True


def spell(annotation: Any) -> str:
    """The annotation as a reader would write it, without module names."""
    if annotation is EMPTY or annotation is Any:
        return "anything"
    if inspect.isclass(annotation) and not typing.get_args(annotation):
        return annotation.__name__
    return re.sub(r"\b\w+\.(?=\w)", "", str(annotation))
