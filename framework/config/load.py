"""The only place that talks to gin: reads gin files, checks what they say, builds what they describe.

    configuration = load_config("train", gin_files=["embedded/nft.gin"], flags={"output_dir": "runs/a"})
    configuration.run()

Names are written in full, ``@nft.NFT()``; see `framework.config.registry` for where they come from. Everything that a
user can get wrong raises `ConfigError` with one line. No gin state outlives a call.
"""

import functools
import importlib.resources
import inspect
import io
import re
import tokenize
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gin import config as gin
from gin import config_parser

from framework.config.bindings import (
    BUILTIN,
    MACRO,
    REQUIRED,
    SINGLETON,
    Bindings,
    Key,
    Reached,
    Reference,
    write_operative,
)
from framework.config.registry import FILLED_IN, ROOTS, ConfigError, Part, Registry, did_you_mean, one_line

__all__ = ["ConfigError", "Configuration", "load_config", "packaged_configs", "packaged_folder"]

COMMAND = "armillary.command."
"""Prefix of a command's name in gin, which also matches endings such as those of a plugin's own ``x.train``."""
LATER = "armillary.later."
"""Prefix of what a reference without parentheses means: the part with its configured arguments, not yet called. Gin
itself would read the arguments at each call, when bindings and scopes may be gone."""


def packaged_folder() -> Path:
    """Where the gin files of the installed package are."""
    return Path(str(importlib.resources.files("configs")))


def packaged_configs() -> list[str]:
    """The packaged gin files, as ``--gin_file`` takes them."""
    folder = packaged_folder()
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.gin"))


class _Delegate(config_parser.ParserDelegate):
    """References as written; what they mean is looked up when they are bound."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Any:
        scope, _, name = scoped_configurable_name.rpartition("/")
        return Reference(scope, name, evaluate)

    def macro(self, macro_name: str) -> Any:
        return REQUIRED if macro_name == "gin.REQUIRED" else Reference(macro_name, MACRO, True)


class _Reader:
    """Fills a table of bindings from files and lines. Every file is read once, however often it is included."""

    def __init__(self, bindings: Bindings) -> None:
        self.bindings = bindings
        self.seen: set[Path] = set()
        self.open: list[Path] = []  # files that are being read, the includer before what it includes

    def read_file(self, name: str, includer: Path | None = None, where: str = "--gin_file") -> None:
        """Read a file and what it includes. Looked for beside the including file, among the packaged files and in the
        current folder; a file of the command line first in the current folder."""
        packaged, here = packaged_folder(), Path.cwd()
        folders = [here, packaged] if includer is None else [includer.parent, packaged, here]
        found = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if found is None:
            known = packaged_configs()
            raise ConfigError(
                f"{where}: there is no file {name!r} in {' or '.join(map(str, dict.fromkeys(folders)))}"
                f"{did_you_mean(name, known)}; `armillary list` shows the packaged files"
            )
        path = found.resolve()
        if path in self.open:
            loop = " → ".join(file.name for file in (*self.open[self.open.index(path) :], path))
            raise ConfigError(f"{where}: {name!r} includes itself: {loop}; remove one include")
        if path in self.seen:
            return
        self.seen.add(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{where}: {name} cannot be read: {one_line(error)}") from error
        inside = path.relative_to(packaged.resolve()) if path.is_relative_to(packaged.resolve()) else None
        self.open.append(path)
        self.read_text(text, name if inside is None else inside.as_posix(), path)
        self.open.pop()

    def read_text(self, text: str, source: str, path: Path | None = None) -> None:
        """Read statements. ``source`` names them in messages; ``path`` is the file they stand in, if any."""
        statements = self._parse(text, source)
        while True:
            try:
                statement = next(statements)
            except StopIteration:
                return
            except (SyntaxError, tokenize.TokenError) as error:
                raise ConfigError(self._unreadable(error, source)) from error
            where = f"{source}:{statement.location.line_num}" if path is not None else source
            if isinstance(statement, config_parser.BindingStatement):
                self._bind(statement, where)
            elif isinstance(statement, config_parser.IncludeStatement):
                self.read_file(statement.filename, path, where)
            elif isinstance(statement, config_parser.ImportStatement):
                self._import(statement, where)

    @staticmethod
    def _parse(text: str, source: str) -> config_parser.ConfigParser:
        try:
            return config_parser.ConfigParser(io.StringIO(text), _Delegate())
        except (SyntaxError, tokenize.TokenError) as error:
            raise ConfigError(_Reader._unreadable(error, source)) from error

    @staticmethod
    def _unreadable(error: SyntaxError | tokenize.TokenError, source: str) -> str:
        line = error.lineno if isinstance(error, SyntaxError) else error.args[1][0]
        text = (error.text or "").strip() if isinstance(error, SyntaxError) else ""
        # what Python adds about a node of its syntax tree is an address in memory
        reason = re.sub(r"malformed node or string[^;]*(; )?", "", one_line(error.args[0])) or "no literal"
        where = f"{source}:{line}" if not source.startswith("--") else source
        return (
            f"{where}: cannot read {text!r} ({reason}); values are Python literals such as True, None, 1e-5, 'text', "
            "(1, 2), references such as @nft.NFT() and macros such as %NAME; there is no arithmetic"
        )

    def _bind(self, statement: config_parser.BindingStatement, where: str) -> None:
        if not statement.arg_name:
            name = f"{statement.scope}/{statement.selector}" if statement.scope else statement.selector
            self.bindings.set(Key(name, MACRO, "value"), statement.value, where)
        elif statement.selector == "plugins":
            folders = statement.value
            if statement.arg_name != "path" or not isinstance(folders, list | tuple):
                raise ConfigError(f"{where}: only plugins.path = ['folder', …] can be set")
            self.bindings.registry.search(map(str, folders))
        else:
            self.bindings.set(Key(statement.scope, statement.selector, statement.arg_name), statement.value, where)

    def _import(self, statement: config_parser.ImportStatement, where: str) -> None:
        if statement.module.startswith("__gin__."):
            return  # names are always looked up as if this were written
        name = statement.alias or (statement.module.rsplit(".", 1)[-1] if statement.is_from else statement.module)
        try:
            self.bindings.registry.add_import(statement.module, name)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error.__cause__


def load_config(
    command: str,
    *,
    gin_files: Sequence[str] = (),
    gin_params: Sequence[str] = (),
    plugins: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> "Configuration":
    """Read and check a configuration; nothing is built yet.

    Later files, then ``gin_params`` (single gin lines), then ``flags`` (parameters of the command) win. Raises
    ConfigError for everything that is wrong with it, bindings that nothing uses included.
    """
    registry = Registry()
    bindings = Bindings(registry)
    reader = _Reader(bindings)
    for plugin in plugins:
        registry.add_plugin(plugin)
    for name in gin_files:
        reader.read_file(name)
    for line in gin_params:
        reader.read_text(line, f"--gin_param {line!r}")
    for parameter, value in (flags or {}).items():
        bindings.set(Key("", command, parameter), value, f"--{parameter}")
    reached = bindings.reach(command)
    bindings.check(command, reached)
    bound = {key.name for key in bindings.table}
    others = {root: bindings.reach(root) for root in ROOTS if root != command and root in bound}
    unused = bindings.unused(command, reached, others)
    if unused is not None:
        raise ConfigError(unused)
    return Configuration(command, bindings, reached, tuple(others.values()))


@dataclass(frozen=True)
class Configuration:
    """A checked configuration of one command."""

    command: str
    bindings: Bindings
    reached: Reached
    others: tuple[Reached, ...]

    def operative_config(self) -> str:
        """A gin file that gives this run again, with plugins and with the defaults that were taken."""
        return write_operative(self.bindings, self.command, self.reached, self.others)

    def build(self) -> dict[str, Any]:
        """The arguments of the command, built by gin. Raises ConfigError when a part refuses its values."""
        failures: list[ConfigError] = []
        gin.clear_config()
        try:
            with gin.interactive_mode():  # parts of an earlier configuration may have had the same names
                for name in {name for _, name in self.reached.calls} - {*BUILTIN, self.command}:
                    part = self.bindings.part(name)
                    later = functools.partial(functools.partial, part.target)
                    _register(name, _stand_in(part, part.target, failures))
                    _register(LATER + name, _stand_in(part, later, failures))
                command = self.bindings.part(self.command)
                arguments = _register(COMMAND + self.command, _stand_in(command, dict, failures))
            for key in self.reached.used:
                value = _for_gin(self.bindings.table[key].value, key.name)
                names = [COMMAND + key.name] if key.name == self.command else [key.name, LATER + key.name]
                for name in names[:1] if key.name in BUILTIN else names:
                    gin.bind_parameter((key.scope, name, key.parameter), value)
            gin.finalize()
            return arguments()
        except ConfigError as error:  # gin raises a proxy with lines of its own appended
            plain = failures[-1] if failures else error
            raise plain from plain.__cause__
        finally:
            gin.clear_config()

    def run(self) -> Any:
        """Build the arguments and call the command outside of gin."""
        target = self.bindings.part(self.command).target
        arguments = self.build()
        if FILLED_IN in inspect.signature(target).parameters:
            arguments[FILLED_IN] = self.operative_config()
        return target(**arguments)


def _for_gin(value: Any, holder: str) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_for_gin(item, holder) for item in value)
    if isinstance(value, dict):
        return {key: _for_gin(item, holder) for key, item in value.items()}
    if isinstance(value, Reference):
        scope = f"{value.scope}/" if value.scope else ""
        if value.called or holder == SINGLETON:
            return gin.ConfigurableReference(f"{scope}{value.name}", value.called)
        return gin.ConfigurableReference(f"{scope}{LATER}{value.name}", True)
    return value


def _register(name: str, target: Callable[..., Any]) -> Callable[..., Any]:
    module, _, last = name.rpartition(".")
    return gin.external_configurable(target, name=last, module=module)


def _stand_in(part: Part, target: Callable[..., Any], failures: list[ConfigError]) -> Callable[..., Any]:
    """A function with the parameters of ``part`` that calls ``target``. Gin wraps it, so parts stay plain classes."""

    def build(**arguments: Any) -> Any:
        try:
            return target(**arguments)
        except Exception as error:
            kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
            failures.append(ConfigError(f"{part.name}: {kind}{one_line(error)}"))
            raise failures[-1] from error

    build.__signature__ = inspect.signature(part.target)  # pyright: ignore[reportFunctionMemberAccess]
    return build
