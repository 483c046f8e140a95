"""Mutation of one function in place: its source is changed, compiled, and swapped under every name that holds it."""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from hypothesis import Phase, settings


@dataclass(frozen=True)
class Mutation:
    """A planted error and the property that must see it.

    name: what is wrong, in words. target: "module:qualified name" of a function, method or property. old, new: the
    text that is replaced; it must occur exactly once. killer: "module:test" or, for a theory check, "module" alone.
    arguments: of the test.
    """

    name: str
    target: str
    old: str
    new: str
    killer: str
    arguments: tuple[Any, ...] = ()


def function_at(target: str) -> Any:
    """The plain function behind "module:qualified name": of a property its getter, of a decorated one the innermost."""
    module, path = target.split(":")
    owner: Any = import_module(module)
    *classes, name = path.split(".")
    for step in classes:
        owner = getattr(owner, step)
    found = inspect.getattr_static(owner, name)
    found = found.fget if isinstance(found, property) else found
    found = found.__func__ if isinstance(found, staticmethod | classmethod) else found
    return inspect.unwrap(found)


@contextmanager
def mutated(target: str, old: str, new: str) -> Iterator[None]:
    """The function with a changed body. Raises ValueError unless ``old`` occurs exactly once in its source.

    The code object is swapped rather than a name: whoever imported the function before runs the changed one.
    """
    function = function_at(target)
    source = textwrap.dedent(inspect.getsource(function))
    if source.count(old) != 1:
        raise ValueError(f"{target} contains {old!r} {source.count(old)} times, a mutation needs it once")
    tree = ast.parse(source.replace(old, new))
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list = []
    definition.returns = None
    for argument in [*definition.args.args, *definition.args.kwonlyargs]:
        argument.annotation = None
    namespace: dict[str, Any] = dict(function.__globals__)
    exec(compile(tree, f"<mutated {target}>", "exec"), namespace)
    kept = function.__code__
    function.__code__ = namespace[definition.name].__code__
    try:
        yield
    finally:
        function.__code__ = kept


def run_property(killer: str, arguments: tuple[Any, ...] = ()) -> None:
    """Run a test, or a theory check; AssertionError where it does not hold."""
    if ":" not in killer:
        finding = import_module(killer).check()
        assert finding.residual <= finding.tolerance, f"{killer}: residual {finding.residual:.1e}"
        return
    module, name = killer.split(":")
    test: Callable[..., None] = getattr(import_module(module), name)
    hypothesis = getattr(test, "hypothesis", None)
    test = test if hypothesis is None else hypothesis.inner_test
    before = settings.get_current_profile_name()
    # a counterexample is enough, its smallest form is not needed
    settings.register_profile(
        "mutation", phases=[Phase.explicit, Phase.generate], database=None, derandomize=True,
        report_multiple_bugs=False,
    )  # fmt: skip
    settings.load_profile("mutation")
    try:
        test(*arguments)
    finally:
        settings.load_profile(before)
