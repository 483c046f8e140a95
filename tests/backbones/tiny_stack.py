"""A Wan in miniature: UMT5, its tokenizer and an autoencoder in diffusers' layout, and networks as they are released.

Everything is random and saved once; tests load it through the code that loads the real ones.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from backbones.wan.checkpoints import original_name
from backbones.wan.generator import WanGenerator
from backbones.wan.generator import generator as wan_generator
from backbones.wan.recipes import WanRecipe
from backbones.wan.transformer import CausalWanTransformer3DModel
from framework.adapters import WAN_LINEARS
from framework.interfaces import RewardModel
from framework.types import Scores, VideoBatch
from framework.weights import save_tensors
from tests.support import normal, perturb

TEXT_DIM = 32
WORDS = ("a", "the", "red", "blue", "square", "disc", "cat", "dog", "moves", "left", "right")
VAE = {
    "base_dim": 3, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
}  # fmt: skip


def tiny_tokenizer() -> T5Tokenizer:
    """Every printable character and a few words; of the class that reads Wan's tokenizer."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -2.0)]
    characters = [(chr(code), -4.0) for code in range(33, 127)]
    return T5Tokenizer(vocab=[*special, *characters, *((f"▁{word}", -3.0) for word in WORDS)], extra_ids=0)


def seeded(seed: int, build) -> nn.Module:
    """A module of fixed weights, none of which a comparison multiplies by zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build()
    perturb(module, seed)
    return module


def tiny_umt5(vocabulary: int) -> UMT5EncoderModel:
    config = UMT5Config(vocab_size=vocabulary, d_model=TEXT_DIM, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    return seeded(1, lambda: UMT5EncoderModel(config)).eval()  # pyright: ignore[reportReturnType]


def tiny_vae() -> AutoencoderKLWan:
    return seeded(2, lambda: AutoencoderKLWan(**VAE)).eval()  # pyright: ignore[reportReturnType]


def save_text(folder: Path) -> None:
    """``tokenizer`` and ``text_encoder`` below a folder."""
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    tiny_umt5(len(tokenizer)).save_pretrained(folder / "text_encoder")


def save_vae(folder: Path) -> None:
    """``vae`` below a folder."""
    tiny_vae().save_pretrained(folder / "vae")


NETWORK = {
    "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 2, "text_dim": TEXT_DIM,
    "freq_dim": 16, "rope_max_seq_len": 64,
}  # fmt: skip
RANK = 2
"""Of the released adapter."""
PAPERS = {
    "papers/astrolabe.gin": "backbones/self_forcing.gin",
    "papers/kvpo.gin": "backbones/longlive.gin",
    "papers/raven_cm_grpo.gin": "backbones/raven.gin",
}
"""A paper's method and the released generator that the tests align with it."""


MIDDLE = NETWORK | {"attention_head_dim": 128, "ffn_dim": 1024, "num_layers": 3, "freq_dim": 256}
"""The head size, time embedding and proportions of the 1.3B network, 256 wide."""


def tiny_network(sizes: Mapping[str, Any] = NETWORK) -> CausalWanTransformer3DModel:
    return seeded(3, lambda: CausalWanTransformer3DModel(**sizes))  # pyright: ignore[reportReturnType]


def released_state(network: nn.Module) -> dict[str, Tensor]:
    """A state dict as the trainers wrote it: original names behind the prefixes of two wrappers."""
    named = {original_name(name): tensor for name, tensor in network.state_dict().items()}
    return {f"model._fsdp_wrapped_module.{name}": tensor for name, tensor in named.items()}


def released_lora(network: nn.Module) -> dict[str, Tensor]:
    """A PEFT dict under original names, of every linear layer of the blocks; it carries no alpha."""
    state = {}
    for i, (name, module) in enumerate(network.named_modules()):
        if name.startswith("blocks.") and name.endswith(tuple(f".{end}" for end in WAN_LINEARS)):
            assert isinstance(module, nn.Linear)
            path = str(original_name(f"{name}.weight")).removesuffix(".weight")
            for half, shape in (("A", (RANK, module.in_features)), ("B", (module.out_features, RANK))):
                key = f"base_model.model.{path}.lora_{half}.weight"
                state[key] = 0.1 * normal(100 + i, *shape, dtype=torch.float32)
    return state


def save_stack(folder: Path) -> Path:
    """Text encoder, tokenizer, autoencoder, and the network in the files of released generators."""
    save_text(folder)
    save_vae(folder)
    save_released(folder, tiny_network())
    return folder


def save_released(folder: Path, network: nn.Module) -> None:
    """A network in the files of released generators, in the place of those that are there."""
    state = released_state(network)
    torch.save({"generator_ema": state, "critic": {"head.bias": torch.zeros(1)}}, folder / "self_forcing_dmd.pt")
    torch.save({"generator": state}, folder / "longlive_base.pt")
    torch.save({"generator_lora": released_lora(network)}, folder / "lora.pt")
    torch.save(state, folder / "raven_model.pt")
    save_tensors(folder / "krea-realtime-video-14b.safetensors", {name: t.clone() for name, t in state.items()})


@pytest.fixture(scope="session", name="stack")
def saved_stack() -> Iterator[Path]:
    """The folder of the whole stack, saved once."""
    with TemporaryDirectory() as folder:
        yield save_stack(Path(folder))


def stack_lines(folder: Path) -> tuple[str, ...]:
    """Gin lines that put the stack in place of a released checkpoint: its folder and sizes, and float32."""
    return (
        f"FOLDER = {str(folder)!r}",
        f"wan.WanRecipe.network = {NETWORK}",
        "wan.WanRecipe.latent = (16, 8, 8)",
        *(f"wan.generator.{name} = 'float32'" for name in ("dtype", "text_dtype")),
    )


def lora_lines(config: str) -> tuple[str, ...]:
    """Gin lines for the tiny adapter, where a backbone merges one."""
    return (f"wan.ReleasedLoRA.rank = {RANK}", "wan.ReleasedLoRA.alpha = 4.0") if "longlive" in config else ()


def tiny_recipe(**changes: Any) -> WanRecipe:
    """The stack as a recipe."""
    given = {
        "name": "tiny", "repository": "tests/tiny", "file": "self_forcing_dmd.pt", "sub_key": "generator_ema",
        "licence": "none", "network": NETWORK, "latent": (16, 8, 8), "clip_blocks": 2,
    }  # fmt: skip
    return WanRecipe(**(given | changes))


def tiny_wan_generator(folder: Path, **changes: Any) -> WanGenerator:
    """The stack as a generator in float32; changes: of the recipe."""
    return wan_generator(tiny_recipe(**changes), str(folder), dtype="float32", text_dtype="float32")


class PixelReward(RewardModel):
    """Three signals that any video has: brightness, its change over time, and how much red stands out."""

    @property
    def signals(self) -> tuple[str, ...]:
        return ("VQ", "MQ", "TA")

    def score(self, videos: VideoBatch) -> Scores:
        pixels = videos.frames.float() / 255
        moving = pixels.diff(dim=1).abs().mean((1, 2, 3, 4))
        red = pixels[:, :, 0].mean((1, 2, 3)) - pixels[:, :, 2].mean((1, 2, 3))
        return Scores.of({"VQ": pixels.mean((1, 2, 3, 4)), "MQ": moving, "TA": red})
