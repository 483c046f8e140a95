"""What matching two distributions is made of, beside its step: rollouts behind a history, questions, weighted losses.

    l = ½ w (x̂_θ − sg(x̂_θ − g))²    ⇒    dl/dx̂_θ = w g        (a vector field g written as a loss)

The pre-training stage and the root `distill` share these functions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from framework.flow import add_noise, expand_sigma, velocity_target, x0_from_velocity
from framework.interfaces import StreamingGenerator
from framework.kernels import Consistency
from framework.rollout import denoise_block, device_of, noise_shape
from framework.types import Probes, Scene


@dataclass(frozen=True)
class StudentRollout:
    """What the student did, N clips of F frames.

    prompts: one per clip. states: what its sampler visited at the K levels [N, K, C, F, H, W]. clips: where its blocks
    arrived [N, C, F, H, W]. history: the clean blocks that stood before them [N, C, F, H, W], its own or others.
    """

    prompts: tuple[str, ...]
    states: Tensor
    clips: Tensor
    history: Tensor


@torch.no_grad()
def roll_out_student(
    generator: StreamingGenerator, prompts: Sequence[str], random: torch.Generator, history: Tensor | None = None
) -> StudentRollout:
    """Sample every block with the consistency kernel, behind the student's own clean blocks or those of ``history``.

    history: [N, C, F, H, W]. With it a block's sampler and states are the student's, its past is not.
    Raises ValueError for a recipe whose first block has a schedule of its own: its states are of other levels.
    """
    if generator.recipe.first_schedule is not None:
        raise ValueError(f"the recipe {generator.recipe.name!r} has a first_schedule; distill with first_schedule=None")
    recipe, kernel, device = generator.recipe, Consistency(), device_of(generator)
    shape = (len(prompts), *noise_shape(generator, kernel, recipe.clip_blocks))
    noise = torch.randn(shape, generator=random).to(device)
    given = None if history is None else history.to(device).split(recipe.block_frames, dim=2)
    stream, traces = generator.open(prompts), []
    for block, block_noise in enumerate(noise.split(recipe.block_frames, dim=3)):
        if block:
            stream = generator.commit(traces[-1].x0 if given is None else given[block - 1], stream)
        traces.append(denoise_block(generator, stream, block_noise, kernel))
    states = torch.cat([torch.stack(t.states[:-1], 1) for t in traces], dim=3)
    clips = torch.cat([t.x0 for t in traces], dim=2)
    return StudentRollout(tuple(prompts), states, clips, clips if history is None else history.to(device))


def visited_probes(rollout: StudentRollout, level: Tensor, sigmas: Sequence[float], history_grad: bool) -> Probes:
    """The states that the sampler visited at level k of each block [N, 1, blocks], asked again in one packed pass."""
    k = level.repeat_interleave(rollout.states.shape[3] // level.shape[-1], dim=-1).to(rollout.states.device)
    noisy = torch.gather(rollout.states, 1, expand_sigma(k).expand(-1, 1, *rollout.states.shape[2:]))
    sigma = torch.tensor(sigmas, device=noisy.device)[k]
    return replace(_probes(rollout, noisy, sigma), history_grad=history_grad)


def noised_probes(rollout: StudentRollout, x0: Tensor, sigma: Tensor, random: torch.Generator) -> Probes:
    """x0 [N, 1, C, F, H, W] noised to σ per block [N, 1, blocks], behind the same history; ``target`` in ``extra``."""
    frame_sigma = sigma.repeat_interleave(x0.shape[3] // sigma.shape[-1], dim=-1).to(x0.device)
    noise = torch.randn(x0.shape, generator=random).to(x0.device)
    probes = _probes(rollout, add_noise(x0, noise, expand_sigma(frame_sigma)), frame_sigma)
    return replace(probes, extra={"target": velocity_target(x0, noise)})


def _probes(rollout: StudentRollout, noisy: Tensor, sigma: Tensor) -> Probes:
    scenes = tuple(Scene.single(prompt) for prompt in rollout.prompts)
    return Probes(noisy, sigma, rollout.history, 0, None, scenes, torch.arange(len(noisy)))


def predict_x0(generator: StreamingGenerator, probes: Probes) -> Tensor:
    """x̂0 [N, S, C, F, H, W] of a generator at probes."""
    return x0_from_velocity(probes.noisy, generator.replay(probes), expand_sigma(probes.sigma))


def flow_matching_loss(generator: StreamingGenerator, probes: Probes) -> Tensor:
    """mean (v̂ − (ε − x0))² of a generator at `noised_probes`."""
    return (generator.replay(probes) - probes.extra["target"]).square().mean()


def matching_loss(x0: Tensor, gradient: Tensor, weights: Tensor | float = 1.0) -> Tensor:
    """½ mean w (x̂ − sg(x̂ − g))²: its gradient is w g / number of elements; its value means nothing.

    weights: of element mean 1, broadcast over x̂ [N, S, C, F, H, W].
    """
    return 0.5 * (weights * (x0 - (x0.detach() - gradient)).square()).mean()
