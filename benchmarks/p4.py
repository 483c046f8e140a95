"""P4: whether memory stays where it is when the stream becomes ten times as long.

Peak live tensor bytes without the weights, counted by `LiveBytes`, at 10× over 1× the length, behind a sink and a
window at absolute positions (no position comes twice, so nothing that is kept per position goes unnoticed).

rollout: `roll_out` of a small group behind a prefix that is 10× longer; the records that it returns are its output and
are taken off. The group is small because the peak of a large one hides what the prefix costs.
generate: the command's own function, which decodes and writes block by block.
long tuning: a whole `Trainer.step` whose window stands behind a prefix that is 10× longer, rollout, scoring and update
included; the prefix's latents are part of it.

Planted leaks must miss the goal: a reader that keeps the latents of every block, a history that forgets nothing, and a
training step on such a history.
"""

import contextlib
import io
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbones.embedded.generator import CONFIG
from backbones.history import FullHistory, HistoryPolicy, SinkWindow
from benchmarks.measure import LiveBytes, Row, storage_bytes
from benchmarks.p1 import build_trainer
from benchmarks.scenarios import draw_blocks, group_plan, random_generator
from framework.commands.generate import generate
from framework.kernels import Consistency
from framework.records import Endpoints
from framework.rollout import denoise_block, roll_out

WINDOW = SinkWindow(sink=3, window=12, relative=False)


def rollout_bytes(config: Mapping[str, Any], policy: HistoryPolicy, prefix: int, group: int, window: int) -> int:
    """Peak of a rollout without its records."""
    generator = random_generator(config, policy)
    with LiveBytes() as counter:
        ends = roll_out(generator, [group_plan(prefix, window, group)], Consistency())[Endpoints]
    records = [ends.latents] if ends.prefix is None else [ends.latents, ends.prefix]
    return counter.peak - storage_bytes(records)


def generation_bytes(config: Mapping[str, Any], policy: HistoryPolicy, blocks: int) -> int:
    """Peak of `generate` with one stream."""
    generator = random_generator(config, policy)
    prompts = [group_plan(0, 1, 1).scene.prompt]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), LiveBytes() as counter:
        generate(generator=generator, output_dir=str(Path(folder) / "videos"), prompts=prompts, blocks=blocks)
    return counter.peak


@torch.no_grad()
def hoarding_bytes(config: Mapping[str, Any], policy: HistoryPolicy, blocks: int) -> int:
    """Peak of a stream whose reader keeps every block: the planted leak."""
    generator, kernel = random_generator(config, policy), Consistency()
    kept: list[Tensor] = []
    with LiveBytes() as counter:
        stream = generator.open([group_plan(0, 1, 1).scene.prompt])
        for block in range(blocks):
            x0 = denoise_block(generator, stream, draw_blocks(generator, [block], 1, kernel), kernel).x0
            stream = generator.commit(x0, stream)
            kept.append(x0)
    return counter.peak


def training_bytes(config: Mapping[str, Any], policy: HistoryPolicy, prefix: int, group: int, window: int) -> int:
    """Peak of a training step on a window behind a prefix."""
    trainer = build_trainer(random_generator(config, policy), 1, group, window, prefix + window)
    with LiveBytes() as counter:
        trainer.step()
    return counter.peak


def growth(measure: Callable[[int], int], length: int, factor: int = 10) -> tuple[float, str]:
    """(bytes at ``factor`` times the length over bytes at the length, both as a note)."""
    short, long = measure(length), measure(factor * length)
    return long / short, f"{length} → {factor * length} blocks, {short / 2**20:.2f} → {long / 2**20:.2f} MiB"


def measure(config: Mapping[str, Any] = CONFIG, length: int = 6, group: int = 2, window: int = 2) -> list[Row]:
    """Rows P4 and their planted leaks. length: blocks at 1×, enough to fill the window."""
    cases: list[tuple[str, Callable[[int], int], bool]] = [
        ("rollout behind a prefix", lambda n: rollout_bytes(config, WINDOW, n, group, window), False),
        ("generate", lambda n: generation_bytes(config, WINDOW, n), False),
        ("long tuning", lambda n: training_bytes(config, WINDOW, n, 4 * group, length + 1), False),
        ("planted: every block kept", lambda n: hoarding_bytes(config, WINDOW, n), True),
        ("planted: full history", lambda n: generation_bytes(config, FullHistory(), n), True),
        ("planted: long tuning, full history", lambda n: training_bytes(config, FullHistory(), n, group, window), True),
    ]
    rows = []
    for what, count, planted in cases:
        value, note = growth(count, length)
        rows.append(Row("P4", f"live bytes at 10× / 1×, {what}", value, 1.02, note=note, planted=planted))
    return rows
