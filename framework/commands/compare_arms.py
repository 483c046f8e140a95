"""The arms of a comparison: read from their configurations, and refused where comparing them would be unfair."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from framework.accounting import GroupCount
from framework.config.described import described
from framework.config.load import Configuration, load_config
from framework.config.registry import ConfigError
from framework.evaluation import HeldOut
from framework.interfaces import StreamingGenerator
from framework.rng import Streams
from framework.types import Scene

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Arm:
    """One configuration. clips_per_step: generated for training, siblings that explore nothing included.

    facts: what all arms must share, (what it is, the parameter that sets it) → its value.
    """

    name: str
    file: str
    gin_params: tuple[str, ...]
    plugins: tuple[str, ...]
    clips_per_step: int
    max_steps: int
    first_block: int
    captions: tuple[str, ...]
    facts: dict[tuple[str, str], Any] = field(repr=False)

    @property
    def words(self) -> list[str]:
        """The command-line arguments that give this configuration to `armillary train`."""
        words = ["--gin_file", self.file]
        for flag, values in (("--gin_param", (*self.gin_params, "train.threads = 1")), ("--plugin", self.plugins)):
            words += [word for value in values for word in (flag, value)]
        return words

    @property
    def judged_as(self) -> str:
        """The start and its evaluation in words; equal words mean equal clips and scores."""
        return "\n".join(f"{what}: {value}" for (what, _), value in self.facts.items())

    def operative_config(self, output_dir: str, seed: int, steps: int, device: str | None) -> str:
        """What the config.gin of a run of this arm says."""
        flags: dict[str, Any] = {"output_dir": output_dir, "max_steps": steps, "seed": seed}
        return self._load(flags if device is None else flags | {"device": device}).operative_config()

    def build(self) -> tuple[StreamingGenerator, HeldOut]:
        """A fresh generator, and how it is judged."""
        arguments = self._load({}).build()
        return arguments["generator"], arguments["evaluation"]

    def _load(self, flags: dict[str, Any]) -> Configuration:
        return load_config(
            "train", gin_files=[self.file], gin_params=[*self.gin_params, "train.threads = 1"], plugins=self.plugins,
            flags=flags,
        )  # fmt: skip


def read_arms(arms: Sequence[str], gin_params: Sequence[str] = (), plugins: Sequence[str] = ()) -> list[Arm]:
    """Build every arm once and read what it would do. Raises ConfigError for what is wrong with one, by its name."""
    pairs = [(name, file) if separator else (Path(text).stem, text)
             for text in arms for name, separator, file in [text.partition("=")]]  # fmt: skip
    names = [name for name, _ in pairs]
    for name in names:
        if not NAME.fullmatch(name):
            raise ConfigError(
                f"--arms: {name!r} is no name for an arm; NAME=FILE gives one of letters, digits, '_', '.', '-'"
            )
        if names.count(name) > 1:
            raise ConfigError(f"--arms: {names.count(name)} arms are called {name!r}; name them, as NAME=FILE")
    return [read_arm(name, file, gin_params, plugins) for name, file in pairs]


def read_arm(name: str, file: str, gin_params: Sequence[str] = (), plugins: Sequence[str] = ()) -> Arm:
    """One arm. Raises ConfigError that names it."""
    lines = (*gin_params, "train.threads = 1")
    try:
        configuration = load_config("train", gin_files=[file], gin_params=lines, plugins=plugins)
        arguments = configuration.build()
    except ConfigError as error:
        raise ConfigError(f"arm {name}: {error}") from error.__cause__
    evaluation: HeldOut = arguments["evaluation"]
    trained: tuple[Scene, ...] = arguments["scenes"].scenes()
    judged = evaluation.scenes.scenes()
    recipe = arguments["generator"].recipe
    plans = arguments["exploration"].plan(trained[:1], [0], recipe, Streams(0).at("compare"))
    defaults = configuration.bindings.part("train").parameters
    prompts, steps = (arguments.get(key, defaults[key].default) for key in ("prompts_per_step", "max_steps"))
    blocks = recipe.clip_blocks if evaluation.blocks is None else evaluation.blocks
    facts = {
        ("the generator", "train.generator"): described(configuration, "generator"),
        ("the training prompts", "train.scenes"): trained,
        ("the evaluation scenes", "evaluation.HeldOut.scenes"): judged,
        ("the evaluation's noises per scene", "evaluation.HeldOut.members"): evaluation.members,
        ("the judged blocks", "evaluation.HeldOut.blocks"): blocks,
        ("the first judged block", "evaluation.HeldOut.first_block"): evaluation.first_block,
        ("the evaluation noise", "evaluation.HeldOut.seed"): evaluation.seed,
        ("the evaluation reward", "evaluation.HeldOut.reward"): described(configuration, "evaluation", "reward"),
    }
    return Arm(
        name, file, tuple(gin_params), tuple(plugins), prompts * GroupCount.of(plans[0]).clips, steps,
        evaluation.first_block, tuple(scene.prompt for scene in judged), facts,
    )  # fmt: skip


def check_fair(arms: Sequence[Arm]) -> None:
    """Raises ValueError for the first of the facts that arms disagree in."""
    first = arms[0]
    for arm in arms[1:]:
        for (what, parameter), value in first.facts.items():
            other = arm.facts[what, parameter]
            if value != other:
                raise ValueError(f"arms {first.name} and {arm.name} cannot be compared, they differ in {what}: "
                                 f"{_short(value, other)} and {_short(other, value)}; set {parameter} alike, e.g. with "
                                 f"--gin_param")  # fmt: skip


def _short(value: Any, other: Any) -> str:
    """A value as a message shows it; of scenes their number, or where these agree the first that differs."""
    if isinstance(value, tuple) and isinstance(other, tuple):
        if len(value) != len(other):
            return f"{len(value)} scenes"
        value = next(one.key for one, two in zip(value, other, strict=True) if one != two)
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def check_budget(arms: Sequence[Arm], samples: int | None) -> dict[str, int]:
    """Steps per arm that generate ``samples`` training clips; None: what the arms ask for themselves.

    Raises ValueError when that is no whole number of steps of every arm, or when the arms ask for different numbers.
    """
    each = {arm.name: arm.clips_per_step for arm in arms}
    if samples is None:
        wanted = {arm.name: arm.clips_per_step * arm.max_steps for arm in arms}
        samples = next(iter(wanted.values()))
        different = next((name for name, clips in wanted.items() if clips != samples), None)
        if different is not None:
            common = math.lcm(*each.values())
            nearest = max(common, common * round(max(wanted.values()) / common))
            raise ValueError(f"the arms train on different numbers of clips ({arms[0].name} {samples}, {different} "
                             f"{wanted[different]}); give all the same with --samples, e.g. {nearest}")  # fmt: skip
    if samples < 1 or any(samples % clips for clips in each.values()):
        common = math.lcm(*each.values())
        fitting = sorted({max(common, samples // common * common), (max(samples, 0) // common + 1) * common})
        steps = ", ".join(f"{name} {clips}" for name, clips in each.items())
        raise ValueError(f"--samples {samples} is no whole number of steps of every arm (clips per step: {steps}); "
                         f"{' and '.join(map(str, fitting))} are")  # fmt: skip
    return {name: samples // clips for name, clips in each.items()}
