"""A stream as it is watched: pixels block after block, under prompts that may change before any of them.

directions ─open, switch, cut→ stream ─denoise→ clean block ─decode→ frames, and only then the next direction
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from framework.data.script import Script
from framework.interfaces import StreamingGenerator
from framework.kernels import TransitionKernel
from framework.rollout import denoise_block
from framework.types import VideoBatch


@dataclass(frozen=True)
class Direction:
    """What changes before a block. prompts: one per clip, None where it stays. cut: a new shot, which has no past."""

    prompts: tuple[str | None, ...]
    cut: bool = False


@dataclass(frozen=True)
class Take:
    """A block that can be watched.

    frames: uint8 [N, T, 3, H, W] on the CPU. first_frame: how many pixel frames of the video are before it. prompts:
    in force [N]. changed: whether one of them took effect with this block. seconds: from the direction to the frames,
    the commit of the block before included. given: whether its latents were given and not generated.
    """

    frames: Tensor
    first_frame: int
    prompts: tuple[str, ...]
    changed: bool
    cut: bool
    seconds: float
    given: bool = False


def film(
    generator: StreamingGenerator,
    directions: Iterable[Direction],
    noise: Callable[[int], Tensor],
    kernel: TransitionKernel,
    *,
    given: Tensor | None = None,
    switches: bool = True,
    refused: Callable[[ValueError], None] | None = None,
) -> Iterator[Take]:
    """Generate and decode a block per direction; a direction is asked for when the block before it has been watched.

    The first direction names every prompt. noise: of block i, [N, 1 + draws, C, f, H, W]. given: latents
    [1 or N, C, F, H, W] of whole blocks that are committed in place of the first generated ones. switches: whether
    prompts may change without a cut. refused: told of a prompt that the generator does not take, after which the
    stream goes on as it was; None raises. What is kept does not grow with the number of blocks.
    """
    size, fps = generator.recipe.block_frames, generator.recipe.fps
    given_blocks = [] if given is None else list(given.split(size, dim=2))
    stream, decode, x0, prompts, shown = None, None, None, (), 0
    directions = iter(directions)
    block = 0
    while True:
        direction = next(directions, None)
        if direction is None:
            return
        with torch.no_grad():  # not around the yield: whoever watches keeps a mode of their own
            started = time.perf_counter()
            cut = stream is None or direction.cut
            if stream is not None and x0 is not None and not cut:
                stream = generator.commit(x0, stream)
            changed = any(prompt is not None for prompt in direction.prompts)
            try:
                if cut:
                    wanted = _all(direction.prompts, prompts)
                    stream, decode, prompts = generator.open(wanted, switches=switches), generator.decoder(), wanted
                elif changed:
                    stream = generator.switch(stream, direction.prompts)
                    prompts = _all(direction.prompts, prompts)
            except ValueError as error:
                if refused is None or stream is None:
                    raise
                refused(error)
                if cut and x0 is not None:
                    stream = generator.commit(x0, stream)
                changed = cut = False
            assert stream is not None and decode is not None, "the first direction opens a stream or raises"
            if block < len(given_blocks):
                x0 = given_blocks[block].expand(len(prompts), -1, -1, -1, -1)
            else:
                x0 = denoise_block(generator, stream, noise(block), kernel).x0
            frames = VideoBatch.from_signed(decode(x0), fps, prompts).frames.cpu()
            seconds = time.perf_counter() - started
        yield Take(frames, shown, prompts, changed, cut, seconds, block < len(given_blocks))
        shown, block = shown + frames.shape[1], block + 1


def _all(new: Sequence[str | None], old: Sequence[str]) -> tuple[str, ...]:
    """The prompts in force. Raises ValueError where a clip has neither a new one nor an old one."""
    known = list(old) if old else [None] * len(new)
    if len(new) != len(known):
        raise ValueError(f"a direction must say something of each of the {len(known)} clips, got {list(new)}")
    prompts = tuple(text for pair in zip(new, known, strict=True) if (text := pair[0] or pair[1]) is not None)
    if len(prompts) != len(new):
        raise ValueError(f"the first direction must name a prompt for each clip, got {list(new)}")
    return prompts


def scripted(scripts: Sequence[Script], block_frames: int, blocks: int) -> Iterator[Direction]:
    """The directions of scripts that cut at the same frames, already `Script.on_blocks`."""
    for frame in range(0, blocks * block_frames, block_frames):
        cues = [script.at(frame) for script in scripts]
        cut = frame > 0 and any(cue is not None and cue.cut for cue in cues)
        yield Direction(tuple(None if cue is None else cue.prompt for cue in cues), cut)
