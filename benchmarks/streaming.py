"""Frames per core-second of streaming generation: how fast the embedded generator streams, one clip or several at once.

Blocks are denoised, committed and thrown away, as `generate` does without writing files.
"""

import statistics
from collections.abc import Mapping
from typing import Any

import torch

from backbones.embedded.generator import CONFIG, ShapesGenerator
from benchmarks.measure import Row, clock
from benchmarks.scenarios import draw_blocks, random_generator
from framework.data.shapes import CAPTIONS
from framework.kernels import Consistency
from framework.rollout import denoise_block


@torch.no_grad()
def stream(generator: ShapesGenerator, clips: int, blocks: int) -> None:
    """Stream so many clips at once, with the sampler's own re-noise steps."""
    kernel = Consistency()
    state = generator.open([str(caption) for caption in CAPTIONS[:clips]])
    for block in range(blocks):
        noise = draw_blocks(generator, [100 * block + i for i in range(clips)], 1, kernel)
        state = generator.commit(denoise_block(generator, state, noise, kernel).x0, state)


def measure(
    config: Mapping[str, Any] = CONFIG, clips: tuple[int, ...] = (1, 8), blocks: int = 10, repeats: int = 5
) -> list[Row]:
    """One row per number of clips."""
    generator = random_generator(config)
    rows = []
    for count in clips:
        stream(generator, count, blocks)
        frames = count * blocks * generator.recipe.block_frames
        rates = [frames / clock(lambda count=count: stream(generator, count, blocks)).core for _ in range(repeats)]
        name = f"streaming, {count} clip{'s' if count > 1 else ''} at once"
        rows.append(Row("FPS", name, statistics.median(rates), spread=(min(rates), max(rates)), unit="frames/core-s"))
    return rows
