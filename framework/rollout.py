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
from framework.rng import draw_noise
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
    generator: StreamingGenerator, stream: Stream, noise: Tensor, kernel: TransitionKernel, *, commit_last: bool = False
) -> Iterator[tuple[BlockTrace, Stream]]:
    """Continue a stream over noise [N, 1 + draws, C, F, H, W], block by block: (trace, stream after the block).

    The last block is committed only on request: nobody sees it unless the stream goes on.
    """
    blocks = noise.split(generator.recipe.block_frames, dim=3)
    for i, block_noise in enumerate(blocks):
        trace = denoise_block(generator, stream, block_noise, kernel)
        if commit_last or i < len(blocks) - 1:
            stream = generator.commit(trace.x0, stream)
        yield trace, stream


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
    device = next(generator.network.parameters()).device
    draws = noise_count(kernel, recipe)

    def noise_of(seeds: Sequence[int], count: int) -> Tensor:
        channels, height, width = recipe.latent
        shape = (draws, channels, count * recipe.block_frames, height, width)
        return draw_noise(seeds, shape, device)

    trunk = generator.open([plan.scene.prompt for plan in plans])
    prefix: list[Tensor] = []
    if first:
        noise = noise_of([plan.prefix_seed for plan in plans], first)
        for trace, after in generate_blocks(generator, trunk, noise, kernel, commit_last=True):
            prefix.append(trace.x0)
            trunk = after
    stream = generator.fork(trunk, branches)
    noise = noise_of([branch.noise_seed for plan in plans for branch in plan.branches], blocks)
    traces = [trace for trace, _ in generate_blocks(generator, stream, noise, kernel)]
    return Tape(tuple(plans), dict(_write(traces, prefix, first * recipe.block_frames, recipe, keep)))


def _write(
    traces: list[BlockTrace], prefix: list[Tensor], start: int, recipe: GeneratorRecipe, keep: frozenset[type[Record]]
) -> Iterator[tuple[type[Record], Record]]:
    """The records somebody asked for; a record type stands for its subclasses."""

    def asked(kind: type[Record]) -> bool:
        return any(issubclass(kind, wanted) for wanted in keep)

    def path(part: slice) -> Tensor:
        """States of all blocks [N, K, C, F, H, W]."""
        return torch.cat([torch.stack(t.states[part], 1) for t in traces], dim=3)

    latents = torch.cat([trace.x0 for trace in traces], dim=2)
    yield Endpoints, Endpoints(latents, torch.cat(prefix, dim=2) if prefix else None, start)
    if asked(Predictions):
        velocities = torch.cat([torch.stack(t.velocities, 1) for t in traces], dim=3)
        yield Predictions, Predictions(path(slice(None, -1)), velocities, recipe.schedule.sigmas)
    if asked(OnPolicyTransitions):
        transitions = OnPolicyTransitions(path(slice(None, -1)), path(slice(1, None)), recipe.schedule.transitions)
        yield OnPolicyTransitions, transitions
