"""Tiny random CLIP and DINO models, whole with tokenizer and files, and flows that are known in advance."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, ViTConfig, ViTModel

from framework.types import VideoBatch, Window
from rewards.encoders import ClipEncoder, DinoEncoder
from rewards.optical_flow import FlowEstimator
from tests.support import perturb

SIZE = 16
"""Pixels of the tiny models' images."""
LAYERS = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip


def tiny_tokenizer() -> CLIPTokenizer:
    """Byte-level letters without merges: every word is spelled."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({token: i for i, token in enumerate(tokens)}, [], model_max_length=24)


def tiny_clip(seed: int = 0, width: int = 8) -> CLIPModel:
    """A CLIP of a few thousand parameters that differs from image to image and from text to text."""
    tokenizer = tiny_tokenizer()
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 1}
    text = {**LAYERS, **special, "vocab_size": len(tokenizer), "max_position_embeddings": 24}
    config = CLIPConfig(
        text_config=text, vision_config={**LAYERS, "image_size": SIZE, "patch_size": 4}, projection_dim=width
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(config)
    perturb(model, seed, std=0.2)
    return model.eval()


def tiny_clip_encoder(seed: int = 0, width: int = 8, **options: object) -> ClipEncoder:
    return ClipEncoder(tiny_clip(seed, width), tiny_tokenizer(), **options)  # type: ignore[arg-type]


def save_clip(folder: Path, seed: int = 0) -> CLIPModel:
    """A folder as the hub gives it."""
    model = tiny_clip(seed)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def tiny_vit(seed: int = 0, pooler: bool = False) -> ViTModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ViTModel(ViTConfig(**LAYERS, image_size=SIZE, patch_size=4), add_pooling_layer=pooler)
    perturb(model, seed, std=0.2)
    return model.eval()


def tiny_dino_encoder(seed: int = 0) -> DinoEncoder:
    return DinoEncoder(tiny_vit(seed), SIZE)


def batch(clips: list[Tensor] | Tensor, fps: float = 8.0, prompts: list[str] | None = None) -> VideoBatch:
    """Clips uint8 of one length, each with a prompt of its own over its whole length."""
    frames = torch.stack(clips) if isinstance(clips, list) else clips
    texts = prompts or [f"clip {chr(97 + i)}" for i in range(len(frames))]
    return VideoBatch(frames, fps, tuple((Window(0, frames.shape[1], text),) for text in texts))


def noise_clips(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@dataclass(frozen=True)
class KnownFlow(FlowEstimator):
    """The same motion (x, y) everywhere and always; times −1 where the second frame is the earlier one.

    Frames carry their time in the red channel of their first pixel.
    """

    x: float = 0.0
    y: float = 0.0

    def flow(self, first: Tensor, second: Tensor) -> Tensor:
        time = second[:, 0, 0, 0].float() - first[:, 0, 0, 0].float()
        step = torch.tensor([self.x, self.y])
        return (time[:, None] * step)[:, :, None, None].expand(-1, -1, *first.shape[-2:]).contiguous()


def phase_shift(first: Tensor, second: Tensor, reach: int = 6) -> tuple[int, int]:
    """The whole-pixel shift (x, y) of a torus that makes one frame [3, H, W] most like the other, the shortest one."""
    best = None
    for y in range(-reach, reach + 1):
        for x in range(-reach, reach + 1):
            error = (first.float().roll((y, x), (-2, -1)) - second.float()).abs().mean().item()
            key = (round(error, 4), x * x + y * y)
            if best is None or key < best[0]:
                best = key, (x, y)
    assert best is not None
    return best[1]


class SearchedFlow(FlowEstimator):
    """A real estimator for frames that move as a whole: the best shift, the shortest where several fit as well."""

    def flow(self, first: Tensor, second: Tensor) -> Tensor:
        found = torch.tensor([phase_shift(a, b) for a, b in zip(first, second, strict=True)], dtype=torch.float32)
        return found[:, :, None, None].expand(-1, -1, *first.shape[-2:]).contiguous()
