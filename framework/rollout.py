"""From plans to clips: the few-step sampler on a stream, and the records that somebody asked for.

For each block: K network calls under an unchanged past, then one clean pass that commits it (5 calls for K = 4). All
branches of all groups run as one batch; the prefix of a group is generated once and shared.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from framework.interfaces import GeneratorRecipe, Stream, StreamingGenerator
from framework.kernels import TransitionKernel
from framework.records import Endpoints, OnPolicyTransitions, Predictions, Record
from framework.rng import derive_seed, draw_noise
from framework.types import GroupPlan, Tape


@dataclass(frozen=True)
class BlockTrace:
    """The sampler's path through one block; K steps."""

    states: tuple[Tensor, ...]  # K + 1 of [N, C, f, H, W], from noise to the clean block
    velocities: tuple[Tensor, ...]  # K of [N, C, f, H, W]

    @property
    def x0(self) -> Tensor:
        return self.states[-1]


def noise_count(kernel: TransitionKernel, recipe: GeneratorRecipe) -> int:
    """Noise tensors a block needs: the initial one and one per step that draws."""
    return 1 + sum(kernel.std(*pair) > 0 for pair in recipe.schedule.transitions)


def denoise_block(generator: StreamingGenerator, stream: Stream, noise: Tensor, kernel: TransitionKernel) -> BlockTrace:
    """Sample one block from noise [N, 1 + draws, C, f, H, W] behind a stream; the stream is not changed."""
    transitions = generator.recipe.schedule.transitions
    x = transitions[0][0] * noise[:, 0]
    states, velocities, drawn = [x], [], 0
    for sigma, sigma_next in transitions:
        velocity = generator.predict(x, sigma, stream)
        draws = kernel.std(sigma, sigma_next) > 0
        drawn += draws
        x = kernel.step(x, velocity, sigma, sigma_next, noise[:, drawn] if draws else None)
        states.append(x)
        velocities.append(velocity)
    return BlockTrace(tuple(states), tuple(velocities))


def generate_blocks(
    generator: StreamingGenerator, stream: Stream, noise: Tensor, kernel: TransitionKernel
) -> Iterator[BlockTrace]:
    """Continue a stream over noise [N, 1 + draws, C, F, H, W], block by block.

    The last block is not committed: nobody sees it.
    """
    blocks = noise.split(generator.recipe.block_frames, dim=3)
    for i, block_noise in enumerate(blocks):
        trace = denoise_block(generator, stream, block_noise, kernel)
        if i < len(blocks) - 1:
            stream = generator.commit(trace.x0, stream)
        yield trace


@torch.no_grad()
def roll_out(
    generator: StreamingGenerator,
    plans: Sequence[GroupPlan],
    kernel: TransitionKernel,
    keep: frozenset[type[Record]] = frozenset({Endpoints}),
) -> Tape:
    """Generate every branch of every plan under the policy in force.

    All plans must share their window and group size. Noise depends on the plans' seeds alone, so a clip is the same
    in any batch (up to the rounding of batched matrix products). keep: the record types to write.
    """
    first, blocks, branches = plans[0].first_block, plans[0].blocks, len(plans[0].branches)
    if any((p.first_block, p.blocks, len(p.branches)) != (first, blocks, branches) for p in plans):
        raise ValueError("the plans of one rollout must share their window and their group size")
    recipe = generator.recipe
    trunk, prefix = generate_prefix(generator, plans, kernel)
    stream = generator.fork(trunk, branches)
    seeds = [branch.noise_seed for plan in plans for branch in plan.branches]
    noise = draw_noise(seeds, noise_shape(generator, kernel, blocks), device_of(generator))
    path_asked = any(issubclass(kind, tuple(keep)) for kind in (Predictions, OnPolicyTransitions))
    traces = [
        trace if path_asked else BlockTrace((trace.x0,), ())
        for trace in generate_blocks(generator, stream, noise, kernel)
    ]
    return Tape(tuple(plans), dict(_write(traces, prefix, first * recipe.block_frames, recipe, keep)))


def generate_prefix(
    generator: StreamingGenerator, plans: Sequence[GroupPlan], kernel: TransitionKernel
) -> tuple[Stream, Tensor | None]:
    """(the stream after the shared blocks of each plan, their latents [P, C, start, H, W] or None).

    Noise is drawn block by block from (prefix seed, block), so that memory does not grow with the length but for the
    latents themselves.
    """
    stream = generator.open([plan.scene.prompt for plan in plans])
    blocks, size = plans[0].first_block, generator.recipe.block_frames
    if not blocks:
        return stream, None
    channels, height, width = generator.recipe.latent
    shape, device = noise_shape(generator, kernel, 1), device_of(generator)
    latents = torch.empty(len(plans), channels, blocks * size, height, width, device=device)
    for block in range(blocks):
        seeds = [derive_seed(plan.prefix_seed, "block", block) for plan in plans]
        x0 = denoise_block(generator, stream, draw_noise(seeds, shape, device), kernel).x0
        stream = generator.commit(x0, stream)
        latents[:, :, block * size : (block + 1) * size] = x0
    return stream, latents


def noise_shape(generator: StreamingGenerator, kernel: TransitionKernel, blocks: int) -> tuple[int, ...]:
    """Shape of the noise of one clip of so many blocks: (1 + draws, C, F, H, W)."""
    channels, height, width = generator.recipe.latent
    return noise_count(kernel, generator.recipe), channels, blocks * generator.recipe.block_frames, height, width


def device_of(generator: StreamingGenerator) -> torch.device:
    """Where the generator's network is."""
    return next(generator.network.parameters()).device


def _write(
    traces: list[BlockTrace], prefix: Tensor | None, start: int, recipe: GeneratorRecipe, keep: frozenset[type[Record]]
) -> Iterator[tuple[type[Record], Record]]:
    """The records somebody asked for; a record type stands for its subclasses."""

    def asked(kind: type[Record]) -> bool:
        return any(issubclass(kind, wanted) for wanted in keep)

    def path(part: slice) -> Tensor:
        """States of all blocks [N, K, C, F, H, W]."""
        return torch.cat([torch.stack(t.states[part], 1) for t in traces], dim=3)

    latents = torch.cat([trace.x0 for trace in traces], dim=2)
    yield Endpoints, Endpoints(latents, prefix, start)
    if asked(Predictions):
        velocities = torch.cat([torch.stack(t.velocities, 1) for t in traces], dim=3)
        yield Predictions, Predictions(path(slice(None, -1)), velocities, recipe.schedule.sigmas)
    if asked(OnPolicyTransitions):
        transitions = OnPolicyTransitions(path(slice(None, -1)), path(slice(1, None)), recipe.schedule.transitions)
        yield OnPolicyTransitions, transitions
