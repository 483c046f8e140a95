"""Released checkpoints as recipes: what a file does not say about itself, and the network that comes out of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor, nn

from backbones.history import FullHistory, HistoryPolicy
from backbones.recache import Recache
from backbones.wan.checkpoints import holds_lora, read_weights
from backbones.wan.containers import INDEX, chosen, read_content, read_index, read_state
from backbones.wan.hub import find_file
from backbones.wan.lora import EMBEDDING_LINEARS, LowRank, read_lora
from backbones.wan.transformer import CausalWanTransformer3DModel
from framework.adapters import WAN_LINEARS
from framework.arguments import check_counts
from framework.interfaces import GeneratorRecipe
from framework.reporting.progress import say
from framework.schedules import FewStepSchedule

WAN_1_3B = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30}
WAN_14B = {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 40}
"""Sizes of the two Wan 2.1 networks; everything else of theirs is the default of `CausalWanTransformer3DModel`."""

KEPT_WIDE = ("scale_shift_table", "time_embedder", "time_proj", "norm2")
"""Parts that stay float32 in a narrower network: the time embedding and all modulation, and the one affine LayerNorm.
Timesteps and rotary angles are computed wide in any case."""


@dataclass(frozen=True)
class ReleasedLoRA:
    """An adapter that belongs to a released checkpoint; it is merged into the weights when they are loaded.

    sub_key: the entry of the file, None for a bare PEFT dict; a file that is nothing but a PEFT dict is taken as one
    under any sub_key. rank, alpha: bare dicts carry no alpha. targets: ends of the names of the adapted linear layers,
    in diffusers naming. embeddings: whether the text and time embeddings, the time projection and the head are adapted
    as well, as RAVEN does. The file must hold these and no others.
    """

    repository: str
    file: str
    sub_key: str | None = None
    rank: int = 256
    alpha: float = 256.0
    targets: tuple[str, ...] = WAN_LINEARS
    embeddings: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.rank < 1 or not self.alpha > 0:
            raise ValueError(f"ReleasedLoRA.rank and alpha must be positive, got rank={self.rank}, alpha={self.alpha}")


@dataclass(frozen=True)
class WanRecipe:
    """A released checkpoint of the Wan 2.1 family and how it is meant to be run.

    name: for logs and model cards. repository, file: on the Hugging Face hub. licence: of these weights, said when they
    are fetched. sub_key: the entry of the file that holds the generator, None for a bare state dict. base: the
    diffusers repository with text encoder and VAE. network: sizes, as arguments of `CausalWanTransformer3DModel`.
    block_frames: latent frames denoised together. clip_blocks: blocks of a training clip. latent: (C, H, W).
    schedule: the sampler's σ grid; first_schedule: that of a stream's first block where it is another. policy: which
    history a block sees. recache: what a prompt switch does to it, None for the generator's own default. fps: of the
    video. temporal_stride: pixel frames per latent frame. lora: adapters merged into the weights, in this order.
    """

    name: str
    repository: str
    file: str
    licence: str
    sub_key: str | None = None
    base: str = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    network: Mapping[str, Any] = field(default_factory=WAN_1_3B.copy)
    block_frames: int = 3
    clip_blocks: int = 7
    latent: tuple[int, int, int] = (16, 60, 104)
    schedule: FewStepSchedule = FewStepSchedule()  # noqa: RUF009 (frozen)
    first_schedule: FewStepSchedule | None = None
    policy: HistoryPolicy = FullHistory()  # noqa: RUF009 (frozen)
    recache: Recache | None = None
    fps: float = 16.0
    temporal_stride: int = 4
    lora: tuple[ReleasedLoRA, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "lora", tuple(self.lora))
        object.__setattr__(self, "latent", tuple(self.latent))
        for name in ("name", "repository", "file", "licence", "base"):
            if not getattr(self, name):
                raise ValueError(f"WanRecipe.{name} must not be empty")
        check_counts(
            "WanRecipe.", block_frames=self.block_frames, clip_blocks=self.clip_blocks,
            temporal_stride=self.temporal_stride,
        )  # fmt: skip

    @property
    def source(self) -> str:
        """Where the weights come from, in one line."""
        adapters = "".join(f" + {lora.repository}: {lora.file}" for lora in self.lora)
        return f"{self.repository}: {self.file}{f' [{self.sub_key}]' if self.sub_key else ''}{adapters}"

    def generator_recipe(self) -> GeneratorRecipe:
        """What training and sampling need to know of it."""
        return GeneratorRecipe(
            name=self.name,
            block_frames=self.block_frames,
            clip_blocks=self.clip_blocks,
            latent=self.latent,
            schedule=self.schedule,
            fps=self.fps,
            temporal_stride=self.temporal_stride,
            first_schedule=self.first_schedule,
            source=self.source,
            licence=self.licence,
        )


def load_network(
    recipe: WanRecipe, folder: str | None = None, dtype: torch.dtype = torch.bfloat16, device: str = "cpu"
) -> CausalWanTransformer3DModel:
    """The network of a recipe with its weights, released adapters merged.

    folder: where files are looked for before the hub. dtype: of the weights, but for what `KEPT_WIDE` names. device:
    "meta" gives the network without weights, and needs no file. Everything is checked before the first tensor is
    copied, and one tensor is converted at a time. Raises ValueError in one line for files that are missing, damaged,
    partial or of another network, and for numbers that are not finite.
    """
    network = empty_network(recipe.network)
    expected = dict(network.state_dict())
    if torch.device(device).type == "meta":
        return assigned(network, {name: torch.empty_like(t, dtype=stored(name, dtype)) for name, t in expected.items()})
    path = found(recipe.repository, recipe.file, folder, recipe.licence)
    state = read_state(path, recipe.sub_key)
    if holds_lora(state):
        raise ValueError(f"{path} holds adapters, not a network; name it in WanRecipe.lora and the base in file")
    weights = read_weights(state, expected, str(path))
    updates = [read_released(lora, expected, folder, recipe.licence) for lora in recipe.lora]
    left = f", {len(weights.left_out)} other entries left out" if weights.left_out else ""
    say(f"{recipe.name}: {len(weights.tensors)} tensors of {path}{left}")
    convert = partial(converted, updates=updates, dtype=dtype, device=device, source=recipe.source)
    network = assigned(network, {name: convert(name, tensor) for name, tensor in weights.tensors.items()})
    config = network.config
    rope = WanRotaryPosEmbed(config["attention_head_dim"], config["patch_size"], config["rope_max_seq_len"])
    network.rope = rope.to(device)  # buffers are in no file, and those of the meta device hold nothing
    return network


def empty_network(sizes: Mapping[str, Any]) -> CausalWanTransformer3DModel:
    """The network on the meta device. Raises ValueError for sizes it does not have."""
    try:
        with torch.device("meta"):
            return CausalWanTransformer3DModel(**sizes)
    except TypeError as error:
        raise ValueError(f"WanRecipe.network={dict(sizes)}: {error}") from error


def found(repository: str, file: str, folder: str | None, licence: str) -> Path:
    """The path of a file, with the shards beside it where it is an index."""
    path = find_file(repository, file, folder, licence)
    if path.name.endswith(INDEX):
        for shard in sorted(set(read_index(path).values())):
            if not (path.parent / shard).is_file():
                find_file(repository, str(PurePosixPath(file).parent / shard), folder, licence)
    return path


def read_released(
    lora: ReleasedLoRA, expected: Mapping[str, Tensor], folder: str | None, licence: str
) -> dict[str, LowRank]:
    """The updates of a released adapter."""
    path = found(lora.repository, lora.file, folder, licence)
    state = read_adapter(path, lora.sub_key)
    say(f"  {len(state)} tensors of {path}, rank {lora.rank}, alpha {lora.alpha:g}, merged")
    targets = (*lora.targets, *(EMBEDDING_LINEARS if lora.embeddings else ()))
    return read_lora(state, expected, str(path), rank=lora.rank, alpha=lora.alpha, targets=targets)


def read_adapter(path: Path, sub_key: str | None) -> dict[str, Tensor]:
    """The PEFT dict in a file: under its sub-key, or the whole file where that holds nothing else."""
    content = read_content(path)
    bare = all(isinstance(key, str) and holds_lora([key]) for key in content)
    return chosen(content, None if bare else sub_key, path)


def stored(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype that a parameter is kept in."""
    wide = any(part in KEPT_WIDE for part in name.split("."))
    return torch.promote_types(dtype, torch.float32) if wide else dtype


def converted(
    name: str, tensor: Tensor, updates: list[dict[str, LowRank]], dtype: torch.dtype, device: str, source: str
) -> Tensor:
    """A parameter as the network holds it: updates added in float32, then rounded; a copy, never the file itself.

    Raises ValueError where that is not finite.
    """
    for update in updates:
        tensor = update[name].added_to(tensor) if name in update else tensor
    made = tensor.to(device, stored(name, dtype), copy=True).contiguous()
    if not bool(made.isfinite().all()):
        kind = str(made.dtype).removeprefix("torch.")
        raise ValueError(
            f"{name} of {source} holds numbers that are not finite in {kind}; nothing was loaded: fetch the files "
            f"again, or set wan.generator.dtype='float32' where float16 is too narrow"
        )
    return made


def assigned(network: CausalWanTransformer3DModel, state: Mapping[str, Tensor]) -> CausalWanTransformer3DModel:
    """The network with these very tensors as its parameters."""
    nn.Module.load_state_dict(network, state, strict=True, assign=True)
    return network
