"""A released checkpoint as a generator: transformer, text encoder and autoencoder, each from its own files."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from backbones.history import HistoryPolicy
from backbones.recache import Recache
from backbones.streaming import WanStreamingGenerator
from backbones.wan.base_model import base_folder, needed_files
from backbones.wan.recipes import WanRecipe, load_network
from backbones.wan.text import ENCODER, TOKENIZER, TOKENS, TextEncoder
from backbones.wan.transformer import CausalWanTransformer3DModel
from backbones.wan.vae import VAE, StreamingVAE, load_vae
from framework.devices import is_sizes_only
from framework.interfaces import GeneratorRecipe
from framework.memory_estimate import NetworkDimensions
from framework.precision import Precision
from framework.reporting.progress import say

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class WanGenerator(WanStreamingGenerator):
    """A Wan transformer with the text encoder that conditions it and the autoencoder that shows what it made.

    Both go to the transformer's device when they are first used. text, vae: None for a network without weights, which
    has sizes and nothing else. Raises ValueError where the parts do not fit each other.
    """

    def __init__(
        self,
        network: CausalWanTransformer3DModel,
        text: TextEncoder | None,
        vae: StreamingVAE | None,
        recipe: GeneratorRecipe,
        policy: HistoryPolicy,
        recache: Recache | None = None,
        precision: Precision | None = None,
        attention: str = "auto",
        memo_bytes: int | None = None,
    ) -> None:
        super().__init__(network, recipe, policy, recache, precision, attention, memo_bytes)
        self.text = text
        self.vae = vae
        if vae is not None and (vae.channels, vae.stride) != (recipe.latent[0], recipe.temporal_stride):
            raise ValueError(
                f"the autoencoder has {vae.channels} latent channels and {vae.stride} frames a latent, the recipe says "
                f"WanRecipe.latent={recipe.latent} and temporal_stride={recipe.temporal_stride}"
            )

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings [P, 512, text_dim] in the network's precision; no gradient. Empty ones without weights."""
        weight, width = self.network.patch_embedding.weight, self.network.config["text_dim"]
        if self.text is None:
            return torch.empty(len(prompts), TOKENS, width, device="meta", dtype=weight.dtype)
        embeddings = self.text.encode(prompts, weight.device)
        if embeddings.shape[-1] != width:
            raise ValueError(
                f"the text encoder gives {embeddings.shape[-1]} numbers a token, the network takes {width}; set "
                f"wan.generator.text_folder to the encoder that it was trained with"
            )
        return embeddings.to(weight.dtype)

    def decode(self, latents: Tensor, prefix: Tensor | None = None) -> Tensor:
        return self._vae().decode(latents, prefix)

    def decoder(self) -> Callable[[Tensor], Tensor]:
        return self._vae().decoder()

    def encode(self, pixels: Tensor) -> Tensor:
        """Clean latents [N, C, F, H, W] of first pixels [N, 1 + 4 (F − 1), 3, 8 H, 8 W] in [−1, 1].

        Raises ValueError for another number of frames, and for another size than the recipe's.
        """
        vae = self._vae()
        _, height, width = self.recipe.latent
        size = (height * vae.scale, width * vae.scale)
        if tuple(pixels.shape[-2:]) != size:
            raise ValueError(
                f"{self.recipe.name} makes frames of {size[0]} × {size[1]} pixels, the given ones have "
                f"{pixels.shape[-2]} × {pixels.shape[-1]}; resize or crop them"
            )
        return vae.encode(pixels.to(self.network.patch_embedding.weight.device))

    def dimensions(self, prompt: str) -> NetworkDimensions:
        dtype = self.network.patch_embedding.weight.dtype
        return replace(super().dimensions(prompt), number_bytes=dtype.itemsize)

    def _vae(self) -> StreamingVAE:
        if self.vae is None:
            raise ValueError(f"{self.recipe.name} was built for its sizes alone and has no autoencoder")
        return self.vae


def generator(
    recipe: WanRecipe,
    folder: str | None = None,
    text_folder: str | None = None,
    vae_folder: str | None = None,
    dtype: str = "bfloat16",
    text_dtype: str = "bfloat16",
    vae_dtype: str = "float32",
    text_cache: str | None = None,
    keep_text_encoder: str = "cpu",
    gradient_checkpointing: bool = True,
    videos_at_once: int = 1,
    pixels_on: str | None = "cpu",
    precision: Precision | None = None,
    attention: str = "auto",
    memo_bytes: int | None = None,
) -> WanGenerator:
    """A released checkpoint of the Wan family, ready to generate and to be aligned.

    folder: where files are looked for before the Hugging Face hub. text_folder, vae_folder: the same for the text
    encoder with its tokenizer and for the autoencoder, None for ``folder``. dtype: of the transformer's weights but for
    its time embedding and modulation. vae_dtype: rewards follow it, see `StreamingVAE`. text_cache: folder of prompt
    embeddings that several runs may share, None for none. keep_text_encoder: "device", "cpu" or "nowhere", see
    `TextEncoder`. gradient_checkpointing: activations inside a layer are computed again in the backward pass.
    videos_at_once: decoded together. pixels_on: device that decoded videos are put on, one by one; None for the
    latents'. precision, attention, memo_bytes: see `WanStreamingGenerator`.

    Raises ValueError in one line for a file that is missing, partial, or of another network. For a dry run on the meta
    device and for `doctor` nothing is read: the network has sizes only, and what would be read is printed.
    """
    for name, value in (("dtype", dtype), ("text_dtype", text_dtype), ("vae_dtype", vae_dtype)):
        if value not in DTYPES:
            raise ValueError(f"wan.generator.{name} must be one of {', '.join(DTYPES)}, got {value!r}")
    text_folder, vae_folder = text_folder or folder, vae_folder or folder
    without = is_sizes_only()
    if without:
        for line in needed_files(recipe, folder, text_folder, vae_folder):
            say(line)
        text = vae = None
    else:
        text = TextEncoder(
            base_folder(recipe.base, (ENCODER, TOKENIZER), text_folder, "text_folder"), DTYPES[text_dtype],
            None if text_cache is None else Path(text_cache), keep_text_encoder,
        )  # fmt: skip
        autoencoder = load_vae(base_folder(recipe.base, (VAE,), vae_folder, "vae_folder"), DTYPES[vae_dtype])
        vae = StreamingVAE(autoencoder, videos_at_once, pixels_on)
    network = load_network(recipe, folder, DTYPES[dtype], "meta" if without else "cpu")
    if gradient_checkpointing:
        network.enable_gradient_checkpointing()
    return WanGenerator(
        network, text, vae, recipe.generator_recipe(), recipe.policy, recipe.recache, precision, attention, memo_bytes
    )  # fmt: skip
