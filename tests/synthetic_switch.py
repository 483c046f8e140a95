"""Golden cases of kind b3 with other sizes, sinks, windows and switches than the packaged one, by the dense oracle.

Every pass that was ever made is one more stretch of a growing sequence; what is stored is a table from frame to place.
Nothing of the backbones is used, and nothing is cached: each pass recomputes all passes before it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tests.backbones.micro import noise
from tests.backbones.oracle import Frame, dense_forward
from tests.golden.case import Case
from tests.synthetic_golden import LATENT_HW, MODEL, Oracle, Spans, spans_of


@dataclass(frozen=True)
class Passes:
    """All frames that ever went through a pass, who saw which of them, and the place of each frame that is stored."""

    oracle: Oracle
    texts: Tensor  # [prompts, B, T, D]
    frames: tuple[Frame, ...] = ()
    latents: tuple[Tensor, ...] = ()
    times: tuple[float, ...] = ()
    prompts: tuple[int, ...] = ()
    sight: tuple[tuple[int, ...], ...] = ()
    stored: Mapping[int, int] = field(default_factory=dict)

    def run(
        self,
        ids: Sequence[int],
        x: Tensor,
        time: float,
        prompt: int,
        past: Sequence[int],
        own: Sequence[int] | None = None,
    ) -> "tuple[Tensor, Passes]":
        """(output of one more pass, the passes with it). own: its frames that are seen and stored, None for all."""
        n, kept = len(ids), list(ids if own is None else own)
        places = {frame: len(self.frames) + i for i, frame in enumerate(ids)}
        keys = (*(self.stored[frame] for frame in past), *(places[frame] for frame in kept))
        after = replace(
            self,
            frames=(*self.frames, *(Frame(f, ids[0], ids[-1] + 1, True) for f in ids)),
            latents=(*self.latents, x.double()),
            times=(*self.times, *[time] * n),
            prompts=(*self.prompts, *[prompt] * n),
            sight=(*self.sight, *[keys] * n),
            stored={**self.stored, **{frame: places[frame] for frame in kept}},
        )
        text = torch.stack([self.texts[p] for p in after.prompts], 1).double()
        times = torch.tensor(after.times, dtype=torch.float64).expand(len(x), -1)
        latents = torch.cat(after.latents, 2)
        frames, heads = list(after.frames), MODEL["num_heads"]
        out = dense_forward(self.oracle.wide, heads, latents, times, text, frames, sight=after.sight)
        return out[:, :, -n:], after


@torch.no_grad()
def switch_case(
    lengths: Sequence[int], steps: Sequence[int], sink: int, window: int, switches: Sequence[int], batch: int = 1
) -> Case:
    """The rollout of both variants, written out."""
    spans: Spans = spans_of(lengths)
    oracle = Oracle(batch, spans, sink, window, False)
    texts = noise(9, len(switches) + 1, batch, MODEL["text_len"], MODEL["text_dim"]).float()
    start, renoise = oracle.draw(1), oracle.draw(2, len(steps) - 1)
    u = torch.tensor(steps) / 1000
    sigmas = 5.0 * u / (1 + 4.0 * u)
    times = (1000 * sigmas).double()
    tensors = {
        **oracle.inputs(), "prompt_embeds": texts, "noise": start, "renoise": renoise, "sigmas": sigmas.double(),
        "timesteps": times,
    }  # fmt: skip
    for variant in ("keep_sink", "recache_sink"):
        passes, due, prompt, sink_ids = Passes(oracle, texts), list(switches), 0, list(range(sink))
        latents, velocities = [], []
        for first, stop in spans:
            if due and first >= due[0]:
                due.pop(0)
                prompt += 1
                count = min(window, first)
                ids = list(range(first - count, first))
                x = torch.cat(latents, 2)[:, :, -count:]
                if first <= window or variant == "recache_sink":
                    output, passes = passes.run(ids, x, 0.0, prompt, [])
                    sink_ids = list(range(ids[0], ids[0] + sink))  # some of which may be yet to come
                else:
                    output, passes = passes.run(ids, x, 0.0, prompt, sink_ids, ids[-(window - sink) :])
                tensors[f"recache_velocity.{variant}.{prompt - 1}"] = output.float()
            lowest = max(sink_ids[-1] + 1 if sink_ids else 0, stop - (window - sink))
            past = [f for f in range(first) if f in sink_ids or f >= lowest]
            x, ids, row = start[:, :, first:stop].double(), list(range(first, stop)), []
            for k, sigma in enumerate(sigmas.double()):
                velocity, _ = passes.run(ids, x, float(times[k]), prompt, past)
                row.append(velocity)
                x0 = x - sigma * velocity
                if k + 1 < len(steps):
                    x = (1 - sigmas[k + 1].double()) * x0 + sigmas[k + 1].double() * renoise[k][:, :, first:stop]
            _, passes = passes.run(ids, x0, 0.0, prompt, past)
            latents.append(x0)
            velocities.append(torch.stack(row))
        tensors[f"latents.{variant}"] = torch.cat(latents, 2).float()
        tensors[f"velocity.{variant}"] = torch.cat(velocities, -3).float()
    hparams = {
        "model": MODEL, "batch": batch, "latent_hw": LATENT_HW, "blocks": len(lengths), "frames_per_block": lengths[-1],
        "nominal_steps": list(steps), "timestep_shift": 5.0, "sink_frames": sink,
        "window_frames_including_current_block": window, "switch_frames": list(switches),
        "recache_frames": "min(window, frames generated so far)",
    }  # fmt: skip
    return Case("b3_synthetic", hparams, tensors)
