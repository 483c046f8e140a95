"""P3: an update step in one packed replay, or block by block.

a: `replay` of all blocks of the window at once, and one backward pass: clean blocks without a graph, then the noisy
blocks side by side.
b: the window streamed: each noisy block is asked with a graph behind the committed clean blocks before it and pulled
back at once; then the clean block is committed without a graph. Text K/V are encoded once and share their graph, as in
a.

Same probes, same cotangents; the gradients must be equal. a is what training uses, so it has to be the faster one. Its
graph spans all blocks, b's one block: the price in bytes is reported.

Chunked: an objective that couples the branches of a group takes its backward pass in micro-batches; the peak of live
bytes must not grow with G. What is kept from the first pass to the second, the frozen policies' velocities, is data
like the probes themselves and is taken off. One micro-batch for the whole group is the planted leak.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from backbones.embedded.generator import CONFIG, ShapesGenerator
from backbones.wan.transformer import TextKV
from benchmarks.measure import LiveBytes, Row, alternate
from benchmarks.scenarios import random_generator, routed_plan
from framework.adapters import FullFineTuning
from framework.data.shapes import CAPTIONS
from framework.kernels import Consistency
from framework.optimization import Constant
from framework.policies import Policies
from framework.records import Anchors, Displacements, Endpoints
from framework.rng import Streams, draw_noise
from framework.rollout import roll_out
from framework.types import Advantage, Loss, Objective, Probes, Scene, Statistics
from strategies.surrogates.gibbs_tve import GibbsTVE


def make_probes(generator: ShapesGenerator, clips: int, blocks: int) -> tuple[Probes, Tensor]:
    """Random probes of clips of as many prompts, an own level for each block, and cotangents."""
    recipe = generator.recipe
    channels, height, width = recipe.latent
    frames = blocks * recipe.block_frames
    shape = (channels, frames, height, width)
    clean, noisy, cotangent = (draw_noise(range(first, first + clips), shape) for first in (0, 1000, 2000))
    levels = torch.tensor([recipe.schedule.sigmas[block % len(recipe.schedule.sigmas)] for block in range(blocks)])
    return Probes(
        noisy=noisy.unsqueeze(1),
        sigma=levels.repeat_interleave(recipe.block_frames).expand(clips, 1, -1),
        clean=clean,
        start=0,
        prefix=None,
        scenes=tuple(Scene.single(str(caption)) for caption in CAPTIONS[:clips]),
        rows=torch.arange(clips),
    ), cotangent.unsqueeze(1)


def packed(generator: ShapesGenerator, probes: Probes, cotangent: Tensor) -> None:
    """Accumulate the gradient in one pass."""
    generator.replay(probes).backward(cotangent)


def block_by_block(generator: ShapesGenerator, probes: Probes, cotangent: Tensor, forgetful: bool = False) -> None:
    """Accumulate the same gradient a block at a time. forgetful: commit nothing after the first block (planted)."""
    size = generator.recipe.block_frames
    stream = generator.open(probes.prompts)
    text = stream.text
    leaves = TextKV(tuple((k.detach().requires_grad_(), v.detach().requires_grad_()) for k, v in text.layers))
    stream = replace(stream, text=leaves)
    for first in range(0, probes.clean.shape[2], size):
        part = slice(first, first + size)
        velocity = generator.predict(probes.noisy[:, 0, :, part], float(probes.sigma[0, 0, first]), stream)
        velocity.backward(cotangent[:, 0, :, part])
        with torch.no_grad():
            before = generator.commit(probes.clean[:, :, part], stream)
        stream = stream if forgetful and first else before
    made = [tensor for layer in text.layers for tensor in layer]
    torch.autograd.backward(made, [leaf.grad for layer in leaves.layers for leaf in layer])


def gradients(generator: ShapesGenerator, work: Any) -> list[Tensor]:
    """The gradient of every parameter that got one."""
    generator.network.zero_grad(set_to_none=True)
    work()
    return [p.grad.clone() for p in generator.network.parameters() if p.grad is not None]


def relative_gap(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """‖a − b‖ / ‖b‖ over all parameters."""
    assert len(left) == len(right), "other parameters got a gradient"
    apart = sum(float((a - b).square().sum()) for a, b in zip(left, right, strict=True))
    return (apart / sum(float(b.square().sum()) for b in right)) ** 0.5


def peak(work: Any) -> int:
    with LiveBytes() as counter:
        work()
    return counter.peak


def chunked_bytes(config: Mapping[str, Any], group: int, clips: int) -> int:
    """Peak of the backward pass of a routed group in micro-batches, without the kept velocities of the old policy."""
    generator = random_generator(config)
    policies = Policies(generator, FullFineTuning(), Constant(0.0), 0.9, 0)
    plan = routed_plan(5, 2, group, routed_frames=3)
    tape = roll_out(generator, [plan], Consistency(), frozenset({Displacements, Anchors, Endpoints}))
    policies.stepped()  # the old policy is asked for itself
    surrogate, branches = GibbsTVE(), ~tape.anchors
    (probes,) = surrogate.probes(tape, generator.recipe, Streams(0))
    values = torch.linspace(-1, 1, len(branches)).where(branches, 0)
    advantage = Advantage(values, branches, tape.groups)

    def judge(statistics: Statistics, rows: Tensor) -> Objective:
        return surrogate.objective(statistics, advantage[rows])

    loss = Loss(surrogate.views, surrogate.statistics, judge, surrogate.coupled)
    for parameter in policies.parameters.values():
        parameter.grad = torch.zeros_like(parameter)  # gradients are there in every step but the first
    kept = probes.noisy.nbytes if clips < len(probes) else 0
    return peak(lambda: policies.backward(loss, probes, clips, int(branches.sum()))) - kept


def measure(
    config: Mapping[str, Any] = CONFIG, lengths: Sequence[int] = (7, 21), clips: int = 4, pairs: int = 9,
    groups: tuple[int, int] = (4, 16),
) -> list[Row]:  # fmt: skip
    """Rows P3."""
    rows = []
    for blocks in lengths:
        generator = random_generator(config)
        probes, cotangent = make_probes(generator, clips, blocks)

        def a(probes=probes, cotangent=cotangent, generator=generator) -> None:
            packed(generator, probes, cotangent)

        def b(probes=probes, cotangent=cotangent, generator=generator) -> None:
            block_by_block(generator, probes, cotangent)

        def wrong(probes=probes, cotangent=cotangent, generator=generator) -> None:
            block_by_block(generator, probes, cotangent, forgetful=True)

        expected = gradients(generator, b)
        for what, work, planted in (("", a, False), (", planted: one block of history", wrong, True)):
            gap = relative_gap(gradients(generator, work), expected)
            measure = f"‖gradient − gradient block by block‖ / ‖·‖, {blocks} blocks{what}"
            rows.append(Row("P3", measure, gap, 1e-4, note=f"{gap:.1e}", planted=planted))
        ratio = alternate(a, b, pairs)
        measure = f"update step, packed / block by block, {blocks} blocks"
        rows.append(Row("P3", measure, ratio.median, 1.0, ratio.spread, note=ratio.note))
        one, other = peak(a), peak(b)
        note = f"{one / 2**20:.1f} / {other / 2**20:.1f} MiB"
        rows.append(Row("P3", f"its live bytes, packed / block by block, {blocks} blocks", one / other, note=note))
    for what, count, planted in (("one clip at a time", 1, False), ("planted: all at once", max(groups) + 1, True)):
        few, many = (chunked_bytes(config, group, count) for group in groups)
        note = f"{few / 2**20:.2f} → {many / 2**20:.2f} MiB"
        measure = f"live bytes of a coupled update, G = {groups[0]} → {groups[1]}, {what}"
        rows.append(Row("P3", measure, many / few, 1.02, note=note, planted=planted))
    return rows
