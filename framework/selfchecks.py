"""What a run proves about itself before it starts: printed once, refused when it fails."""

import torch

from framework.interfaces import StreamingGenerator
from framework.records import Endpoints, Predictions
from framework.types import Probes, Tape


def replay_probes(tape: Tape) -> Probes:
    """The states that a rollout visited, asked again: one stream per sampler step."""
    seen, ends = tape[Predictions], tape[Endpoints]
    n, k, _, frames, _, _ = seen.states.shape
    sigma = torch.tensor(seen.sigmas, device=seen.states.device)
    return Probes(
        noisy=seen.states,
        sigma=sigma[None, :, None].expand(n, k, frames),
        clean=ends.latents,
        start=ends.start,
        prefix=ends.prefix,
        scenes=tuple(plan.scene for plan in tape.plans),
        rows=torch.arange(n),
    )


@torch.no_grad()
def replay_deviation(generator: StreamingGenerator, tape: Tape) -> float:
    """Largest |v_replay − v_rollout| over all visited states, relative to the largest |v|.

    If rollout and training evaluated different conditionals (another mask, another context, a stale text cache), every
    ratio and every regression would be biased without a trace; this is where it shows.
    """
    recorded = tape[Predictions].velocities
    gap = (generator.replay(replay_probes(tape)) - recorded).abs().max()
    return float(gap / recorded.abs().max().clamp(min=1e-12))


def check_replay(generator: StreamingGenerator, tape: Tape, tolerance: float) -> str:
    """One line for the start of the run. Raises ValueError above the tolerance."""
    deviation = replay_deviation(generator, tape)
    if not deviation <= tolerance:
        raise ValueError(
            f"replaying a stored rollout gives other velocities (relative deviation {deviation:.2e} > {tolerance:g}): "
            f"rollout and update would train different policies; check the generator's history policy and text cache"
        )
    return f"replay of a stored rollout: relative deviation {deviation:.1e} (tolerance {tolerance:g})"
