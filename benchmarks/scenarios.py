"""What the benchmarks run: generators with random weights and groups of the shapes world."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from backbones.embedded.generator import CONFIG, ShapesGenerator
from backbones.history import HistoryPolicy
from backbones.streaming import WanStream
from backbones.wan.transformer import CausalWanTransformer3DModel
from framework.data.shapes import CAPTIONS
from framework.kernels import TransitionKernel
from framework.rng import Streams, draw_noise
from framework.rollout import generate_prefix, noise_shape
from framework.types import BranchPlan, GroupPlan, Route, Scene
from strategies.exploration.causal_history_routing import IndependentDraws, routable

MIDDLE: dict[str, Any] = {
    **CONFIG, "patch_size": (1, 4, 4), "num_attention_heads": 4, "attention_head_dim": 64, "ffn_dim": 1024,
}  # fmt: skip
"""Seven times the parameters and four times the tokens of the embedded network."""

MINIATURE: dict[str, Any] = {
    **CONFIG, "num_attention_heads": 1, "attention_head_dim": 12, "ffn_dim": 16, "num_layers": 1,
}  # fmt: skip
"""Small enough to try every row within seconds; its timings mean nothing."""


def random_generator(config: Mapping[str, Any] = CONFIG, policy: HistoryPolicy | None = None) -> ShapesGenerator:
    """A generator of the shapes world with fixed random weights: cost does not depend on their values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = CausalWanTransformer3DModel(**config)
    return ShapesGenerator(network, policy)


def group_plan(first_block: int, blocks: int, branches: int, group: int = 0) -> GroupPlan:
    """A group behind a shared prefix of ``first_block`` blocks, whose branches differ in their noise."""
    return GroupPlan(
        group=group,
        scene=Scene.single(str(CAPTIONS[group])),
        first_block=first_block,
        blocks=blocks,
        prefix_seed=1000 + group,
        branches=tuple(BranchPlan(10 * group + b) for b in range(branches)),
    )


def routed_plan(
    first_block: int, blocks: int, branches: int, routed_frames: int, recent: int = 3, sink: int = 3
) -> GroupPlan:
    """A routed group behind a shared prefix of blocks of three frames, the whole window routed in half of the steps.

    ``branches`` of them are routed, to frames of all the prefix; an anchor comes on top.
    """
    pool = routable(3 * first_block, sink, recent)
    drawn = IndependentDraws().draw(pool, routed_frames, branches, Streams(0))
    # one branch holds the oldest frame, so that every draw keeps the same history alive
    routes = [tuple(sorted({pool[0], *drawn[0][1:]})), *drawn[1:]]
    steps = (True, True, False, False)
    seed = 10
    return replace(
        group_plan(first_block, blocks, 1),
        branches=(
            *(BranchPlan(seed, Route(frames, sink, recent, blocks, steps)) for frames in routes),
            BranchPlan(seed, anchor=True),
        ),
    )


def draw_blocks(generator: ShapesGenerator, seeds: Sequence[int], blocks: int, kernel: TransitionKernel) -> Tensor:
    """Noise [N, 1 + draws, C, F, H, W] of whole windows, as `roll_out` draws it."""
    return draw_noise(seeds, noise_shape(generator, kernel, blocks))


def roll_prefix(generator: ShapesGenerator, plan: GroupPlan, kernel: TransitionKernel) -> WanStream:
    """The prefix of a group alone: the stream of one clip after it."""
    stream, _ = generate_prefix(generator, [plan], kernel)
    assert isinstance(stream, WanStream), "a generator continues the kind of stream that it opened"
    return stream
