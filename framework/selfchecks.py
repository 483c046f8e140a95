"""What a run proves about itself before it starts: printed once, refused when it fails."""

import math

import torch

from framework.interfaces import GeneratorRecipe, StreamingGenerator, SurrogatePolicy
from framework.records import Endpoints, Predictions
from framework.rng import Streams
from framework.types import Advantage, Probes, Tape

RATIO = "ratio_mean"
"""The metric in which a surrogate with an importance ratio reports it, per clip."""


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
def replay_deviation(generator: StreamingGenerator, tape: Tape, clips: int | None = None) -> float:
    """Largest |v_replay − v_rollout| over all visited states, relative to the largest |v|.

    clips: replayed at a time at most, None for all; an update's micro-batch keeps it within an update's memory.

    If rollout and training evaluated different conditionals (another mask, another context, a stale text cache), every
    ratio and every regression would be biased without a trace; this is where it shows.
    """
    recorded = tape[Predictions].velocities
    probes, branches = replay_probes(tape), len(tape.plans[0].branches)
    at_once = len(recorded) if clips is None else clips
    # an update may leave anchors out, so that its micro-batch divides other groups than these
    parts = probes.split(at_once if at_once >= branches else math.gcd(at_once, branches))
    gap = torch.stack([(generator.replay(part) - recorded[part.rows]).abs().max() for part in parts]).max()
    return float(gap / recorded.abs().max().clamp(min=1e-12))


def check_replay(generator: StreamingGenerator, tape: Tape, tolerance: float, clips: int | None = None) -> str:
    """One line for the start of the run. Raises ValueError above the tolerance."""
    deviation = replay_deviation(generator, tape, clips)
    if not math.isfinite(deviation):
        raise ValueError(
            "replaying a stored rollout gives non-finite velocities: the generator's weights, its adapter or its "
            "sampler are broken before any training; check the checkpoint and the kernel's noise level"
        )
    if deviation > tolerance:
        raise ValueError(
            f"replaying a stored rollout gives other velocities (relative deviation {deviation:.2e} > {tolerance:g}): "
            f"rollout and update would train different policies; check the generator's history policy and text cache"
        )
    return f"replay of a stored rollout: relative deviation {deviation:.1e} (tolerance {tolerance:g})"


def ratio_deviation(
    generator: StreamingGenerator, surrogate: SurrogatePolicy, tape: Tape, streams: Streams, clips: int
) -> float:
    """Largest |ρ − 1| of an update before the first one: the policy that rolled out is asked for both densities.

    The current policy is asked as training asks it, with a graph and in micro-batches of ``clips``; the old one as it
    is asked beside it, without. Anything that differs between two such calls, be it unseeded noise in the context,
    dropout or a cache, is a ratio that is wrong before the policy has moved.
    """
    recipe: GeneratorRecipe = generator.recipe
    worst = 0.0
    for probes in surrogate.probes(tape, recipe, streams):
        measured = []
        for part in probes.split(clips):
            with torch.enable_grad():
                current = generator.replay(part).detach()
            with torch.no_grad():
                old = generator.replay(part)
            views = dict.fromkeys(surrogate.views, old) | {"current": current}
            measured.append(surrogate.statistics(views, part))
        joined = {name: torch.cat([m[name] for m in measured]) for name in measured[0]}
        rows = probes.rows
        explored = ~tape.anchors.to(rows.device)[rows]
        even = Advantage(torch.ones(len(rows), device=rows.device), explored, tape.groups.to(rows.device)[rows])
        ratio = surrogate.objective(joined, even).metrics[RATIO]
        worst = max(worst, float((ratio - 1).abs()[explored].max()))
    return worst


def check_ratio(
    generator: StreamingGenerator, surrogate: SurrogatePolicy, tape: Tape, streams: Streams, clips: int
) -> list[str]:
    """One line for the start of the run of a surrogate with a ratio, none for others. Raises ValueError unless it is 1.

    The tolerance is that of sums in another order: both sides make the same calls.
    """
    if not surrogate.has_ratio:
        return []
    deviation = ratio_deviation(generator, surrogate, tape, streams, clips)
    if not deviation <= 1e-5:
        raise ValueError(
            f"{type(surrogate).__name__}'s ratio is not 1 before the first update (max |ratio − 1| = {deviation:.1e}): "
            f"the generator gives two answers to the same question; look for unseeded noise, dropout or a cache in its "
            f"replay"
        )
    return [f"ratio before the first update: max |ratio − 1| = {deviation:.1e}"]
