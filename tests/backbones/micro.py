"""The micro network of the backbone tests: 22 thousand parameters, none of which a comparison multiplies by zero."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from hypothesis import strategies as st
from torch import Tensor

from backbones.history import FullHistory, HistoryPolicy, SinkWindow
from backbones.streaming import WanStreamingGenerator
from backbones.wan.transformer import CausalWanTransformer3DModel
from framework.interfaces import GeneratorRecipe
from framework.schedules import FewStepSchedule
from framework.types import Probes, Scene

LATENT = (16, 4, 4)
TEXT = (5, 16)
PROMPTS = ("a red square", "a blue disc", "nothing at all")


def micro_config(heads: int = 2) -> dict:
    """Constructor arguments of the micro network."""
    return {
        "num_attention_heads": heads,
        "attention_head_dim": 12,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": TEXT[1],
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }


def perturb(network: torch.nn.Module, seed: int = 0) -> None:
    """Move every parameter: fresh biases are zero and fresh norms are one, which would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)


@lru_cache
def micro_network(heads: int = 2, dtype: torch.dtype = torch.float64) -> CausalWanTransformer3DModel:
    """A shared network; a test that changes weights or switches builds its own with ``fresh_network``."""
    return fresh_network(heads, dtype)


def fresh_network(heads: int = 2, dtype: torch.dtype = torch.float64) -> CausalWanTransformer3DModel:
    """A network of fixed weights."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        network = CausalWanTransformer3DModel(**micro_config(heads))
    perturb(network)
    return network.double() if dtype == torch.float64 else network


class MicroGenerator(WanStreamingGenerator):
    """The micro network with a random embedding per prompt."""

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        dtype = self.network.proj_out.weight.dtype
        rows = [noise(zlib.crc32(prompt.encode()), *TEXT) for prompt in prompts]
        return torch.stack(rows).to(dtype)

    def decode(self, latents: Tensor, prefix: Tensor | None = None) -> Tensor:
        return latents


def micro_generator(
    policy: HistoryPolicy, block_frames: int, network: CausalWanTransformer3DModel | None = None
) -> MicroGenerator:
    """A generator of blocks of ``block_frames`` frames."""
    recipe = GeneratorRecipe("micro", block_frames, 1, LATENT, FewStepSchedule())
    return MicroGenerator(network or micro_network(), recipe, policy)


def noise(seed: int, *shape: int) -> Tensor:
    """A float64 normal sample."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True)
class Setting:
    """A random situation: geometry of a clip, the policy that a block's history follows, who shares a prompt.

    frames need not be a multiple of block: the last block may be shorter. window None: the full history.
    """

    sink: int
    window: int | None
    relative: bool
    block: int
    frames: int
    heads: int
    prompts: int
    branches: int
    streams: int
    seed: int

    @property
    def policy(self) -> HistoryPolicy:
        return FullHistory() if self.window is None else SinkWindow(self.sink, self.window, self.relative)

    @property
    def clips(self) -> int:
        return self.prompts * self.branches

    @property
    def spans(self) -> list[tuple[int, int]]:
        return [(f, min(f + self.block, self.frames)) for f in range(0, self.frames, self.block)]

    def generator(self, dtype: torch.dtype = torch.float64, policy: HistoryPolicy | None = None) -> MicroGenerator:
        return micro_generator(policy or self.policy, self.block, micro_network(self.heads, dtype))

    def probes(self, *, history_grad: bool = False, dtype: torch.dtype = torch.float64) -> Probes:
        """Random noisy versions of a random clip, an own level for each of their blocks."""
        channels, height, width = LATENT
        levels = torch.rand(
            self.clips, self.streams, len(self.spans), generator=torch.Generator().manual_seed(self.seed + 2)
        ).double()
        sigma = levels.repeat_interleave(self.block, -1)[..., : self.frames]
        return Probes(
            noisy=noise(self.seed, self.clips, self.streams, channels, self.frames, height, width).to(dtype),
            sigma=sigma,
            clean=noise(self.seed + 1, self.clips, channels, self.frames, height, width).to(dtype),
            start=0,
            prefix=None,
            scenes=tuple(map(Scene.single, PROMPTS[: self.prompts])),
            rows=torch.arange(self.clips),
            history_grad=history_grad,
        )


@st.composite
def settings_strategy(draw, min_blocks: int = 1) -> Setting:
    """Settings small enough for a dense mask; every window leaves room for a block beside its sink."""
    block = draw(st.integers(1, 3))
    blocks = draw(st.integers(min_blocks, 4))
    short = draw(st.integers(0, block - 1)) if blocks > 1 else 0
    sink = draw(st.integers(0, 4))
    window = draw(st.none() | st.integers(sink + block, sink + block + 5))
    return Setting(
        sink=sink,
        window=window,
        relative=draw(st.booleans()),
        block=block,
        frames=block * blocks - short,
        heads=draw(st.sampled_from((1, 2))),
        prompts=draw(st.integers(1, 2)),
        branches=draw(st.integers(1, 2)),
        streams=draw(st.integers(1, 2)),
        seed=draw(st.integers(0, 1000)),
    )


EVICTING = Setting(
    sink=2, window=6, relative=False, block=2, frames=10, heads=2, prompts=1, branches=2, streams=1, seed=3
)
"""A setting in which the sink, the window and what lies between them all matter."""
