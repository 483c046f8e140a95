"""How far the clips of a group lie apart, and in what: noise exploration against routed history, embedded generator.

    python -m benchmarks.group_spread [--captions 24] [--pivots 4] [--group 8] [--output FILE]

All arms share captions, pivots and, but for the first, prefixes. Rewards are those of the window. What separates two
clips of a group is taken off step by step, each share a part of their mean squared pixel difference D:

    place        D minus what is left when one clip is moved by one offset on the torus
    trajectory   what moving every frame by its own offset takes off beyond that
    brightness   what giving both clips the same energy takes off beyond that
    rest         what is left: shape, colour, blur, noise

Beside the shares, the deviation within a group of what was located and fitted: place, velocity, unsteadiness,
brightness, size, hue, and the error against the best clean object.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from backbones.embedded.generator import packaged_generator
from framework.data.scenes import ShapesCaptions
from framework.data.shapes import BACKGROUND, SIZE, wrap
from framework.evaluation import decode_tape
from framework.interfaces import GeneratorRecipe, RewardModel, StreamingGenerator
from framework.kernels import Consistency
from framework.reporting.report import markdown_table
from framework.reporting.statistics import clustered_bootstrap
from framework.rng import Streams, derive_seed
from framework.rollout import roll_out
from framework.types import GroupPlan, VideoBatch
from rewards.shapes import ShapesReward, analyse, locate
from strategies.exploration.causal_history_routing import CausalHistoryRouting

ROUTING = CausalHistoryRouting(routed_frames=3, routed_blocks=3, tail_blocks=2, stream_blocks=14, steps=(True,) * 4)
"""Three routed blocks of nine visible frames, two blocks after them, as embedded/kvpo.gin has it."""
FIRST_HALF = replace(ROUTING, routed_frames=5, recent=1, steps=None, clean_write=True)
"""As embedded/kvpo_first_half.gin has it: nine visible frames too."""


@dataclass(frozen=True)
class Arm:
    """A way to explore. noise: branches have noise of their own and no route. from_start: there is no prefix."""

    routing: CausalHistoryRouting = ROUTING
    noise: bool = False
    from_start: bool = False


ARMS: Mapping[str, Arm] = {
    "noise, from the first frame": Arm(noise=True, from_start=True),
    "noise, behind the prefix": Arm(noise=True),
    "routing, all steps": Arm(),
    "routing, all steps and the clean write": Arm(replace(ROUTING, clean_write=True)),
    "routing, first half": Arm(replace(ROUTING, steps=None)),
    "routing, first half, 5 own + 1 recent": Arm(replace(FIRST_HALF, clean_write=False)),
    "routing, first half and the clean write": Arm(replace(ROUTING, steps=None, clean_write=True)),
    "routing, first half and the clean write, 5 own + 1 recent": Arm(FIRST_HALF),
    "routing, first half and the clean write, 6 own + 0 recent": Arm(replace(FIRST_HALF, routed_frames=6, recent=0)),
}
SEED = 20260


# What two clips differ in


def moved(image: Tensor, offset: Tensor) -> Tensor:
    """Images [..., 3, SIZE, SIZE] moved on the torus by offsets [..., 2] (x, y) in pixels, by their phases."""
    frequency = 2 * torch.pi * torch.fft.fftfreq(SIZE).to(offset)
    phase = -(frequency * offset[..., 0:1]).unsqueeze(-2) - (frequency * offset[..., 1:2]).unsqueeze(-1)
    turn = torch.polar(torch.ones_like(phase), phase).unsqueeze(-3)
    return torch.fft.ifft2(torch.fft.fft2(image) * turn).real


@dataclass(frozen=True)
class Clips:
    """Clips [G, T] of one group as analysis sees them. light: pixels without the background, [G, T, 3, SIZE, SIZE]."""

    light: Tensor
    centre: Tensor  # [G, T, 2] pixels

    @classmethod
    def of(cls, videos: Tensor) -> "Clips":
        """From uint8 frames [G, T, 3, SIZE, SIZE]."""
        light = videos.float() / 127.5 - 1 - (2 * BACKGROUND - 1)
        return cls(light, locate(light.square().sum(2)))


def circular_mean(offset: Tensor) -> Tensor:
    """Mean of offsets [..., T, 2] on the torus → [..., 2]."""
    angle = offset * (2 * torch.pi / SIZE)
    return torch.atan2(angle.sin().mean(-2), angle.cos().mean(-2)) * (SIZE / (2 * torch.pi))


def taken_apart(clips: Clips) -> Tensor:
    """[4] mean squared pixel difference over all pairs: at all, after place, after trajectory, after brightness."""
    i, j = torch.triu_indices(len(clips.light), len(clips.light), 1)
    left, right = clips.light[i], clips.light[j]
    offset = wrap(clips.centre[i] - clips.centre[j])
    place = circular_mean(offset).unsqueeze(-2).expand_as(offset)
    followed = moved(right, offset)
    scale = (left.square().sum((1, 2, 3, 4)) / followed.square().sum((1, 2, 3, 4)).clamp(min=1e-9)).sqrt()
    versions = (right, moved(right, place), followed, followed * scale[:, None, None, None, None])
    return torch.stack([(left - version).square().mean() for version in versions])


def deviation(values: Tensor) -> Tensor:
    """Root mean square distance of clips [G, …] from their mean, over all dimensions but the first."""
    return (values - values.mean(0)).square().reshape(len(values), -1).sum(1).mean().sqrt()


def deviations(clips: Clips) -> Tensor:
    """Within-group deviations in the order of `FEATURES` [7]."""
    i, j = torch.triu_indices(len(clips.light), len(clips.light), 1)
    velocity = wrap(clips.centre[:, 1:] - clips.centre[:, :-1])
    energy = clips.light.square().sum(2)
    place = wrap(torch.arange(SIZE) - clips.centre[..., None])  # [G, T, 2, SIZE]
    radius = (energy.sum(-2) * place[:, :, 0].square()).sum(-1) + (energy.sum(-1) * place[:, :, 1].square()).sum(-1)
    size = (radius / energy.sum((-1, -2)).clamp(min=1e-9)).sqrt()
    colour = torch.nn.functional.normalize(clips.light.sum((1, 3, 4)), dim=1)
    angle = (colour[i] * colour[j]).sum(1).clamp(-1, 1).acos()
    pairs = wrap(clips.centre[i] - clips.centre[j]).square().sum(-1).mean()
    of_pairs = (len(clips.light) - 1) / (2 * len(clips.light))  # Σ_{i<j} |x_i − x_j|² = G Σ_i |x_i − mean|²
    steadiness = (velocity[:, 1:] - velocity[:, :-1]).norm(dim=-1).mean(1)
    brightness = clips.light.square().mean((1, 2, 3, 4)).sqrt()
    error = analyse(clips.light + 2 * BACKGROUND - 1).error.amin(-1).mean(1)
    return torch.stack([
        (of_pairs * pairs).sqrt(), deviation(velocity.mean(1)), deviation(steadiness),
        deviation(brightness) / brightness.mean(), deviation(size.mean(1)),
        (of_pairs * angle.square().mean()).sqrt().rad2deg(), deviation(error),
    ])  # fmt: skip


FEATURES = (
    "place, px", "velocity, px/frame", "unsteadiness, px/frame²", "brightness, relative", "size, px", "hue, °",
    "error against the best object",
)  # fmt: skip


# The arms


def plans_of(arm: Arm, captions: int, group: int, pivot: int, recipe: GeneratorRecipe) -> list[GroupPlan]:
    """One group per held-out caption at the pivot of this number; arms with a prefix have the same one."""
    scenes = ShapesCaptions(held_out=True, limit=captions).scenes()
    routing = replace(arm.routing, group_size=group)
    plans = routing.plan(scenes, range(len(scenes)), recipe, Streams(SEED).at("pivot", pivot))

    def own_noise(plan: GroupPlan) -> GroupPlan:
        branches = tuple(
            branch if branch.anchor else replace(branch, route=None, noise_seed=derive_seed(branch.noise_seed, b))
            for b, branch in enumerate(plan.branches)
        )
        return replace(plan, branches=branches, first_block=0 if arm.from_start else plan.first_block)

    return [own_noise(plan) for plan in plans] if arm.noise else list(plans)


@dataclass(frozen=True)
class Spread:
    """What an arm gave, per caption and pivot [C, M]. rewards: by signal [C, M, G + 1], the anchor last."""

    rewards: dict[str, Tensor]
    parts: Tensor  # [C, M, 4]
    features: Tensor  # [C, M, 7]

    @property
    def signals(self) -> dict[str, Tensor]:
        """Rewards with their mean as "total"."""
        return {"total": torch.stack(list(self.rewards.values())).mean(0), **self.rewards}


@torch.no_grad()
def measure(
    arm: Arm,
    captions: int,
    pivots: int,
    group: int,
    generator: StreamingGenerator,
    reward: RewardModel,
    first_pivot: int = 0,
) -> Spread:
    """Roll out one arm and measure every group. first_pivot: number of the first drawn pivot, for other draws."""
    rewards: dict[str, list[Tensor]] = {name: [] for name in reward.signals}
    parts, features = [], []
    for pivot in range(first_pivot, first_pivot + pivots):
        plans = plans_of(arm, captions, group, pivot, generator.recipe)
        videos: VideoBatch = decode_tape(generator, roll_out(generator, plans, Consistency()))
        scores = reward.score(videos)
        for name in rewards:
            rewards[name].append(scores.values[name].view(len(plans), group + 1))
        seen = [Clips.of(clips[:group]) for clips in videos.frames.split(group + 1)]
        parts.append(torch.stack([taken_apart(clips) for clips in seen]))
        features.append(torch.stack([deviations(clips) for clips in seen]))
    return Spread(
        {name: torch.stack(found, 1) for name, found in rewards.items()},
        torch.stack(parts, 1),
        torch.stack(features, 1),
    )


# The tables


def interval(values: Tensor, sign: str = "") -> str:
    """mean [low, high] of values [C, M]."""
    mean, low, high = (format(x, f"{sign}.4f") for x in clustered_bootstrap(values))
    return f"{mean} [{low}, {high}]"


def reward_table(arms: Mapping[str, Spread]) -> str:
    """Deviation within groups of each signal, the best branch and the mean branch against the anchor."""
    rows = []
    for name, spread in arms.items():
        branches = {signal: table[..., :-1] for signal, table in spread.signals.items()}
        deviation = [interval(table.std(-1, correction=0)) for table in branches.values()]
        total, anchor = branches["total"], spread.signals["total"][..., -1]
        rows.append(
            [name, *deviation, interval(total.amax(-1) - total.mean(-1)), interval(total.mean(-1) - anchor, "+")]
        )
    signals = [f"std of {name}" for name in next(iter(arms.values())).signals]
    return markdown_table(rows, ("arm", *signals, "best − mean", "mean − anchor"))


def part_table(arms: Mapping[str, Spread]) -> str:
    """Root mean square pixel difference of two clips of a group, and what it consists of."""
    rows = []
    for name, spread in arms.items():
        total, *left = spread.parts.mean((0, 1)).tolist()
        shares = [before - after for before, after in zip([total, *left], [*left, 0.0], strict=True)]
        rows.append([name, f"{total**0.5:.4f}", *(f"{100 * share / total:.0f} %" for share in shares)])
    return markdown_table(rows, ("arm", "pixel difference", "place", "trajectory", "brightness", "rest"))


def feature_table(arms: Mapping[str, Spread]) -> str:
    """Deviations within groups, averaged over groups."""
    rows = [[name, *(f"{x:.4f}" for x in spread.features.mean((0, 1)).tolist())] for name, spread in arms.items()]
    return markdown_table(rows, ("arm", *FEATURES))


def page(arms: Mapping[str, Spread], captions: int, pivots: int, group: int) -> str:
    """The printed tables."""
    frames = 3 * (ROUTING.routed_blocks + ROUTING.tail_blocks)
    return "\n\n".join((
        f"{captions} held-out captions × {pivots} pivots, groups of {group}, windows of {frames} frames; 95 % "
        "intervals, bootstrapped over captions.",
        reward_table(arms), part_table(arms), feature_table(arms),
    ))  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=24, help="at most so many of the held-out captions")
    parser.add_argument("--pivots", type=int, default=4, help="windows per caption")
    parser.add_argument("--group", type=int, default=8, help="branches of a group beside its anchor")
    parser.add_argument("--output", type=Path, help="also write the tables to this Markdown file")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    size = (options.captions, options.pivots, options.group)
    generator, reward = packaged_generator(), ShapesReward()
    arms = {name: measure(arm, *size, generator, reward) for name, arm in ARMS.items()}
    text = page(arms, *size)
    print(text)
    if options.output is not None:
        command = f"python -m benchmarks.group_spread --captions {size[0]} --pivots {size[1]} --group {size[2]}"
        explained = "" if __doc__ is None else __doc__.split("\n\n", 2)[2].rstrip()
        options.output.write_text(
            f"# How far the clips of a group lie apart\n\n    {command}\n\n{explained}\n\n{text}\n"
        )


if __name__ == "__main__":
    main()
