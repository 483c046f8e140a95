"""One packed pass over a clip asks what a cached rollout asked.

Statement. Let v(x, σ | C) be the velocity of a block behind the clean blocks C that its history policy shows. A packed
pass over (N_1, C_1, N_2, C_2, …), each noisy block seeing itself and the clean twins of the blocks before it, gives
exactly v(N_j, σ_j | C_{<j}) for all j at once, at any mixture of levels; so does a pass behind a prefix of clean
blocks.

Instance. An embedded generator of two layers with sink and window, five blocks, so that blocks are evicted.
"""

from dataclasses import replace

import torch
from torch import Tensor

from backbones.embedded.generator import CONFIG, ShapesGenerator
from backbones.history import HistoryPolicy, SinkWindow
from backbones.wan.transformer import CausalWanTransformer3DModel
from framework.data.shapes import CAPTIONS
from framework.types import Probes, Scene
from theory_checks.statement import Finding, worst

BLOCK, BLOCKS = 3, 5
SMALL = {**CONFIG, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "freq_dim": 16}


def small_generator(policy: HistoryPolicy) -> ShapesGenerator:
    """Random float64 weights, none of them zero: fresh biases and gates would hide what passes through them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        network = CausalWanTransformer3DModel(**SMALL)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    return ShapesGenerator(network.double(), policy)


def random_clips(generator: ShapesGenerator, clips: int = 2, blocks: int = BLOCKS) -> Probes:
    """Noisy and clean clips of one prompt, every block at a level of its own."""
    random = torch.Generator().manual_seed(12)
    channels, height, width = generator.recipe.latent
    shape = (clips, channels, BLOCK * blocks, height, width)
    levels = 0.1 + 0.9 * torch.rand(clips, 1, blocks, generator=random, dtype=torch.float64)
    return Probes(
        noisy=torch.randn(shape, generator=random, dtype=torch.float64).unsqueeze(1),
        sigma=levels.repeat_interleave(BLOCK, 2),
        clean=torch.randn(shape, generator=random, dtype=torch.float64),
        start=0,
        prefix=None,
        scenes=(Scene.single(str(CAPTIONS[0])),),
        rows=torch.arange(clips),
    )


def cached(generator: ShapesGenerator, probes: Probes, history: Tensor) -> Tensor:
    """Velocities of each block behind a stream that commits the blocks of ``history``."""
    stream = generator.fork(generator.open(probes.prompts), len(probes))
    velocities = torch.zeros_like(probes.noisy[:, 0])
    for first in range(0, velocities.shape[2], BLOCK):
        part = slice(first, first + BLOCK)
        for row in range(len(probes)):
            level = float(probes.sigma[row, 0, first])
            velocities[row, :, part] = generator.predict(probes.noisy[:, 0, :, part], level, stream)[row]
        stream = generator.commit(history[:, :, part], stream)
    return velocities


@torch.no_grad()
def check() -> Finding:
    """Packed, cached, and packed behind a prefix; planted: a history of noisy blocks, and one block too few shown."""
    policy = SinkWindow(BLOCK, 3 * BLOCK)
    generator = small_generator(policy)
    probes = random_clips(generator)
    packed, streamed = generator.replay(probes)[:, 0], cached(generator, probes, probes.clean)
    residual = float((packed - streamed).abs().max())
    planted = float((packed - cached(generator, probes, probes.noisy[:, 0])).abs().max())
    narrow = small_generator(SinkWindow(BLOCK, 2 * BLOCK))
    planted = min(planted, float((packed - narrow.replay(probes)[:, 0]).abs().max()))

    shared = probes.clean[:1, :, : 2 * BLOCK]
    joined = replace(probes, clean=torch.cat([shared.expand(2, -1, -1, -1, -1), probes.clean[:, :, 2 * BLOCK :]], 2))
    tail = replace(
        joined, noisy=joined.noisy[:, :, :, 2 * BLOCK :], sigma=joined.sigma[:, :, 2 * BLOCK :],
        clean=joined.clean[:, :, 2 * BLOCK :], start=2 * BLOCK, prefix=shared,
    )  # fmt: skip
    behind = generator.replay(joined)[:, 0, :, 2 * BLOCK :] - generator.replay(tail)[:, 0]
    residual = worst(residual, float(behind.abs().max()))
    return Finding("one packed pass = a cached rollout, with sink, window and prefix",
                   "2 layers, 5 blocks, 2 clips, fp64", residual, 1e-11, planted)  # fmt: skip
