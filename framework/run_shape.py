"""The shapes of a training step, read off its parts without calling the network: what is said and estimated of it."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace

from torch import nn

from framework.accounting import GroupCount
from framework.adapters import Adaptation, LoRA
from framework.devices import META
from framework.distributed import World
from framework.interfaces import ExplorationStrategy, Regularizer, StreamingGenerator, SurrogatePolicy
from framework.memory_estimate import MemoryEstimate, RolloutShape, TrainedSize, UpdateShape, estimate_memory
from framework.records import Displacements, OnPolicyTransitions, Record
from framework.rng import Streams
from framework.rollout import blank_tape, noise_count, resident_frames
from framework.trainer import Trainer
from framework.types import GroupPlan, Scene


@dataclass(frozen=True)
class StepParts:
    """The parts of a training step that decide its shapes; as in `framework.trainer.Trainer`."""

    generator: StreamingGenerator
    exploration: ExplorationStrategy
    surrogate: SurrogatePolicy
    regularizer: Regularizer
    scenes: Sequence[Scene]
    keep: frozenset[type[Record]]
    seed: int
    prompts_per_step: int
    updates_per_rollout: int
    micro_batch_size: int
    groups_at_once: int | None = None
    branches_at_once: int | None = None

    @classmethod
    def of(cls, trainer: Trainer) -> "StepParts":
        """Those of one rank of a trainer."""
        parts = cls(**{field.name: getattr(trainer, field.name) for field in fields(cls)})
        return replace(parts, prompts_per_step=-(-trainer.prompts_per_step // trainer.world.size))

    def first_plan(self) -> GroupPlan:
        """The plan of the first prompt. Raises ValueError where none can be made of it."""
        streams = Streams(self.seed).at("selfcheck")
        (plan,) = self.exploration.plan(self.scenes[:1], [0], self.generator.recipe, streams)
        return plan


def rollout_shape(parts: StepParts) -> RolloutShape:
    """What the first step would generate. Raises ValueError where no plan can be made of the scenes."""
    recipe, kernel = parts.generator.recipe, parts.exploration.kernel
    (plan,) = parts.exploration.plan(parts.scenes[:1], [0], recipe, Streams(parts.seed).at("shapes"))
    channels, height, width = recipe.latent
    routed = any(branch.route is not None for branch in plan.branches)
    return RolloutShape(
        groups=parts.prompts_per_step,
        branches=len(plan.branches),
        start=plan.first_block * recipe.block_frames,
        frames=plan.blocks * recipe.block_frames,
        block=recipe.block_frames,
        latent=channels * height * width,
        draws=noise_count(kernel, recipe),
        steps=len(recipe.schedule.sigmas),
        path=any(issubclass(kind, tuple(parts.keep)) for kind in (Displacements, OnPolicyTransitions)),
        routed=routed,
        resident=resident_frames([plan], recipe.block_frames),
        at_once=parts.groups_at_once,
        branches_at_once=parts.branches_at_once,
    )


def update_shape(parts: StepParts) -> UpdateShape:
    """What the largest part of the first update would ask. Raises what `SurrogatePolicy.probes` raises."""
    recipe = parts.generator.recipe
    streams = Streams(parts.seed).at("shapes")
    plans = parts.exploration.plan(parts.scenes[:1], [0], recipe, streams)
    tape = blank_tape(plans, recipe, parts.exploration.kernel, parts.keep)
    asked = list(parts.surrogate.probes(tape, recipe, streams))
    largest = max(asked, key=lambda probes: probes.sigma.numel())
    total = len(largest) * parts.prompts_per_step
    reused = parts.surrogate.fixed_probes and parts.updates_per_rollout > 1
    clips = min(parts.micro_batch_size, total)
    clips -= clips % len(largest) if clips > len(largest) else 0  # whole groups, as `Probes.split` cuts them
    return UpdateShape(
        clips=clips,
        total=total,
        frames=largest.noisy.shape[3],
        streams=largest.noisy.shape[1],
        views=len(parts.surrogate.views | parts.regularizer.views),
        history_grad=largest.history_grad,
        kept=reused or (parts.surrogate.coupled and clips < total),
    )


def trained_size(network: nn.Module, adaptation: Adaptation) -> TrainedSize:
    """The weights of a network that an adaptation was put on."""
    parameters = list(network.parameters())
    return TrainedSize(
        frozen_bytes=sum(p.nbytes for p in parameters if not p.requires_grad),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        rank=adaptation.rank if isinstance(adaptation, LoRA) else None,
    )


def estimate_step(parts: StepParts, adaptation: Adaptation) -> MemoryEstimate | None:
    """The memory of a training run whose adaptation is attached; None for a generator that tells no sizes."""
    network = parts.generator.dimensions(parts.scenes[0].prompt)
    if network is None:
        return None
    weights = trained_size(parts.generator.network, adaptation)
    return estimate_memory(network, rollout_shape(parts), update_shape(parts), weights)


def describe_step(
    parts: StepParts, adaptation: Adaptation, trained: Mapping[str, nn.Parameter], prompts: int, world: World
) -> list[str]:
    """What a step is made of, for the start of a run whose adaptation is attached.

    parts: of one rank. prompts: of all ranks.
    """
    recipe, kernel = parts.generator.recipe, parts.exploration.kernel
    plan = parts.first_plan()
    count, update, memory = GroupCount.of(plan), update_shape(parts), estimate_step(parts, adaptation)
    numbers = sum(p.numel() for p in trained.values())
    total = sum(p.numel() for p in parts.generator.network.parameters())
    return [
        f"trainable: {numbers:,} of {total:,} parameters ({100 * numbers / total:.1f} %), "
        f"{adaptation.describe(dict(trained))}",
        f"step: {count.arithmetic(prompts)}, micro-batches of up to "
        f"{min(parts.micro_batch_size, prompts * count.clips)}, {parts.updates_per_rollout} update(s) per rollout",
        f"update: {world.size} rank(s) × {update.arithmetic()}",
        *world.describe(prompts),
        f"sampler: σ {', '.join(f'{sigma:.4f}' for sigma in recipe.schedule.sigmas)}; "
        f"std of its steps {', '.join(f'{kernel.std(*pair):.4f}' for pair in recipe.schedule.transitions)}",
        f"memory: {'this generator does not tell its sizes' if memory is None else memory.summary()}",
    ]


def plan_lines(parts: StepParts, adaptation: Adaptation) -> list[str]:
    """What can be said of a run from sizes alone: parameters, the step, and its memory on 1, 8 and a GPU per prompt.

    parts: of the whole run. The network may be on the meta device; its adaptation is put on it here.
    """
    device = next(parts.generator.network.parameters()).device
    with device if device.type == META else nullcontext():  # adapters of a billion numbers are not drawn to be dropped
        trained = adaptation.attach(parts.generator.network, parts.seed)
    prompts = parts.prompts_per_step
    lines = describe_step(parts, adaptation, trained, prompts, World())[:-1]
    for gpus in sorted({gpus for gpus in (1, 8, prompts) if gpus <= prompts}):
        memory = estimate_step(replace(parts, prompts_per_step=-(-prompts // gpus)), adaptation)
        said = "this generator does not tell its sizes" if memory is None else memory.summary()
        lines.append(f"memory of each of {gpus} GPUs: {said}" if gpus > 1 else f"memory of 1 GPU: {said}")
    smallest = replace(parts, prompts_per_step=1, micro_batch_size=1, groups_at_once=1, branches_at_once=1)
    least = estimate_step(smallest, adaptation)
    if least is not None:
        knobs = "train.micro_batch_size=1 and train.branches_at_once=1"
        lines.append(f"memory of a GPU per prompt with {knobs}: {least.summary()}")
    return [*lines, "not counted: text encoder, video decoder, reward models"]
