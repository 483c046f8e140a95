"""The parts that a gin file can name: who offers them, under which name, and what is said about them.

A name is what the entry-point group ``armillary.parts`` says. An entry ``nft = strategies.surrogates.nft`` offers the
public classes and functions of that module as ``nft.NFT``; an entry ``world.Shapes = package.module:Shapes`` offers
one object under exactly that name. A plugin module offers its own under its last component. Modules are imported when
one of their names is used, so a broken package that nobody names breaks nothing.
"""

import difflib
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from framework.config.signatures import Parameter, built_kind, read_parameters

GROUP = "armillary.parts"
INTERFACES = ("framework.interfaces", "framework.distillation_interfaces")
"""Where the extension points are."""
ROOTS = {
    "train": "framework.commands.train:train",
    "evaluate": "framework.commands.evaluate:evaluate",
    "generate": "framework.commands.generate:generate",
    "pretrain": "framework.commands.pretrain:pretrain",
    "distill": "framework.commands.distill:distill",
    "serve_rewards": "framework.commands.serve_rewards:serve_rewards",
    "score": "framework.commands.score:score",
    "claims": "framework.commands.claims:claims",
    "export": "framework.commands.export:export",
}
"""The commands: keyword-only functions that a configuration is bound to."""

RESERVED = ("gin", "plugins", *ROOTS)
FILLED_IN = "operative_config"
"""A root's parameter of this name is filled with the operative configuration and cannot be bound."""


def one_line(message: object) -> str:
    """A message or exception on one line; the name of an exception that says nothing."""
    lines = [line.strip() for line in str(message).splitlines()]
    return "; ".join(line for line in lines if line) or type(message).__name__


class ConfigError(ValueError):
    """Something that a user wrote in a configuration is wrong. The message is one line."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


@dataclass(frozen=True)
class Source:
    """Who offers a name. attribute: the one object behind it, None for a whole module."""

    name: str
    module: str
    attribute: str | None
    origin: str


@dataclass(frozen=True)
class Part:
    """Something a gin file can build. open: any keyword is accepted beside ``parameters``."""

    name: str
    target: Callable[..., Any]
    parameters: dict[str, Parameter] = field(repr=False)
    open: bool = False

    def parameter(self, name: str) -> Parameter:
        """Raises ConfigError naming the parameters there are."""
        if name in self.parameters:
            return self.parameters[name]
        if self.open:
            return Parameter(name, Any, None)
        there = ", ".join(self.parameters) or "none"
        raise ConfigError(
            f"{self.name} has no parameter {name!r}{did_you_mean(name, self.parameters)}; its parameters: {there}"
        )


def did_you_mean(name: str, existing: Iterable[str]) -> str:
    """A half sentence with the nearest existing names, or nothing. Only the last component may be what was written."""
    names = list(existing)
    near = [known for known in names if known.rsplit(".", 1)[-1] == name and known != name]
    last = {known.rsplit(".", 1)[-1]: known for known in names}
    near += difflib.get_close_matches(name, names, n=2, cutoff=0.7)
    near += [last[match] for match in difflib.get_close_matches(name.rsplit(".", 1)[-1], last, n=2, cutoff=0.75)]
    near = list(dict.fromkeys(near))[:3]
    return f"; did you mean {' or '.join(repr(match) for match in near)}?" if near else ""


def first_sentence(target: object) -> str:
    """What the docstring says first, on one line; empty where there is none of its own."""
    text = (target.__doc__ if inspect.isclass(target) else inspect.getdoc(target)) or ""
    if inspect.isclass(target) and text.startswith(f"{target.__name__}("):
        return ""  # the signature that a dataclass without a docstring gets
    paragraph = " ".join(inspect.cleandoc(text).split("\n\n")[0].split())
    end = r"(?<=[.!?])(?<!cf\.)(?<!vs\.)(?<!e\.g\.)(?<!i\.e\.)(?<!Eq\.)(?<!Sec\.) "
    return re.split(end, paragraph, maxsplit=1)[0]


def interface(target: Callable[..., Any]) -> type | None:
    """The abstract class that a part, or what a function says it returns, implements; None for anything else."""
    kind = built_kind(target)
    bases = () if kind is None else kind.__mro__[inspect.isclass(target) :]
    kinds = [base for base in bases if inspect.isabstract(base)]
    return next((base for base in kinds if base.__module__ in INTERFACES), kinds[0] if kinds else None)


class Registry:
    """Names and what they stand for, for one configuration."""

    def __init__(self) -> None:
        self.sources: dict[str, Source] = {}
        self.clashes: dict[str, tuple[Source, Source]] = {}
        self.plugins: list[Source] = []
        self.plugin_path: list[str] = []
        self._found: dict[str, Part] = {}
        for entry in importlib.metadata.entry_points(group=GROUP):
            distribution = entry.dist.name if entry.dist is not None else "an unnamed package"
            source = Source(entry.name, entry.module, entry.attr or None, distribution)
            known = self.sources.setdefault(entry.name, source)
            if (known.module, known.attribute) != (source.module, source.attribute):
                self.clashes[entry.name] = (known, source)

    def root(self, name: str) -> Part:
        """The function behind a command."""
        module, attribute = ROOTS[name].split(":")
        target = getattr(importlib.import_module(module), attribute)
        parameters, _ = read_parameters(target)
        return Part(name, target, {key: value for key, value in parameters.items() if key != FILLED_IN})

    def find(self, name: str) -> Part:
        """The part of that full name. Raises ConfigError with suggestions and the list of what exists."""
        if name not in self._found:
            self._found[name] = self.root(name) if name in ROOTS else self._part(name, self._object(name))
        return self._found[name]

    def _object(self, name: str) -> Any:
        components = name.split(".")
        for length in range(len(components), 0, -1):
            prefix, inner = ".".join(components[:length]), components[length:]
            source = self.sources.get(prefix)
            if source is None or (source.attribute is None) != bool(inner):
                continue
            self._refuse_clash(prefix)
            found: Any = self._import(source)
            for attribute in [source.attribute] if source.attribute else inner:
                if attribute.startswith("_") or attribute not in dir(found):
                    offered = sorted(_public(found)) if isinstance(found, ModuleType) else []
                    raise ConfigError(
                        f"unknown name {name!r}{did_you_mean(name, [f'{prefix}.{known}' for known in offered])}; "
                        f"{source.module} has: {', '.join(offered) or 'nothing of that name'}"
                    )
                found = getattr(found, attribute)
            return found
        known = sorted([*self.offered()[0], *ROOTS])
        hint = did_you_mean(name, known) or "; if it is yours, name its module or file with --plugin"
        raise ConfigError(f"unknown name {name!r}{hint}; names that exist: {', '.join(known)}")

    def _refuse_clash(self, name: str) -> None:
        if name in self.clashes:
            one, two = self.clashes[name]
            raise ConfigError(
                f"the name {name!r} is offered by both {one.origin} ({one.module}) and {two.origin} ({two.module}); "
                f"write `import {two.module} as another_name` in the gin file and use that name"
            )

    @staticmethod
    def _part(name: str, target: Any) -> Part:
        if not (inspect.isclass(target) or inspect.isroutine(target)):
            raise ConfigError(f"{name} is {type(target).__name__}, not a class or function that can be built")
        if inspect.isabstract(target):
            if interface(target) is not None:
                lacking = ", ".join(sorted(vars(target)["__abstractmethods__"]))
                raise ConfigError(f"{name} cannot be built: it does not define {lacking}")
            raise ConfigError(f"{name} is an interface and cannot be built; `armillary list` shows what implements it")
        return Part(name, target, *read_parameters(target))

    @staticmethod
    def _import(source: Source) -> ModuleType:
        try:
            return importlib.import_module(source.module)
        except Exception as error:  # anything can happen in a package of someone else
            raise ConfigError(
                f"{source.module} ({source.origin}) cannot be imported: {type(error).__name__}: {error}"
            ) from error

    def offered(self) -> tuple[dict[str, Part], list[str]]:
        """What `armillary list` shows, and why some sources could not be shown.

        Of a module: its concrete implementations of an interface. Of an object entry: the object.
        """
        parts: dict[str, Part] = {}
        broken: list[str] = []
        for source in self.sources.values():
            try:
                self._refuse_clash(source.name)
                if source.attribute is not None:
                    parts[source.name] = self.find(source.name)
                    continue
                members = _public(self._import(source))
                parts |= {
                    f"{source.name}.{key}": self.find(f"{source.name}.{key}")
                    for key, value in members.items()
                    if interface(value) is not None and not inspect.isabstract(value)
                }
            except ConfigError as error:
                broken.append(str(error))
        return parts, broken

    def search(self, folders: Iterable[str]) -> None:
        """Look for plugin modules in these folders too, after everything that is installed."""
        for folder in folders:
            place = str(Path(folder).resolve())
            if place not in self.plugin_path:
                self.plugin_path.append(place)
            if place not in sys.path:
                sys.path.append(place)

    def add_plugin(self, text: str) -> None:
        """``--plugin``: a module such as ``package.module``, or the path of a Python file."""
        if text.endswith(".py") or os.sep in text:
            file = Path(text)
            if not file.is_file():
                raise ConfigError(f"--plugin {text!r}: there is no such file")
            self.search([str(file.parent)])
            self.add_import(file.stem, file.stem)
            found = Path(self._import(self.sources[file.stem]).__file__ or "").resolve()
            if found != file.resolve():
                raise ConfigError(
                    f"--plugin {text!r}: the name {file.stem!r} means {found}; rename the file, or leave --plugin out "
                    "if that is the same part, installed"
                )
        else:
            self.add_import(text, text.rsplit(".", 1)[-1])

    def add_import(self, module: str, name: str) -> None:
        """Offer the parts of ``module`` as ``name.Part``. Raises ConfigError when the name is taken."""
        source = Source(name, module, None, "a plugin")
        known = self.sources.get(name)
        if known is not None and (known.module, known.attribute) == (module, None):
            return
        if (known is not None and name not in self.clashes) or name in RESERVED:
            taken = f"{known.module} (from {known.origin})" if known is not None else "armillary itself"
            raise ConfigError(
                f"plugin {module}: the name {name!r} is taken by {taken}; write `import {module} as another_name` in "
                "the gin file"
            )
        if importlib.util.find_spec(module.split(".")[0]) is None:
            self.search(["."])  # a console script does not look into the current folder by itself
        gone = [folder for folder in self.plugin_path if not Path(folder).is_dir()]
        try:
            imported = self._import(source)
        except ConfigError as error:
            hint = f"; plugins.path names {', '.join(gone)}, which does not exist" if gone else ""
            raise ConfigError(f"{error}{hint}") from error.__cause__
        if imported.__file__ is not None and _parent_folder(imported, imported.__file__) == Path.cwd().resolve():
            self.search(["."])
        self.sources[name] = source
        self.clashes.pop(name, None)
        self.plugins.append(source)

    def import_lines(self) -> list[str]:
        """The statements that make the plugins known again."""
        lines = [f"plugins.path = {self.plugin_path!r}"] if self.plugin_path else []
        for source in self.plugins:
            package, _, last = source.module.rpartition(".")
            if source.name == source.module:
                lines.append(f"import {source.module}")
            elif source.name == last:
                lines.append(f"from {package} import {last}")
            else:
                lines.append(f"import {source.module} as {source.name}")
        return lines


def _public(module: ModuleType) -> dict[str, Any]:
    """Classes and functions that a module defines itself, or in its own submodules."""
    return {
        key: value
        for key, value in vars(module).items()
        if not key.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and f"{value.__module__}.".startswith(f"{module.__name__}.")
    }


def _parent_folder(module: ModuleType, file: str) -> Path:
    """The folder that has to be searched to find the top-level package of a module."""
    is_package = module.__spec__ is not None and module.__spec__.submodule_search_locations is not None
    return Path(file).resolve().parents[module.__name__.count(".") + is_package]
