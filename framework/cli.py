"""The command line. Imports nothing heavy until a command runs, so that ``--help`` answers at once."""

import argparse
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn

from framework import __version__
from framework.config.registry import ConfigError, Part, Registry, did_you_mean, first_sentence, interface, one_line
from framework.config.signatures import EMPTY, spell
from framework.interruption import Stopped

COMMANDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "train": (
        "align a streaming generator with a reward",
        ("output_dir", "max_steps", "seed", "device", "resume", "dry_run"),
    ),
    "evaluate": (
        "score a generator on held-out scenes with fixed noise",
        ("adapter", "vbench", "output_dir", "device"),
    ),
    "generate": (
        "write videos for prompts",
        ("prompts", "prompt_file", "image", "interactive", "blocks", "adapter", "output_dir", "seed", "device"),
    ),
    "pretrain": (
        "make a few-step streaming generator to start from",
        ("output_dir", "resume", "seed"),
    ),
    "distill": (
        "make a few-step student of a teacher on the student's own rollouts",
        ("output_dir", "max_steps", "seed", "device", "resume", "dry_run"),
    ),
    "export": (
        "write a trained adapter as diffusers reads it, with a model card",
        ("run", "output_dir", "merged"),
    ),
    "serve_rewards": (
        "offer a reward model to runs over HTTP",
        ("host", "port", "token_file"),
    ),
    "score": (
        "score video files with a reward and show what it likes",
        ("videos", "reward", "prompts", "prompt_file", "sort_by", "scale", "output_dir"),
    ),
    "claims": (
        "test the papers' claims at toy scale and print them as one table",
        ("output_dir", "only", "seeds", "parallel"),
    ),
}
"""What a command does, and the parameters of its function that have a flag of their own."""

FLAGS: dict[str, dict] = {
    "output_dir": {"metavar": "FOLDER", "help": "new folder for everything that is written"},
    "max_steps": {"metavar": "N", "type": int, "help": "stop after so many steps"},
    "seed": {"metavar": "N", "type": int, "help": "seed of everything random"},
    "device": {"metavar": "NAME", "help": "torch device, e.g. cpu or cuda"},
    "dry_run": {
        "action": "store_true",
        "help": "build and check everything, train one step, write nothing; --device meta: sizes alone",
    },
    "resume": {
        "nargs": "?",
        "const": "auto",
        "metavar": "auto|never|PATH",
        "help": "continue the unfinished run in output_dir (auto, the default), take a new folder only (never), or "
        "continue from a checkpoint or from the newest of a run",
    },
    "run": {"metavar": "FOLDER", "help": "folder of a finished training run; without --gin_file, its generator"},
    "merged": {"action": "store_true", "help": "also write the whole transformer with the adapter in its weights"},
    "adapter": {"metavar": "FOLDER", "help": "training run, its adapter, or exported LoRA weights to generate with"},
    "vbench": {"action": "store_true", "help": "also write all clips under the names that VBench's evaluator reads"},
    "prompts": {"metavar": "TEXT", "action": "append", "help": "what a video shows (repeatable)"},
    "prompt_file": {"metavar": "FILE", "help": "prompts or scenes, one a line (.txt, .jsonl) or row (.csv)"},
    "image": {"metavar": "FILE", "help": "picture or mp4 that the video goes on from"},
    "interactive": {"action": "store_true", "help": "read the next prompt from standard input while streaming"},
    "blocks": {"metavar": "N", "type": int, "help": "length in blocks"},
    "videos": {"metavar": "VIDEO", "nargs": "+", "help": "mp4 or anything else that FFmpeg reads"},
    "reward": {"metavar": "NAME", "help": "part to score with, e.g. shapes.ShapesReward (default: the file's REWARD)"},
    "sort_by": {"metavar": "SIGNAL", "help": "signal that the tables are sorted by (default: the reward's first)"},
    "scale": {"metavar": "N", "type": int, "help": "how many times the videos were enlarged (default: as they say)"},
    "only": {"metavar": "NAME", "action": "append", "help": "test this claim alone (repeatable)"},
    "seeds": {"metavar": "N", "type": int, "help": "runs of everything that is compared"},
    "parallel": {"metavar": "N", "type": int, "help": "runs at a time, one thread each"},
    "host": {"metavar": "ADDRESS", "help": "who can reach it (default 127.0.0.1: this machine alone)"},
    "port": {"metavar": "N", "type": int, "help": "port to listen on (default 8100)"},
    "token_file": {"metavar": "FILE", "help": "file whose text every client has to bring"},
}

POSITIONAL = ("videos",)
"""Parameters that are given without a flag."""

OTHER_SPELLINGS = {("score", "prompt_file"): ("--prompts",)}
"""Flags of a command that mean the same."""

FIRST_FILES = {"score": "score.gin"}
"""The packaged configuration that a command reads before any ``--gin_file``."""

DEFAULT_FILES = {"claims": "claims.gin"}
"""The packaged configuration of a command that runs without a ``--gin_file``."""

COMPARE_FLAGS = ("arms", "output_dir", "seeds", "samples", "parallel", "device")
"""Parameters of `compare` that have a flag of their own."""

DOCTOR_FLAGS = ("output_dir", "device")
"""Parameters of `doctor` that have a flag of their own."""

PACKAGES = ("framework", "strategies", "backbones", "rewards", "configs")


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line on one line."""

    def error(self, message: str) -> NoReturn:
        print(f"armillary: error: {message} ({self.prog} --help shows what there is)", file=sys.stderr)
        raise SystemExit(2)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(
        prog="armillary",
        description="Preference alignment of streaming autoregressive video generators.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"armillary {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (purpose, flags) in COMMANDS.items():
        words = {"help": purpose, "description": purpose, "aliases": [name] if "_" in name else []}
        command = commands.add_parser(name.replace("_", "-"), allow_abbrev=False, **words)
        command.add_argument(
            "--gin_file",
            action="append",
            default=[],
            metavar="FILE",
            help="configuration, packaged or yours (repeatable)",
        )
        command.add_argument(
            "--gin_param", "--gin_bindings", action="append", default=[], metavar="BINDING",
            help='one gin line that overrides the files, e.g. "nft.NFT.beta = 0.5" (repeatable)',
        )  # fmt: skip
        command.add_argument(
            "--plugin",
            action="append",
            default=[],
            metavar="MODULE",
            help="module or .py file with parts of yours (repeatable)",
        )
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        for parameter in flags:
            if parameter in POSITIONAL:
                command.add_argument(parameter, **FLAGS[parameter])
                continue
            spellings = [flag_of(parameter), *OTHER_SPELLINGS.get((name, parameter), ())]
            command.add_argument(*spellings, dest=parameter, default=None, **FLAGS[parameter])
    add_compare(commands)
    add_doctor(commands)
    listing = commands.add_parser("list", help="show the parts and the packaged configurations", allow_abbrev=False)
    what = listing.add_mutually_exclusive_group()
    what.add_argument("name", nargs="?", help="show one part with its parameters, e.g. nft.NFT")
    what.add_argument("--compat", action="store_true", help="show which parts fit together, and why the others do not")
    listing.add_argument(
        "--plugin", action="append", default=[], metavar="MODULE", help="show the parts of this module too"
    )
    listing.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def add_compare(commands: "argparse._SubParsersAction[_Parser]") -> None:
    """The one command that is configured by several files at once, and so by flags alone."""
    purpose = "train several configurations with several seeds and report them side by side"
    compare = commands.add_parser("compare", help=purpose, description=purpose, allow_abbrev=False)
    compare.add_argument(
        "--arms", nargs="+", required=True, metavar="FILE",
        help="configurations of `armillary train`, packaged or yours; NAME=FILE names an arm",
    )  # fmt: skip
    compare.add_argument(
        "--output_dir", required=True, metavar="FOLDER", help="folder of all runs; finished ones are kept"
    )
    compare.add_argument("--seeds", type=int, default=3, metavar="N", help="runs per arm (default 3)")
    compare.add_argument("--samples", type=int, metavar="N", help="training clips of every run")
    compare.add_argument("--parallel", type=int, default=1, metavar="N", help="runs at a time, one thread each")
    compare.add_argument("--device", default="cpu", metavar="NAME", help="torch device, e.g. cpu or cuda")
    compare.add_argument(
        "--gin_param", "--gin_bindings", action="append", default=[], metavar="BINDING",
        help="one gin line for every arm (repeatable)",
    )  # fmt: skip
    compare.add_argument(
        "--plugin", action="append", default=[], metavar="MODULE", help="module or .py file with parts of yours"
    )
    compare.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_doctor(commands: "argparse._SubParsersAction[_Parser]") -> None:
    """The one command that runs with a configuration of another, and without any."""
    purpose = "check this machine, and what training with a configuration would take"
    check = commands.add_parser("doctor", help=purpose, description=purpose, allow_abbrev=False)
    check.add_argument(
        "--gin_file", action="append", default=[], metavar="FILE", help="configuration of `armillary train`"
    )
    check.add_argument(
        "--gin_param", "--gin_bindings", action="append", default=[], metavar="BINDING",
        help="one gin line that overrides the files (repeatable)",
    )  # fmt: skip
    check.add_argument(
        "--plugin", action="append", default=[], metavar="MODULE", help="module or .py file with parts of yours"
    )
    check.add_argument("--output_dir", metavar="FOLDER", help="where a run would write (default runs/)")
    check.add_argument("--device", default="cpu", metavar="NAME", help="torch device, e.g. cpu or cuda")
    check.add_argument("--debug", action="store_true", help="show the traceback of an error")


def run_doctor(options: argparse.Namespace) -> int:
    """Print what the machine and a configuration need. Raises ValueError where torch itself cannot be loaded."""
    try:
        from framework.commands.doctor import doctor
    except Exception as error:  # a broken installation fails at import, with any kind of error
        raise ValueError(
            f"armillary cannot be loaded: {type(error).__name__}: {one_line(error)}; install it again into a fresh "
            f"environment"
        ) from error
    flags = {name: getattr(options, name) for name in DOCTOR_FLAGS}
    return doctor(**flags, gin_files=options.gin_file, gin_params=options.gin_param, plugins=options.plugin)


def run_compare(options: argparse.Namespace) -> None:
    """Train, judge and report the arms."""
    from framework.commands.compare import compare

    flags = {name: getattr(options, name) for name in COMPARE_FLAGS}
    compare(**flags, gin_params=options.gin_param, plugins=options.plugin)


def flag_of(parameter: str) -> str:
    """The flag that binds a parameter of a command."""
    return "--prompt" if parameter == "prompts" else f"--{parameter}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns 0, 2 for a wrong configuration or command line, 1 for a failure, 130 for Ctrl-C and 143
    for SIGTERM.

    What a user can cause is one line on stderr; ``--debug`` shows the traceback as well.
    """
    parser = build_parser()
    options, unknown = parser.parse_known_args(argv)
    options.command = options.command.replace("-", "_")
    if unknown:
        own = {"compare": COMPARE_FLAGS, "doctor": DOCTOR_FLAGS}
        flags = own[options.command] if options.command in own else COMMANDS.get(options.command, ("", ()))[1]
        known = ["--gin_file", "--gin_param", "--plugin", "--debug"]
        known += [flag_of(parameter) for parameter in flags if parameter not in POSITIONAL]
        near = did_you_mean(unknown[0].split("=")[0], known)
        parser.error(f"{options.command}: unrecognized argument {unknown[0]!r}{near}")
    try:
        refuse_shadowed_packages()
        refuse_several_ranks(options.command)
        if options.command == "list":
            show_list(options.name, options.plugin, options.compat)
        elif options.command == "compare":
            run_compare(options)
        elif options.command == "doctor":
            return run_doctor(options)
        else:
            run_command(options)
        return 0
    except Stopped as stopped:
        print(f"armillary: {stopped}", file=sys.stderr)
        return stopped.exit_code
    except KeyboardInterrupt:
        print("armillary: interrupted", file=sys.stderr)
        return 130
    except ConfigError as error:
        return _report(error, 2, options.debug)
    except BrokenPipeError:  # the reader, e.g. `head`, has seen enough
        sys.stdout = None
        return 141
    except (ValueError, OSError, FloatingPointError) as error:
        return _report(error, 1, options.debug)


def run_command(options: argparse.Namespace) -> None:
    """Read the configuration of a command and run it."""
    from framework.config.bindings import Reference
    from framework.config.load import load_config

    files = options.gin_file or [DEFAULT_FILES[name] for name in (options.command,) if name in DEFAULT_FILES]
    params = list(options.gin_param)
    if options.command == "export" and not files:
        if options.run is None:
            raise ConfigError("export needs --run, the folder of a finished run of `armillary train`")
        from framework.commands.export import generator_of_run

        files, lines = generator_of_run(options.run)
        params = [*lines, *params]
    if options.command == "score" and not (files or params or options.reward):
        raise ConfigError("score needs --reward, the name of a part, or a --gin_file with a REWARD, as for training")
    files = [FIRST_FILES[name] for name in (options.command,) if name in FIRST_FILES] + list(files)
    if not files and not params:
        raise ConfigError(f"{options.command} needs a --gin_file; `armillary list` shows the packaged ones")
    flags = {name: getattr(options, name) for name in COMMANDS[options.command][1]}
    given = {
        name: tuple(value) if isinstance(value, list) else value for name, value in flags.items() if value is not None
    }
    if "reward" in given:
        given["reward"] = Reference("", str(given["reward"]), True)
    configuration = load_config(
        options.command,
        gin_files=files,
        gin_params=params,
        plugins=options.plugin,
        flags=given,
    )
    from framework.devices import META, sizes_only

    with sizes_only() if given.get("device") == META else nullcontext():
        configuration.run()


def _report(error: Exception, code: int, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exception(error)
    hint = "" if debug or code == 2 else " (--debug shows where)"
    print(f"armillary: error: {one_line(error)}{hint}", file=sys.stderr)
    return code


def refuse_several_ranks(command: str) -> None:
    """Started by torchrun, other commands than ``train`` would write the same files several times."""
    ranks = os.environ.get("WORLD_SIZE", "1")
    if command != "train" and ranks != "1":
        raise ConfigError(f"{command} is one process and was started as {ranks}; start it without torchrun")


def refuse_shadowed_packages() -> None:
    """With ``python -m``, a file of the current folder can stand before an armillary package of the same name."""
    home = Path(__file__).resolve().parent.parent
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve() if spec is not None and spec.origin is not None else None
        if found is None or not found.is_relative_to(home / name):
            raise ConfigError(f"armillary needs its package {name!r} but finds {found}; rename that file or folder")


def show_list(name: str | None, plugins: Sequence[str], compat: bool = False) -> None:
    """Print the parts by the interface they implement, one part with its parameters, or which parts fit together."""
    registry = Registry()
    for plugin in plugins:
        registry.add_plugin(plugin)
    if name is not None:
        part = registry.find(name)
        print(f"{part.name}\n\n{(part.target.__doc__ or '').strip()}\n")
        for parameter in part.parameters.values():
            default = "required" if parameter.default is EMPTY else f"default {parameter.default!r}"
            print(f"  {part.name}.{parameter.name}: {spell(parameter.annotation)} ({default})")
        return
    parts, broken = registry.offered()
    if compat:
        from framework.compatibility_table import compatibility_table

        print(compatibility_table(parts))
    else:
        show_parts(parts)
    for problem in broken:
        print(f"armillary: warning: {problem}", file=sys.stderr)


def show_parts(parts: Mapping[str, Part]) -> None:
    """Print parts by the interface they implement, and the packaged configurations."""
    from framework.config.load import packaged_configs

    groups: dict[str, list[str]] = {}
    width = max((len(part) for part in parts), default=0)
    for part in sorted(parts):
        kind = interface(parts[part].target)
        title = f"{kind.__name__}: {first_sentence(kind)}" if kind is not None else "Other parts"
        groups.setdefault(title, []).append(f"  {part:<{width}}  {first_sentence(parts[part].target)}".rstrip())
    for title in sorted(groups, key=lambda title: (title == "Other parts", title)):
        print("\n".join([title, *groups[title], ""]))
    print("\n".join(["Packaged configurations (--gin_file)", *(f"  {path}" for path in packaged_configs())]))
