"""What `armillary claims` measures beside training: diversity, memory, transfer and speed on the embedded generator.

Every class is evidence for a row of configs/claims/; the measuring itself is that of the benchmark it names.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from backbones.embedded.generator import ShapesGenerator, packaged_generator
from benchmarks import group_spread
from benchmarks.long_memory import rows
from benchmarks.measure import alternate
from benchmarks.prompt_switch import SWITCH, turned
from benchmarks.streaming import stream
from framework.adapters import load_adaptation
from framework.claims import Evidence, Recipe
from framework.data.scenes import ShapesCaptions, ShapesSwitches
from framework.evaluation import HeldOut
from framework.interfaces import StreamingGenerator
from rewards.shapes import ShapesReward


def aligned(folder: Path) -> ShapesGenerator:
    """The packaged generator with what a run trained."""
    generator = packaged_generator()
    load_adaptation(generator.network, folder / "adapter")
    return generator


def merge_adapters(network: nn.Module) -> None:
    """Write adapters into the weights they stand beside and take them out: what is deployed."""
    for name, module in list(network.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()  # pyright: ignore[reportCallIssue]
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, module.get_base_layer())


@dataclass(frozen=True)
class GroupDiversity(Evidence):
    """How far the clips of a group lie apart: one way to explore minus another, behind the same prefixes.

    arm, baseline: of `benchmarks.group_spread`. feature: deviation within a group, in the unit its name says. captions,
    pivots, group: groups per seed and their size; every seed draws pivots, routes and noise of its own.
    """

    arm: str = "routing, all steps"
    baseline: str = "noise, behind the prefix"
    feature: str = "place, px"
    captions: int = 24
    pivots: int = 2
    group: int = 8

    def __post_init__(self) -> None:
        for name, value, known in (
            ("arm", self.arm, group_spread.ARMS),
            ("baseline", self.baseline, group_spread.ARMS),
            ("feature", self.feature, group_spread.FEATURES),
        ):
            if value not in known:
                raise ValueError(f"GroupDiversity.{name}={value!r} is none of {', '.join(map(repr, known))}")

    def effects(self, seed: int, runs: Mapping[str, Path]) -> Tensor:
        generator, reward = packaged_generator(), ShapesReward()
        column = group_spread.FEATURES.index(self.feature)
        arm, baseline = (
            group_spread.measure(
                group_spread.ARMS[name], self.captions, self.pivots, self.group, generator, reward, seed * self.pivots
            ).features[..., column]
            for name in (self.arm, self.baseline)
        )
        return arm - baseline


@dataclass(frozen=True)
class UpdateMemory(Evidence):
    """Peak live bytes of an update on a long stream: the thriftiest other way over clip and detached history.

    The ways are those of `benchmarks.long_memory`: loss on the whole sequence or on one clip, history attached or
    detached. length: blocks of a clip. factor: how many clips long the stream is. Bytes are counted: no interval.
    """

    exact: ClassVar[bool] = True

    length: int = 7
    factor: int = 10

    def effects(self, seed: int, runs: Mapping[str, Path]) -> Tensor:
        peaks = {(loss, reach): long for loss, reach, _, long, _ in rows(self.length, self.factor)}
        ours = peaks["clip", "detach"]
        others = [peaks[way] for way in (("sequence", "full"), ("sequence", "detach"), ("clip", "full"))]
        return torch.tensor([[min(others) / ours]], dtype=torch.float64)


@dataclass(frozen=True)
class LongGain(Evidence):
    """Held-out reward of the last window of long streams: what a run trained on short clips, minus its start.

    arm: gin file of the run. members: noises per caption. first_block: where the judged window of seven blocks starts.
    captions: at most so many of the held-out ones, None for all.
    """

    arm: str
    members: int = 4
    first_block: int = 28
    captions: int | None = None

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        return (Recipe("train", self.arm),)

    def effects(self, seed: int, runs: Mapping[str, Path]) -> Tensor:
        return self.judge(aligned(runs[self.arm])) - late_start(self)

    def judge(self, generator: StreamingGenerator) -> Tensor:
        """Mean of all signals [captions, members]."""
        scenes = ShapesCaptions(held_out=True, limit=self.captions)
        return HeldOut(scenes, ShapesReward(), self.members, first_block=self.first_block).judge(generator).total


@cache
def late_start(evidence: LongGain) -> Tensor:
    """What the packaged generator gets; equal for all seeds."""
    return evidence.judge(packaged_generator())


@dataclass(frozen=True)
class SwitchGain(Evidence):
    """Text alignment under the new prompt after a switch: what a run trained without switches, minus its start.

    As `benchmarks.prompt_switch` measures it. arm: gin file of the run. scenes: pairs of captions. members: noises.
    """

    arm: str
    scenes: int = 24
    members: int = 4

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        return (Recipe("train", self.arm),)

    def effects(self, seed: int, runs: Mapping[str, Path]) -> Tensor:
        return self.judge(aligned(runs[self.arm])) - switched_start(self)

    def judge(self, generator: ShapesGenerator) -> Tensor:
        """TA [scenes, members] of the frames after the switch under the new prompt."""
        return turned(generator, ShapesSwitches(SWITCH, limit=self.scenes).scenes(), self.members)["new"]


@cache
def switched_start(evidence: SwitchGain) -> Tensor:
    """What the packaged generator gets; equal for all seeds."""
    return evidence.judge(packaged_generator())


@dataclass(frozen=True)
class StreamingSpeed(Evidence):
    """Frames per core-second after alignment over those before, in alternating pairs.

    arm: gin file of the run. merged: adapters written into the weights, as deployed; otherwise beside them, as trained.
    clips, blocks: streamed at once, and how far. pairs: repetitions, which stand in the place of captions.
    """

    arm: str
    merged: bool = True
    clips: int = 8
    blocks: int = 10
    pairs: int = 12

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        return (Recipe("train", self.arm),)

    def effects(self, seed: int, runs: Mapping[str, Path]) -> Tensor:
        start, trained = packaged_generator(), aligned(runs[self.arm])
        if self.merged:
            merge_adapters(trained.network)
        before, after = (lambda g=g: stream(g, self.clips, self.blocks) for g in (start, trained))
        return torch.tensor(alternate(before, after, self.pairs).ratios, dtype=torch.float64).unsqueeze(1)
