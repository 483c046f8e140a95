"""What a configuration builds, in words that two configurations can be compared by: macros and defaults written out."""

from typing import Any

from framework.config.bindings import MACRO, SINGLETON, Reference, write_value
from framework.config.load import Configuration


def described(configuration: Configuration, *path: str) -> str:
    """What a parameter becomes, e.g. ``shapes.ShapesReward()``, whichever macros and scopes lead there.

    path: a parameter of the command, then one of the part that it is, and so on: ``"evaluation", "reward"``.
    Raises KeyError where a parameter on the way has no value, or one that is not a part.
    """
    scope, name = "", configuration.command
    for parameter in path[:-1]:
        value, scope = _value(configuration, scope, name, parameter)
        if not isinstance(value, Reference):
            raise KeyError(f"{name}.{parameter} is {value!r}, not a part")
        scope, name = value.scope or scope, value.name
    return _spelled(configuration, *_value(configuration, scope, name, path[-1]))


def _value(configuration: Configuration, scope: str, name: str, parameter: str) -> tuple[Any, str]:
    """(value of a parameter of a name in use, the scope it is built in); macros and singletons are what they hold."""
    key = configuration.reached.calls[scope, name].get(parameter)
    if key is None:
        known = configuration.bindings.part(name).parameters[parameter]
        if known.required:
            raise KeyError(f"{name}.{parameter} has no value")
        return known.default, scope
    value = configuration.bindings.table[key].value
    if isinstance(value, Reference) and value.name in (MACRO, SINGLETON):
        return _value(configuration, value.scope or scope, value.name, _only(value.name))
    return value, scope


def _spelled(configuration: Configuration, value: Any, scope: str) -> str:
    if isinstance(value, list | tuple):
        return f"({', '.join(_spelled(configuration, item, scope) for item in value)})"
    if isinstance(value, dict):
        pairs = [f"{_spelled(configuration, k, scope)}: {_spelled(configuration, v, scope)}" for k, v in value.items()]
        return "{" + ", ".join(pairs) + "}"
    if not isinstance(value, Reference):
        return write_value(value) or repr(value)
    inside = value.scope or scope
    if value.name in (MACRO, SINGLETON):
        return _spelled(configuration, *_value(configuration, inside, value.name, _only(value.name)))
    known, bound = configuration.bindings.part(value.name).parameters, configuration.reached.calls[inside, value.name]
    wanted = {p for p in known if p in bound or not known[p].required} | set(bound)
    pairs = [f"{p}={_spelled(configuration, *_value(configuration, inside, value.name, p))}" for p in sorted(wanted)]
    return f"{value.name}({', '.join(pairs)})"


def _only(name: str) -> str:
    """The one parameter of a macro or a singleton."""
    return "value" if name == MACRO else "constructor"
