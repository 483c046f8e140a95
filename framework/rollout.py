"""From plans to clips: the few-step sampler on a stream, and the records that somebody asked for.

For each block: K network calls under an unchanged past, then one clean pass that commits it (5 calls for K = 4). All
branches of all groups run as one batch; the prefix of a group is generated once and shared.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from framework.interfaces import GeneratorRecipe, Stream, StreamingGenerator
from framework.kernels import TransitionKernel
from framework.records import (
    Anchors,
    Displacements,
    Endpoints,
    OnPolicyTransitions,
    Predictions,
    Record,
    Transitions,
)
from framework.rng import derive_seed, draw_noise
from framework.types import GroupPlan, Route, Scene, Tape, Visible


@dataclass(frozen=True)
class BlockTrace:
    """The sampler's path through one block; K steps."""

    states: tuple[Tensor, ...]  # K + 1 of [N, C, f, H, W], from noise to the clean block
    velocities: tuple[Tensor, ...]  # K of [N, C, f, H, W]

    @property
    def x0(self) -> Tensor:
        return self.states[-1]


def noise_count(kernel: TransitionKernel, recipe: GeneratorRecipe) -> int:
    """Noise tensors drawn for a block: the initial one and one per step that draws.

    As many for every block, so that noise depends on seed and block alone: where a stream's first block has a schedule
    of its own, the block that needs fewer leaves the last ones unused.
    """
    schedules = [recipe.schedule, recipe.schedule_at(0)]
    return 1 + max(sum(kernel.std(*pair) > 0 for pair in schedule.transitions) for schedule in schedules)


def denoise_block(
    generator: StreamingGenerator,
    stream: Stream,
    noise: Tensor,
    kernel: TransitionKernel,
    routes: Sequence[Route | None] = (),
) -> BlockTrace:
    """Sample one block from noise [N, 1 + draws, C, f, H, W] behind a stream; the stream is not changed.

    routes: per clip, the history it is shown at the steps that the route names; empty for none.
    """
    transitions = generator.recipe.schedule_at(stream.next_frame).transitions
    x = transitions[0][0] * noise[:, 0]
    states, velocities, drawn = [x], [], 0
    for k, (sigma, sigma_next) in enumerate(transitions):
        velocity = generator.predict(x, sigma, stream, visible_at(routes, stream.next_frame, k))
        draws = kernel.std(sigma, sigma_next) > 0
        drawn += draws
        x = kernel.step(x, velocity, sigma, sigma_next, noise[:, drawn] if draws else None)
        states.append(x)
        velocities.append(velocity)
    return BlockTrace(tuple(states), tuple(velocities))


def visible_at(routes: Sequence[Route | None], start: int, step: int | None) -> Visible | None:
    """What each clip's block at ``start`` sees in place of the canonical history; step None is the clean pass."""
    seen = [
        r.visible(start) if r is not None and (r.clean_write if step is None else r.steps[step]) else None
        for r in routes
    ]
    return None if all(frames is None for frames in seen) else seen


def generate_blocks(
    generator: StreamingGenerator,
    stream: Stream,
    noise: Tensor,
    kernel: TransitionKernel,
    routes: Sequence[Route | None] = (),
    scenes: Sequence[Scene] = (),
) -> Iterator[BlockTrace]:
    """Continue a stream over noise [N, 1 + draws, C, F, H, W], block by block.

    routes: per clip, what its first blocks see in place of the canonical history. scenes: per prompt of the stream, cut
    on blocks; their switches after the first block are followed, one at the first block is the caller's, who may do it
    before a fork. The last block is not committed: nobody sees it.
    """
    blocks = noise.split(generator.recipe.block_frames, dim=3)
    for i, block_noise in enumerate(blocks):
        stream = generator.follow(stream, scenes) if i else stream
        routed = [route if route is not None and i < route.blocks else None for route in routes]
        trace = denoise_block(generator, stream, block_noise, kernel, routed)
        if i < len(blocks) - 1:
            stream = generator.commit(trace.x0, stream, visible_at(routed, stream.next_frame, None))
        yield trace


@torch.no_grad()
def roll_out(
    generator: StreamingGenerator,
    plans: Sequence[GroupPlan],
    kernel: TransitionKernel,
    keep: frozenset[type[Record]] = frozenset({Endpoints}),
    branches_at_once: int | None = None,
) -> Tape:
    """Generate every branch of every plan under the policy in force.

    All plans must share their window and group size. Noise depends on the plans' seeds alone, so a clip is the same
    in any batch (up to the rounding of batched matrix products). keep: the record types to write. A prompt switches
    with the first block at or after its frame, in each plan at its own; the tape's scenes say where it took effect.
    branches_at_once: how many branches of each plan form one batch behind the shared prefix, None for all.
    """
    plans = [replace(plan, scene=plan.scene.on_blocks(generator.recipe.block_frames)) for plan in plans]
    first, blocks, branches = plans[0].first_block, plans[0].blocks, len(plans[0].branches)
    if any((p.first_block, p.blocks, len(p.branches)) != (first, blocks, branches) for p in plans):
        raise ValueError("the plans of one rollout must share their window and their group size")
    for plan in plans:
        generator.check_plan(plan)
    path_asked = any(issubclass(kind, tuple(keep)) for kind in (Displacements, OnPolicyTransitions))
    if path_asked:
        check_windows(plans, generator.recipe)
    trunk, prefix = generate_prefix(generator, plans, kernel)
    scenes, shape = [plan.scene for plan in plans], noise_shape(generator, kernel, blocks)

    def generate(part: slice) -> list[BlockTrace]:
        """Some branches of each plan."""
        rows = [branch for plan in plans for branch in plan.branches[part]]
        noise = draw_noise([row.noise_seed for row in rows], shape, device_of(generator))
        routes = [row.route for row in rows]
        routed, copies = routes if any(routes) else (), len(rows) // len(plans)
        return [
            trace if path_asked else BlockTrace((trace.x0,), ())
            # nobody here keeps the forked stream: what its first block saw would live as long as the rollout
            for trace in generate_blocks(generator, generator.fork(trunk, copies), noise, kernel, routed, scenes)
        ]

    size = branches if branches_at_once is None else min(branches_at_once, branches)
    parts = [generate(slice(first, first + size)) for first in range(0, branches, size)]
    traces = joined_traces(parts, len(plans)) if len(parts) > 1 else parts[0]
    return Tape(tuple(plans), dict(_write(traces, prefix, plans, generator.recipe, kernel, keep)))


def joined_traces(parts: Sequence[Sequence[BlockTrace]], groups: int) -> list[BlockTrace]:
    """The traces of all branches, in group order, from those of some branches of each of ``groups`` groups."""

    def join(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([tensor.unflatten(0, (groups, -1)) for tensor in tensors], dim=1).flatten(0, 1)

    return [
        BlockTrace(
            tuple(map(join, zip(*(trace.states for trace in block), strict=True))),
            tuple(map(join, zip(*(trace.velocities for trace in block), strict=True))),
        )
        for block in zip(*parts, strict=True)
    ]


def generate_prefix(
    generator: StreamingGenerator, plans: Sequence[GroupPlan], kernel: TransitionKernel
) -> tuple[Stream, Tensor | None]:
    """(the stream after the shared blocks of each plan, their latents [P, C, start, H, W] or None).

    A switch at the window's first block is made here, once a prompt: branches fork from a stream under its new text.
    Noise is drawn block by block from (prefix seed, block), so that memory does not grow with the length but for the
    latents themselves.
    """
    blocks, size = plans[0].first_block, generator.recipe.block_frames
    scenes = [plan.scene.on_blocks(size) for plan in plans]
    switches = any(len(scene.segments) > 1 for scene in scenes)
    stream = generator.open([scene.prompt for scene in scenes], resident_frames(plans, size), switches)
    if not blocks:
        return stream, None
    channels, height, width = generator.recipe.latent
    shape, device = noise_shape(generator, kernel, 1), device_of(generator)
    latents = torch.empty(len(plans), channels, blocks * size, height, width, device=device)
    for block in range(blocks):
        seeds = [derive_seed(plan.prefix_seed, "block", block) for plan in plans]
        x0 = denoise_block(generator, stream, draw_noise(seeds, shape, device), kernel).x0
        stream = generator.follow(generator.commit(x0, stream), scenes)
        latents[:, :, block * size : (block + 1) * size] = x0
    return stream, latents


def noise_shape(generator: StreamingGenerator, kernel: TransitionKernel, blocks: int) -> tuple[int, ...]:
    """Shape of the noise of one clip of so many blocks: (1 + draws, C, F, H, W)."""
    channels, height, width = generator.recipe.latent
    return noise_count(kernel, generator.recipe), channels, blocks * generator.recipe.block_frames, height, width


def device_of(generator: StreamingGenerator) -> torch.device:
    """Where the generator's network is."""
    return next(generator.network.parameters()).device


def resident_frames(plans: Sequence[GroupPlan], block_frames: int) -> int:
    """How far back the routes of some plans reach, in frames, seen from the start of their last routed block."""
    return max(
        (
            (plan.first_block + branch.route.blocks - 1) * block_frames - min(branch.route.frames)
            for plan in plans
            for branch in plan.branches
            if branch.route is not None and branch.route.frames
        ),
        default=0,
    )


def check_windows(plans: Sequence[GroupPlan], recipe: GeneratorRecipe) -> None:
    """Raises ValueError where blocks of one trained window were sampled on different schedules."""
    if recipe.first_schedule is not None and any(plan.first_block == 0 for plan in plans):
        raise ValueError(
            f"the window starts at frame 0, but the recipe {recipe.name!r} samples the first block of a stream on a "
            f"schedule of its own: train later windows, e.g. NoiseEndpoint.layout = Anywhere(earliest=1), or set "
            f"first_schedule=None"
        )


def check_routes(generator: StreamingGenerator, plan: GroupPlan, scenes: Sequence[Scene]) -> None:
    """Raises ValueError where routes like those of a plan cannot be shown in all of some scenes, before step 300 does.

    Asked for the window behind the last switch of each: every recache has happened by then. Raises what `check_windows`
    raises.
    """
    check_windows([plan], generator.recipe)
    size = generator.recipe.block_frames
    for scene in {scene.segments: scene.on_blocks(size) for scene in scenes}.values():
        generator.check_plan(replace(plan, scene=scene, first_block=scene.segments[-1].start // size))


def canonical(plans: Sequence[GroupPlan]) -> list[GroupPlan]:
    """The same groups without any route: every branch sees what the generator's policy shows."""
    return [replace(p, branches=tuple(replace(b, route=None) for b in p.branches)) for p in plans]


def blank_tape(
    plans: Sequence[GroupPlan], recipe: GeneratorRecipe, kernel: TransitionKernel, keep: frozenset[type[Record]]
) -> Tape:
    """The tape that `roll_out` would write, of zeros and with one pixel a frame: which records, of which shape."""
    check_windows(plans, recipe)
    channels, _, _ = recipe.latent
    rows, steps = sum(len(plan.branches) for plan in plans), len(recipe.schedule.sigmas)
    block = torch.zeros(rows, channels, recipe.block_frames, 1, 1)
    trace = BlockTrace((block,) * (steps + 1), (block,) * steps)
    start = plans[0].first_block * recipe.block_frames
    prefix = torch.zeros(len(plans), channels, start, 1, 1) if start else None
    return Tape(tuple(plans), dict(_write([trace] * plans[0].blocks, prefix, plans, recipe, kernel, keep)))


def _write(
    traces: list[BlockTrace],
    prefix: Tensor | None,
    plans: Sequence[GroupPlan],
    recipe: GeneratorRecipe,
    kernel: TransitionKernel,
    keep: frozenset[type[Record]],
) -> Iterator[tuple[type[Record], Record]]:
    """The records somebody asked for; a record type stands for its subclasses."""

    def asked(kind: type[Record]) -> bool:
        return any(issubclass(kind, wanted) for wanted in keep)

    def path(part: slice) -> Tensor:
        """States of all blocks [N, K, C, F, H, W]."""
        return torch.cat([torch.stack(t.states[part], 1) for t in traces], dim=3)

    branches = [branch for plan in plans for branch in plan.branches]
    route = next((branch.route for branch in branches if branch.route is not None), None)
    latents = torch.cat([trace.x0 for trace in traces], dim=2)
    yield Endpoints, Endpoints(latents, prefix, plans[0].first_block * recipe.block_frames)
    if asked(Anchors) and any(branch.anchor for branch in branches):
        yield Anchors, Anchors(torch.tensor([branch.anchor for branch in branches], device=latents.device))
    if asked(Predictions) or (route is not None and asked(Displacements)):
        velocities = torch.cat([torch.stack(t.velocities, 1) for t in traces], dim=3)
        seen = (path(slice(None, -1)), velocities, recipe.schedule.sigmas)
        if route is None:
            yield Predictions, Predictions(*seen)
        else:
            yield Displacements, Displacements(*seen, route.blocks, route.steps)
    if asked(Transitions if route is not None else OnPolicyTransitions):
        kind = OnPolicyTransitions if route is None else Transitions
        yield kind, kind(path(slice(None, -1)), path(slice(1, None)), recipe.schedule.transitions, kernel)
