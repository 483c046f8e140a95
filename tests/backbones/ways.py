"""The three ways to ask noisy blocks behind a clean past: streamed, packed (the generator's own), and dense."""

from dataclasses import replace

import torch
from torch import Tensor

from backbones.streaming import WanStream
from framework.types import Probes
from tests.backbones.micro import MicroGenerator, Setting
from tests.backbones.oracle import dense_forward, packed_frames

ATOL = {torch.float64: 1e-10, torch.float32: 1e-5}
SEEN = 1e-3
"""What a planted error must move: far above every tolerance."""


def streamed(setting: Setting, generator: MicroGenerator, probes: Probes, stream: WanStream | None = None) -> Tensor:
    """Every noisy block asked behind a cache of clean blocks, one stream and one level at a time."""
    stream = stream or generator.fork(generator.open(probes.prompts), setting.branches)
    out = torch.zeros_like(probes.noisy)
    for start, stop in setting.spans:
        for s in range(probes.noisy.shape[1]):
            for row in range(len(probes)):
                sigma = float(probes.sigma[row, s, start])
                velocity = generator.predict(probes.noisy[:, s, :, start:stop], sigma, stream)
                out[row, s, :, start:stop] = velocity[row]
        stream = generator.commit(probes.clean[:, :, start:stop], stream)
    return out


def dense(setting: Setting, generator: MicroGenerator, probes: Probes, *, detach_clean: bool = False) -> Tensor:
    """The oracle's velocities [N, S, C, F, H, W]."""
    weights = dict(generator.network.named_parameters())
    text = generator.encode_text(probes.prompts).repeat_interleave(setting.branches, 0)
    frames = packed_frames(setting.spans)
    versions = []
    for s in range(probes.noisy.shape[1]):
        x = torch.cat([probes.clean, probes.noisy[:, s]], 2)
        timestep = torch.cat([torch.zeros_like(probes.sigma[:, s]), 1000 * probes.sigma[:, s]], 1)
        out = dense_forward(
            weights, setting.heads, x, timestep, text, frames,
            setting.sink, setting.window, setting.relative, detach_clean,
        )  # fmt: skip
        versions.append(out[:, :, setting.frames :])
    return torch.stack(versions, 1)


def gap(a: Tensor, b: Tensor) -> float:
    return float((a.detach() - b.detach()).abs().max())


def after_prefix(setting: Setting, probes: Probes, blocks: int) -> Probes:
    """The same clips from block ``blocks`` on, behind a prefix that the branches of a prompt share."""
    start = setting.spans[blocks - 1][1]
    return replace(
        probes,
        noisy=probes.noisy[:, :, :, start:],
        sigma=probes.sigma[:, :, start:],
        clean=probes.clean[:, :, start:],
        start=start,
        prefix=probes.clean[:: setting.branches, :, :start],
    )


def with_shared_prefix(setting: Setting, probes: Probes, blocks: int) -> Probes:
    """Clips whose first blocks are those of their group's first branch."""
    start = setting.spans[blocks - 1][1]
    shared = probes.clean[:: setting.branches].repeat_interleave(setting.branches, 0)
    return replace(probes, clean=torch.cat([shared[:, :, :start], probes.clean[:, :, start:]], 2))


def replayed_tail(setting: Setting, generator: MicroGenerator) -> tuple[Probes, int, Tensor, Tensor]:
    """(clips that share their first blocks, how many those are, the replay of the rest, the same as a whole stream)."""
    blocks = 1 + setting.seed % (len(setting.spans) - 1)
    whole = with_shared_prefix(setting, setting.probes(), blocks)
    tail = after_prefix(setting, whole, blocks)
    expected = streamed(setting, generator, whole)[:, :, :, tail.start :]
    return whole, blocks, generator.replay(tail), expected
