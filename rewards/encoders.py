"""Frames and texts as unit vectors: the frozen encoders that the CLIP score and its relatives are made of.

Own preprocessing in torch, so that no image package is needed: the shorter side becomes ``size`` by a bicubic resize,
the middle is cut out, channels are normalised. Which resize it is is a part of the score: "antialias" is what CLIP was
trained with (Pillow's to within a level or two), "plain" is torch's without a filter, which LAION-score callers use on
tensors; on reduced frames the two differ visibly.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from framework.arguments import check_counts
from rewards.optional import refuse_broken_torchvision
from rewards.qwen2vl import tensors_digest

Resize = Literal["antialias", "plain"]

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def fit_square(frames: Tensor, size: int, resize: Resize) -> Tensor:
    """uint8 [n, 3, H, W] → uint8 [n, 3, size, size]: the shorter side resized to ``size``, the middle of the longer."""
    height, width = frames.shape[-2:]
    short = min(height, width)
    new = int(size * height / short), int(size * width / short)
    resized = interpolate(
        frames.float(), size=new, mode="bicubic", align_corners=False, antialias=resize == "antialias"
    )
    top, left = round((new[0] - size) / 2), round((new[1] - size) / 2)
    return resized[..., top : top + size, left : left + size].clamp(0, 255).round().to(torch.uint8)


def normalise_channels(frames: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 [n, 3, H, W] → (x/255 − mean)/std, float32."""
    centre, scale = (torch.tensor(values, device=frames.device)[:, None, None] for values in (mean, std))
    return (frames.float() / 255 - centre) / scale


class ImageEncoder(ABC):
    """Frames as unit vectors, the same in any batch."""

    width: int
    """D."""

    @abstractmethod
    def embed(self, frames: Tensor) -> Tensor:
        """float32 [n, D] of length 1, on the CPU, of frames uint8 [n, 3, H, W] of any size."""


class ClipEncoder(ImageEncoder):
    """transformers' CLIPModel with its tokenizer: projected image and text features.

    resize: "antialias" or "plain", see the head of the file. batch_size: frames per forward.
    long_prompts: "refuse" raises ValueError for a prompt of more tokens than CLIP reads (77 with its two special ones),
    "truncate" judges by its beginning.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        resize: Resize = "antialias",
        batch_size: int = 32,
        long_prompts: Literal["refuse", "truncate"] = "refuse",
    ) -> None:
        check_choice("ClipEncoder.resize", resize, ("antialias", "plain"))
        check_choice("ClipEncoder.long_prompts", long_prompts, ("refuse", "truncate"))
        check_counts("ClipEncoder.", batch_size=batch_size)
        self.model: Any = model.eval().requires_grad_(False)
        self.tokenizer, self.batch_size, self.long_prompts = tokenizer, batch_size, long_prompts
        self.resize: Resize = resize
        self.width = int(model.config.projection_dim)

    @torch.no_grad()
    def embed(self, frames: Tensor) -> Tensor:
        size = self.model.config.vision_config.image_size
        weight = next(self.model.parameters())
        parts = []
        for part in frames.split(self.batch_size):
            pixels = fit_square(part.to(weight.device), size, self.resize)
            pixels = normalise_channels(pixels, CLIP_MEAN, CLIP_STD).to(weight.dtype)
            # since transformers 5 an output object; its pooler_output holds the projected features
            found = self.model.get_image_features(pixel_values=pixels).pooler_output
            parts.append(normalize(found.float(), dim=-1).cpu())
        return torch.cat(parts)

    def digest(self) -> str:
        """Another one wherever features could be others."""
        words = self.tokenizer.backend_tokenizer.to_str()
        settings = f"{self.resize} {self.long_prompts} {hashlib.sha256(words.encode()).hexdigest()}"
        return f"{tensors_digest(self.model.state_dict())} {settings}"

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """float32 [n, D] of length 1, on the CPU. Raises ValueError for a prompt with a special token, and for
        one that is too long, if told to."""
        limit = self.model.config.text_config.max_position_embeddings
        device = next(self.model.parameters()).device
        parts = []
        for text in texts:  # one at a time: prompts are few, and the padding of others changes rounding
            inside = [token for token in self.tokenizer.all_special_tokens if token.lower() in text.lower()]
            if inside:  # a text is read off at its first end token: what follows it would not count
                raise ValueError(f"the prompt {text[:60]!r} contains the special token {inside[0]}, which it must not")
            tokens = self.tokenizer([text], return_tensors="pt", verbose=False)
            ids, mask = tokens["input_ids"], tokens["attention_mask"]
            if ids.shape[1] > limit:
                if self.long_prompts == "refuse":
                    raise ValueError(
                        f"CLIP reads {limit} tokens and the prompt {text[:40]!r}… has {ids.shape[1]}; shorten it, or "
                        f"set long_prompts = 'truncate' to judge by its beginning"
                    )
                ids = torch.cat([ids[:, : limit - 1], ids[:, -1:]], 1)  # the end token is where the text is read off
                mask = mask[:, :limit]
            found = self.model.get_text_features(input_ids=ids.to(device), attention_mask=mask.to(device))
            parts.append(normalize(found.pooler_output.float(), dim=-1).cpu())
        return torch.cat(parts)


class DinoEncoder(ImageEncoder):
    """A vision transformer of transformers without text, e.g. DINO: the class token after the last norm."""

    def __init__(self, model: Any, size: int = 224, resize: Resize = "antialias", batch_size: int = 32) -> None:
        check_choice("DinoEncoder.resize", resize, ("antialias", "plain"))
        check_counts("DinoEncoder.", batch_size=batch_size)
        self.model: Any = model.eval().requires_grad_(False)
        self.size, self.batch_size = size, batch_size
        self.resize: Resize = resize
        self.width = int(model.config.hidden_size)

    @torch.no_grad()
    def embed(self, frames: Tensor) -> Tensor:
        weight = next(self.model.parameters())
        parts = []
        for part in frames.split(self.batch_size):
            pixels = fit_square(part.to(weight.device), self.size, self.resize)
            pixels = normalise_channels(pixels, IMAGENET_MEAN, IMAGENET_STD).to(weight.dtype)
            token = self.model(pixel_values=pixels).last_hidden_state[:, 0]
            parts.append(normalize(token.float(), dim=-1).cpu())
        return torch.cat(parts)


def load_clip(
    model: str = "openai/clip-vit-large-patch14",
    revision: str | None = None,
    resize: Resize = "antialias",
    batch_size: int = 32,
    long_prompts: Literal["refuse", "truncate"] = "refuse",
    dtype: str = "float32",
    device: str = "cpu",
) -> ClipEncoder:
    """A CLIP from a folder or the hub, with every tensor of its network found in the file.

    model: a folder with config.json, the weights and the tokenizer's files, or a name on the hub. Raises ValueError
    where it can be neither read nor downloaded, or leaves a part of the network without weights.
    """
    refuse_broken_torchvision("load_clip")
    from transformers import AutoTokenizer, CLIPModel

    network: Any = load_pretrained(CLIPModel, "load_clip.model", model, revision, dtype, device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision)
    except (OSError, ValueError, TypeError, KeyError) as error:  # what transformers raises for files that are not there
        raise ValueError(f"load_clip.model={model!r} has no tokenizer that can be read ({brief(error)})") from error
    known, wanted = len(tokenizer), network.config.text_config.vocab_size
    if known != wanted:  # where its files are missing, transformers makes one that knows no word
        raise ValueError(
            f"load_clip.model={model!r} has a tokenizer of {known} tokens and a network of {wanted}; the folder needs "
            f"the tokenizer's files too, tokenizer.json or vocab.json with merges.txt"
        )
    return ClipEncoder(network, tokenizer, resize, batch_size, long_prompts)


def load_dino(
    model: str = "facebook/dino-vitb16",
    revision: str | None = None,
    size: int = 224,
    resize: Resize = "antialias",
    batch_size: int = 32,
    dtype: str = "float32",
    device: str = "cpu",
) -> DinoEncoder:
    """A DINO from a folder or the hub, through transformers' AutoModel. Raises ValueError as `load_clip` does."""
    refuse_broken_torchvision("load_dino")
    from transformers import AutoModel

    network = load_pretrained(AutoModel, "load_dino.model", model, revision, dtype, device, unread=("pooler.",))
    return DinoEncoder(network, size, resize, batch_size)


def load_pretrained(
    kind: type, what: str, model: str, revision: str | None, dtype: str, device: str, unread: tuple[str, ...] = ()
) -> nn.Module:
    """A transformers model whose every tensor came from the file, but those whose names start as in ``unread``.

    what: the parameter that names it, for messages.
    """
    check_choice(what.split(".")[0] + ".dtype", dtype, tuple(DTYPES))
    try:
        network, found = kind.from_pretrained(model, revision=revision, dtype=DTYPES[dtype], output_loading_info=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{what}={model!r} is no folder with a model and could not be downloaded ({brief(error)}); download it "
            f"where there is a network, `hf download {model} --local-dir FOLDER`, and give {what} that folder"
        ) from error
    except RuntimeError as error:  # tensors of other shapes than the configuration says
        raise ValueError(f"{what}={model!r} does not fit its own config.json ({brief(error)})") from error
    missing = sorted(name for name in found["missing_keys"] if not name.startswith(unread or ("\0",)))
    if missing:
        raise ValueError(
            f"{what}={model!r} leaves {len(missing)} tensors of {type(network).__name__} without weights, "
            f"{missing[:3]}; it is another kind of model or an incomplete file"
        )
    return network.to(device)


def brief(error: Exception) -> str:
    """The first line of a message, shortened; the kind of error where it says nothing."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= 160 else line[:159] + "…"


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError that shows the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")
