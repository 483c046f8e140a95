"""Golden cases of kind b6 with other banks, blocks and prompt switches than the packaged one, by the dense oracle.

Every pass that was ever made is one more stretch of a growing sequence; a slot of the bank is, per layer, a place in
it. Nothing of the backbones is used, and nothing is cached: each pass recomputes all passes before it.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.backbones.micro import noise
from tests.backbones.oracle import Frame, dense_forward, gelu, rms, turn
from tests.golden.case import Case
from tests.synthetic_golden import LATENT_HW, MODEL, Oracle, spans_of


class BankedPasses:
    """All passes of one clip so far, and the bank of each layer."""

    def __init__(self, oracle: Oracle, texts: Tensor, size: int) -> None:
        self.oracle, self.texts, self.size = oracle, texts.double(), size
        self.frames: list[Frame] = []
        self.latents: list[Tensor] = []
        self.times: list[float] = []
        self.prompts: list[int] = []
        self.sight: list[list[list[int]]] = []  # frame → layer → places
        self.keys: list[Tensor] = []
        self.stored: dict[int, int] = {}
        self.bank: list[list[int]] = [[] for _ in range(MODEL["num_layers"])]
        self.candidate: int | None = None
        self.pointer = 0

    def run(
        self, ids: Sequence[int], x: Tensor, time: float, prompt: int, past: Sequence[int], banks: list[list[int]],
        own: Sequence[int] | None = None, keep: bool = True,
    ) -> Tensor:  # fmt: skip
        """Output of one more pass; it is forgotten again unless it is to be kept, with ``own`` of its frames stored."""
        places = {frame: len(self.frames) + i for i, frame in enumerate(ids)}
        shown = list(ids if own is None else own)
        seen = [*(self.stored[frame] for frame in past), *(places[frame] for frame in shown)]
        frames = [*self.frames, *(Frame(f, ids[0], ids[-1] + 1, True) for f in ids)]
        latents, times = [*self.latents, x.double()], [*self.times, *[time] * len(ids)]
        prompts = [*self.prompts, *[prompt] * len(ids)]
        sight = [*self.sight, *[[[*bank, *seen] for bank in banks]] * len(ids)]
        keys: list[Tensor] = []
        out = dense_forward(
            self.oracle.wide, MODEL["num_heads"], torch.cat(latents, 2), torch.tensor([times], dtype=torch.float64),
            torch.stack([self.texts[p] for p in prompts], 1), frames,
            sight=lambda layer: [places[layer] for places in sight], keys=keys,
        )[:, :, -len(ids) :]  # fmt: skip
        if keep:
            self.frames, self.latents, self.times, self.prompts = frames, latents, times, prompts
            self.sight, self.keys = sight, keys
            self.stored |= {frame: places[frame] for frame in shown}
        return out

    def score(self, layer: int, place: int, prompt: int) -> float:
        """The mean over text tokens, heads and frame tokens of K_text · K_frame / √head_dim."""
        weights, heads = self.oracle.wide, MODEL["num_heads"]

        def linear(y: Tensor, name: str) -> Tensor:
            return F.linear(y, weights[f"{name}.weight"], weights[f"{name}.bias"])

        embed, attn = "condition_embedder.text_embedder", f"blocks.{layer}.attn2"
        text = linear(gelu(linear(self.texts[prompt], f"{embed}.linear_1")), f"{embed}.linear_2")
        text = rms(linear(text, f"{attn}.to_k"), weights[f"{attn}.norm_k.weight"]).unflatten(-1, (heads, -1))
        grid = (LATENT_HW[0] // 2, LATENT_HW[1] // 2)
        frame = turn(self.keys[layer][:, place], self.frames[place].id, grid)
        total = sum(float(a @ b) for h in range(heads) for a in text[0, :, h] for b in frame[0, :, h])
        return total / (text.shape[1] * frame.shape[1] * heads) / (MODEL["dim"] // heads) ** 0.5

    def put(self, prompt: int, blind: bool) -> None:
        """What the first denoising step of a block does to the bank. blind: nobody has read the prompt yet."""
        if self.candidate is None:
            return
        for layer, slots in enumerate(self.bank):
            if self.pointer <= self.size:
                slots[self.pointer - 1 :] = [self.candidate]
                continue
            worth = {place: 0.0 if blind else self.score(layer, place, prompt) for place in slots}
            slots.sort(key=lambda place, worth=worth: -worth[place])
            slots[self.size - 1 :] = [self.candidate]


@torch.no_grad()
def bank_case(
    lengths: Sequence[int], steps: Sequence[int], sink: int, window: int, size: int, interval: int,
    switches: Sequence[int] = (), modes: Sequence[str] = ("single", "interactive"),
) -> Case:  # fmt: skip
    """The rollout of both pipelines, written out; only the second one follows the switches."""
    spans = spans_of(lengths)
    oracle = Oracle(1, spans, sink, window, False)
    texts = noise(9, len(switches) + 1, 1, MODEL["text_len"], MODEL["text_dim"]).float()
    start, renoise = oracle.draw(1), oracle.draw(2, len(steps) - 1)
    u = torch.tensor(steps) / 1000
    sigmas = 5.0 * u / (1 + 4.0 * u)
    times = (1000 * sigmas).double()
    tensors = {
        **oracle.inputs(), "prompt_embeds": texts, "noise": start, "renoise": renoise, "sigmas": sigmas.double(),
        "timesteps": times,
    }  # fmt: skip
    for mode in modes:
        passes, due, prompt = BankedPasses(oracle, texts, size), list(switches) if mode == "interactive" else [], 0
        latents, velocities, table = [], [], []
        for c, (first, stop) in enumerate(spans):
            blind = False
            if due and first >= due[0]:
                due.pop(0)
                prompt += 1
                blind = True
                if passes.candidate is not None and passes.pointer <= size:
                    passes.put(prompt, blind)
                assert all(len(slots) == min((c - 1) // interval + 1, size) for slots in passes.bank)
                count = min(window, first)
                ids = list(range(first - count, first))
                x = torch.cat(latents, 2)[:, :, -count:]
                rolled = first > window
                own, past = (ids[-(window - sink) :], list(range(sink))) if rolled else (ids, [])
                output = passes.run(ids, x, 0.0, prompt, past, [list(b) for b in passes.bank], own)
                tensors[f"recache_velocity.{mode}.{prompt - 1}"] = output.float()
            passes.put(prompt, blind)
            banks = [list(slots) for slots in passes.bank]
            visible = c // interval if c % interval == 0 else c // interval + 1
            assert all(len(slots) == min(visible, size) for slots in banks)
            table.append([[passes.frames[p].id for p in slots] + [-1] * (size - len(slots)) for slots in banks])
            past = [f for f in range(first) if f < sink or f >= max(sink, stop - (window - sink))]
            x, ids, row = start[:, :, first:stop].double(), list(range(first, stop)), []
            for k, sigma in enumerate(sigmas.double()):
                row.append(passes.run(ids, x, float(times[k]), prompt, past, banks, keep=False))
                x0 = x - sigma * row[-1]
                if k + 1 < len(steps):
                    x = (1 - sigmas[k + 1].double()) * x0 + sigmas[k + 1].double() * renoise[k][:, :, first:stop]
            passes.run(ids, x0, 0.0, prompt, past, banks)
            if mode == "single" or c % interval == 0:
                passes.candidate, passes.pointer = passes.stored[first], c // interval + 1
            latents.append(x0)
            velocities.append(torch.stack(row))
        tensors[f"latents.{mode}"] = torch.cat(latents, 2).float()
        tensors[f"velocity.{mode}"] = torch.cat(velocities, -3).float()
        tensors[f"bank_frames.{mode}"] = torch.tensor(table)
    hparams = {
        "model": MODEL, "batch": 1, "latent_hw": LATENT_HW, "blocks": len(lengths), "frames_per_block": lengths[-1],
        "nominal_steps": list(steps), "timestep_shift": 5.0, "sink_frames": sink,
        "window_frames_including_current_block": window, "bank_size": size, "record_interval": interval,
        "switch_frames_interactive": list(switches),
    }  # fmt: skip
    return Case("b6_synthetic", hparams, tensors)
