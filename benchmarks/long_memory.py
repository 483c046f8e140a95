"""What long training keeps alive: {whole sequence, one clip} × {full back-propagation, detached history}, in miniature.

    python -m benchmarks.long_memory

Peak live tensor bytes, weights taken off, of one update on a stream of 7 blocks and on one ten times as long, beside
what Astrolabe (2603.17051, its memory table) reports for 30 s of video on a 1.3B generator. "sequence": every block has
a loss; "clip": the last 7 do. "full": clean blocks are committed with a graph, so the loss of a block reaches the
encoding of all earlier ones; "detach": without. The last row is what training does: `Policies.backward` on a window,
the prefix re-rolled with clean passes in constant memory.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from backbones.embedded.generator import CONFIG, ShapesGenerator
from backbones.history import SinkWindow
from benchmarks.measure import LiveBytes, machine
from benchmarks.scenarios import group_plan, random_generator
from framework.adapters import LoRA
from framework.optimization import Constant
from framework.policies import CURRENT, Policies
from framework.types import Loss, Objective, Probes

PAPER = {
    ("sequence", "full"): "out of memory (> 140 GB)",
    ("sequence", "detach"): "96.4 GB",
    ("clip", "full"): "112.3 GB",
    ("clip", "detach"): "54.3 GB",
}
LEVEL = 0.625
"""Noise level of all probes."""


def streamed_update(generator: ShapesGenerator, latents: Tensor, trained: int, attached: bool) -> None:
    """Loss on the last ``trained`` blocks of a stream, clean blocks committed with or without a graph; backward."""
    size = generator.recipe.block_frames
    blocks = latents.split(size, dim=2)
    stream = generator.open([group_plan(0, 1, 1).scene.prompt])
    loss = torch.zeros(())
    for i, block in enumerate(blocks):
        if i >= len(blocks) - trained:
            loss = loss + generator.predict(block, LEVEL, stream).square().mean()
        with torch.set_grad_enabled(attached):
            stream = generator.commit(block, stream)
    loss.backward()
    generator.network.zero_grad(set_to_none=True)


def window_update(generator: ShapesGenerator, latents: Tensor, trained: int) -> None:
    """The same clip as `Policies.backward` trains it."""
    start = latents.shape[2] - trained * generator.recipe.block_frames
    clip = latents[:, :, start:]
    probes = Probes(
        noisy=clip.unsqueeze(1), sigma=torch.full((1, 1, clip.shape[2]), LEVEL), clean=clip, start=start,
        prefix=latents[:, :, :start] if start else None, scenes=(group_plan(0, 1, 1).scene,),
        rows=torch.arange(1),
    )  # fmt: skip
    policies = Policies(generator, LoRA(), Constant(0.0), 0.9, seed=0)
    loss = Loss(
        frozenset({CURRENT}),
        lambda views, _: {"energy": views[CURRENT].square().flatten(1).mean(1)},
        lambda statistics, _: Objective(statistics["energy"]),
    )
    policies.backward(loss, probes, 1, 1)


def peak(update: Callable[[ShapesGenerator, Tensor], None], blocks: int) -> int:
    """Peak live bytes of an update on a stream of so many blocks; its latents are there before."""
    generator = random_generator(CONFIG, SinkWindow(sink=3, window=12, relative=False))
    shape = (1, generator.recipe.latent[0], blocks * generator.recipe.block_frames, *generator.recipe.latent[1:])
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with LiveBytes() as counter:
        update(generator, latents)
    return counter.peak


def rows(length: int = 7, factor: int = 10) -> list[tuple[str, str, int, int, str]]:
    """(what has a loss, how far it reaches, bytes at 1×, bytes at ``factor`` ×, the paper's figure)."""
    found = []
    for trained, name in ((None, "sequence"), (length, "clip")):
        for attached, reach in ((True, "full"), (False, "detach")):
            sizes = [
                peak(lambda g, x, b=b, t=trained, a=attached: streamed_update(g, x, t or b, a), b)
                for b in (length, factor * length)
            ]
            found.append((name, reach, sizes[0], sizes[1], PAPER[name, reach]))
    sizes = [peak(lambda g, x: window_update(g, x, length), b) for b in (length, factor * length)]
    found.append(("clip", "detach, packed (training)", sizes[0], sizes[1], "–"))
    return found


def main() -> None:
    torch.set_num_threads(1)
    print(f"{machine()}\n")
    print("| loss on | history | 7 blocks, MiB | 70 blocks, MiB | ratio | paper, 30 s on 1.3B |")
    print("|---|---|---|---|---|---|")
    for name, reach, short, long, paper in rows():
        print(f"| {name} | {reach} | {short / 2**20:.1f} | {long / 2**20:.1f} | {long / short:.3f} | {paper} |")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
