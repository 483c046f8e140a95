"""Where gradient goes in a packed pass with history.

Statement. With L_j the loss of noisy block j, dL_j/dC_i of a clean block is

    not 0   for i < j where the history is attached (every later loss reaches the encoding of an earlier block),
    0       for i = j (never from its own twin's) and for i > j,
    0       for all i where the history is detached, with the same values of L_j;

and dL_j/dN_i = 0 for noisy blocks i ≠ j in both.
"""

from dataclasses import replace

import torch
from torch import Tensor

from backbones.embedded.generator import ShapesGenerator
from backbones.history import FullHistory
from framework.types import Probes
from theory_checks.packed_cached import BLOCK, random_clips, small_generator
from theory_checks.statement import Finding, worst

SEEN = 1e-6
"""A gradient that is there is larger."""


def sizes(generator: ShapesGenerator, probes: Probes, shift: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(max |dL_j/dC_i|, max |dL_j/dN_i|) [blocks, blocks] and L_j [blocks], L_j = ⟨v_j²⟩.

    shift: how many blocks too late a clean block's place is asked from; 1 shows every block its own twin.
    """
    clean, noisy = probes.clean.clone().requires_grad_(), probes.noisy.clone().requires_grad_()
    velocity = generator.replay(replace(probes, clean=clean.roll(-shift * BLOCK, 2), noisy=noisy))
    losses = torch.stack([block.square().mean() for block in velocity.split(BLOCK, 3)])
    rows = []
    for loss in losses:
        found = torch.autograd.grad(loss, (clean, noisy), retain_graph=True, allow_unused=True)
        blocks = (
            torch.zeros(len(losses), dtype=clean.dtype)
            if gradient is None
            else gradient.abs().movedim(-3, 0).flatten(1).amax(1).view(-1, BLOCK).amax(1)
            for gradient in found
        )
        rows.append(tuple(blocks))
    of_clean, of_noisy = (torch.stack(column) for column in zip(*rows, strict=True))
    return of_clean, of_noisy, losses.detach()


def violation(of_clean: Tensor, of_noisy: Tensor) -> float:
    """Largest gradient where none may be; 1 where one is missing."""
    later = torch.ones_like(of_clean).tril(-1).bool()
    stray = worst(float(of_clean[~later].max()), float(of_noisy.fill_diagonal_(0).max()))
    return worst(stray, float((of_clean[later] < SEEN).any()))


def check() -> Finding:
    """All pairs of blocks; planted: every block sees its own clean twin, and a history that is not detached."""
    generator = small_generator(FullHistory())
    probes = random_clips(generator, clips=1, blocks=4)
    of_clean, of_noisy, losses = sizes(generator, replace(probes, history_grad=True))
    none, apart, same = sizes(generator, probes)
    residual = worst(violation(of_clean, of_noisy), float(none.max()), float((losses - same).abs().max()))
    residual = worst(residual, float(apart.fill_diagonal_(0).max()))
    own_twin, _, _ = sizes(generator, replace(probes, history_grad=True), shift=1)
    planted = min(violation(own_twin, of_noisy), float(of_clean.max()))
    return Finding("dL_j/dC_i ≠ 0 iff i < j and the history is attached; never from its own twin",
                   "2 layers, 4 blocks, every pair, fp64", residual, 1e-12, planted)  # fmt: skip
