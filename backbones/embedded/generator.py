"""The embedded generator: `CausalWanTransformer3DModel` with 0.9 M parameters on the 16×16 shapes world.

A patch of 8×8×3 numbers is wider than the hidden size, so a velocity head could not carry the noise: the network
predicts x0 and the generator speaks velocity. Pixels are latents, so decoding is the identity.
"""

import importlib.resources
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from backbones.history import HistoryPolicy, SinkWindow
from backbones.recache import BlockwiseRecache, NoRecache, Recache
from backbones.streaming import WanStreamingGenerator
from backbones.wan.transformer import CausalWanTransformer3DModel
from framework.data.shapes import SIZE, VOCABULARY, parse_caption
from framework.interfaces import GeneratorRecipe
from framework.precision import Precision
from framework.schedules import FewStepSchedule
from framework.weights import check_tensors, read_tensors

CONFIG = {
    "patch_size": (1, 8, 8),
    "num_attention_heads": 3,
    "attention_head_dim": 32,
    "in_channels": 3,
    "out_channels": 3,
    "text_dim": len(VOCABULARY),
    "freq_dim": 64,
    "ffn_dim": 288,
    "num_layers": 6,
    "rope_max_seq_len": 64,
}


def embedded_recipe() -> GeneratorRecipe:
    """Blocks of 3 frames, clips of 7 blocks, four sampler steps with shift 5."""
    return GeneratorRecipe(
        name="embedded-shapes",
        block_frames=3,
        clip_blocks=7,
        latent=(3, SIZE, SIZE),
        schedule=FewStepSchedule(),
        prediction="x0",
        fps=8.0,
        source="packaged with armillary",
        licence="Apache-2.0",
    )


class ShapesGenerator(WanStreamingGenerator):
    """The embedded generator with given or fresh weights.

    policy: the history a block sees; the packaged weights were trained with 3 sink + 6 recent + 3 current frames at
    window-relative positions. recache: what a prompt switch does to that history; these weights, which never saw a
    pass over more than a block, turn further behind `BlockwiseRecache` than behind LongLive's joint pass
    (`benchmarks.prompt_switch`).
    """

    def __init__(
        self,
        network: CausalWanTransformer3DModel | None = None,
        policy: HistoryPolicy | None = None,
        recache: Recache | None = None,
        precision: Precision | None = None,
    ) -> None:
        super().__init__(
            network if network is not None else CausalWanTransformer3DModel(**CONFIG),
            embedded_recipe(),
            policy := policy or SinkWindow(sink=3, window=12, relative=True),
            recache or (NoRecache() if policy.recomputes else BlockwiseRecache()),
            precision,
        )

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """One-hot words [P, 6, vocabulary]. Raises ValueError for a caption outside the world's grammar."""
        index = torch.tensor([[VOCABULARY.index(word) for word in str(parse_caption(p)).split()] for p in prompts])
        weight = self.network.patch_embedding.weight
        return torch.nn.functional.one_hot(index, len(VOCABULARY)).to(weight.device, weight.dtype)

    def decode(self, latents: Tensor, prefix: Tensor | None = None) -> Tensor:
        return latents.transpose(1, 2)

    def encode(self, pixels: Tensor) -> Tensor:
        return pixels.transpose(1, 2)


PACKAGED = "student.safetensors"
BASE = "base.safetensors"


def packaged_generator(
    checkpoint: str | None = None,
    policy: HistoryPolicy | None = None,
    recache: Recache | None = None,
    precision: Precision | None = None,
) -> ShapesGenerator:
    """The embedded generator with its packaged weights, or with those of a file that `pretrain` or
    `distill` wrote.

    Raises ValueError for a missing file, or one whose tensors are not exactly this network's; nothing is loaded half.
    """
    return _loaded(_packaged(PACKAGED) if checkpoint is None else Path(checkpoint), policy, recache, precision)


def packaged_base(policy: HistoryPolicy | None = None) -> ShapesGenerator:
    """The many-step base that the packaged student was distilled from: stage 1 of the same `pretrain` run.

    Every call gives a network of its own, so that teacher, critic and student can all start from it.
    """
    return _loaded(_packaged(BASE), policy)


def _packaged(name: str) -> Path:
    return Path(str(importlib.resources.files("backbones.embedded"))) / name


def _loaded(
    path: Path, policy: HistoryPolicy | None, recache: Recache | None = None, precision: Precision | None = None
) -> ShapesGenerator:
    if not path.is_file():
        raise ValueError(f"checkpoint={str(path)!r} is not a file; leave it out for the packaged weights")
    generator = ShapesGenerator(policy=policy, recache=recache, precision=precision)
    weights = read_tensors(path)
    check_tensors(weights, generator.network.state_dict(), str(path))
    generator.network.load_state_dict(weights)
    return generator
