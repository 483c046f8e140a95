"""Prompts to the embeddings that Wan attends to: UMT5 through transformers, and a cache that outlives the run.

A prompt becomes 512 rows. Those after its length are zero, and they are no mask: the network sends them through its
text layers and attends to them, so a prompt padded to 226 rows (the default of diffusers' pipeline) is another
conditioning.
"""

import hashlib
import html
import re
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ftfy
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5EncoderModel

from framework.reporting.progress import say
from framework.weights import save_tensors

TOKENS = 512
"""Rows of an embedding; longer prompts are cut there, as they were in training."""
ENCODER, TOKENIZER = "text_encoder", "tokenizer"
"""Their subfolders in a folder of diffusers' layout."""
KEPT = ("device", "cpu", "nowhere")
WHOLE = 2**25
"""Bytes up to which a file is hashed whole."""


def clean_prompt(prompt: str) -> str:
    """What the tokenizer reads: mojibake repaired, HTML entities resolved twice, every run of whitespace one space."""
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip()


def folder_digest(folder: Path) -> str:
    """A hash of the text encoder and tokenizer in a folder: small files whole, of large ones 64 pieces.

    Milliseconds where hashing 11 GB would take a minute; a change that misses every piece goes unseen.
    """
    digest = hashlib.sha256()
    files = [path for part in (TOKENIZER, ENCODER) for path in sorted((folder / part).rglob("*")) if path.is_file()]
    for path in files:
        length = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()} {length}".encode())
        with path.open("rb") as file:
            if length <= WHOLE:
                digest.update(file.read())
                continue
            for piece in range(64):
                file.seek(piece * (length - 4096) // 63)
                digest.update(file.read(4096))
    return digest.hexdigest()


class EmbeddingCache:
    """A folder of embeddings, one file per prompt and encoder; several processes may share it.

    A file is written beside its place and renamed, so that a killed run leaves no half embedding.
    """

    def __init__(self, folder: Path, encoder: str) -> None:
        self.folder = folder
        self.encoder = encoder

    def path(self, prompt: str) -> Path:
        """Where a cleaned prompt is kept."""
        name = hashlib.sha256(f"{self.encoder}\n{prompt}".encode()).hexdigest()
        return self.folder / f"{name}.safetensors"

    def read(self, prompt: str) -> Tensor | None:
        """The rows [length, dim] of a cleaned prompt, None where it was never kept.

        Raises ValueError that names the file where it is not what was written.
        """
        path = self.path(prompt)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                rows, said = file.get_tensor("embedding"), file.metadata()
            whole = (said["prompt"], said["sha256"]) == (prompt, tensor_hash(rows))
        except (SafetensorError, OSError, KeyError, TypeError) as error:
            raise ValueError(f"{self._damaged(path)}: {error}") from error
        if not whole:
            raise ValueError(f"{self._damaged(path)}: it is not the embedding that was written for {prompt[:40]!r}")
        return rows

    def write(self, prompt: str, rows: Tensor) -> None:
        """Keep the rows of a cleaned prompt. Raises OSError that names the file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(prompt)
        staged = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            save_tensors(staged, {"embedding": rows}, {"prompt": prompt, "sha256": tensor_hash(rows)})
            staged.replace(path)
        finally:
            staged.unlink(missing_ok=True)

    @staticmethod
    def _damaged(path: Path) -> str:
        return f"{path} is a damaged embedding; delete it, it is made again (wan.generator.text_cache)"


def tensor_hash(tensor: Tensor) -> str:
    """sha256 of the type, shape and bytes of a tensor."""
    data = tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + data).hexdigest()


class TextEncoder:
    """UMT5 behind two caches; its weights are read when a prompt is in neither.

    folder: with ``text_encoder`` and ``tokenizer`` in diffusers' layout. dtype: of the encoder and its embeddings.
    cache: folder of embeddings on disk, None for none. keep: where the weights wait for the next new prompt: on the
    "device" (11 GB of it for Wan), on the "cpu", or "nowhere", to be read again. remembered: prompts in memory.
    """

    def __init__(
        self, folder: Path, dtype: torch.dtype, cache: Path | None = None, keep: str = "cpu", remembered: int = 256
    ) -> None:
        if keep not in KEPT:
            raise ValueError(f"wan.generator.keep_text_encoder must be one of {', '.join(KEPT)}, got {keep!r}")
        self.folder, self.dtype, self.keep, self.remembered = folder, dtype, keep, remembered
        for part in (TOKENIZER, ENCODER):
            if not (folder / part).is_dir():
                raise ValueError(
                    f"{folder} has no subfolder {part!r}; give wan.generator.text_folder a folder in diffusers' layout"
                )
        self.cache = None if cache is None else EmbeddingCache(cache, f"{folder_digest(folder)} {dtype} {TOKENS}")
        self._memory: OrderedDict[str, Tensor] = OrderedDict()
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._model: UMT5EncoderModel | None = None

    @property
    def loaded(self) -> bool:
        """Whether the weights are in memory, here or on a device."""
        return self._model is not None

    def encode(self, prompts: Sequence[str], device: torch.device) -> Tensor:
        """Embeddings [P, 512, dim] on a device, zero after each prompt's length.

        Every new prompt goes through the encoder alone, so that its embedding does not depend on its company.
        """
        cleaned = [clean_prompt(prompt) for prompt in prompts]
        rows: dict[str, Tensor] = {}
        computed = False
        try:
            for prompt in dict.fromkeys(cleaned):
                known = self._known(prompt)
                if known is None:
                    computed = True
                    known = self._compute(prompt, device)
                    if self.cache is not None:
                        self.cache.write(prompt, known)
                self._remember(prompt, known)
                rows[prompt] = known
        finally:
            if computed:
                self.park()
        return torch.stack([F.pad(rows[p], (0, 0, 0, TOKENS - len(rows[p]))) for p in cleaned]).to(device)

    def park(self) -> None:
        """Take the weights off the device as ``keep`` says."""
        if self.keep == "nowhere":
            self._model = None
        elif self.keep == "cpu" and self._model is not None:
            self._model.to("cpu")  # pyright: ignore[reportArgumentType]

    def _known(self, prompt: str) -> Tensor | None:
        if prompt in self._memory:
            return self._memory[prompt]
        return None if self.cache is None else self.cache.read(prompt)

    def _remember(self, prompt: str, rows: Tensor) -> None:
        self._memory[prompt] = rows
        self._memory.move_to_end(prompt)
        while len(self._memory) > self.remembered:
            self._memory.popitem(last=False)

    @torch.no_grad()
    def _compute(self, prompt: str, device: torch.device) -> Tensor:
        """Rows [length, dim] of a cleaned prompt, on the CPU. Raises ValueError for an encoder that overflows."""
        tokenizer, model = self._load()
        model.to(device)  # pyright: ignore[reportArgumentType]
        given = tokenizer(
            [prompt], padding="max_length", max_length=TOKENS, truncation=True, add_special_tokens=True,
            return_attention_mask=True, return_tensors="pt",
        )  # fmt: skip
        ids, mask = given["input_ids"].to(device), given["attention_mask"].to(device)
        length = int(mask.gt(0).sum())
        if length == TOKENS and (whole := len(tokenizer(prompt)["input_ids"])) > TOKENS:
            say(f"a prompt of {whole} tokens is cut to {TOKENS}, as in training: {prompt[:60]!r} …")
        rows = model(ids, mask).last_hidden_state[0, :length].to("cpu", self.dtype).clone()
        if not bool(rows.isfinite().all()):
            raise ValueError(
                f"the text encoder gives non-finite numbers for {prompt[:40]!r} in {self.dtype}; set "
                f"wan.generator.text_dtype to 'bfloat16' or 'float32'"
            )
        return rows

    def _load(self) -> tuple[PreTrainedTokenizerBase, UMT5EncoderModel]:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.folder / TOKENIZER)
        if self._model is None:
            self._model = load_encoder(self.folder / ENCODER, self.dtype)
        return self._tokenizer, self._model


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Raises ValueError, one line, where the folder holds none."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} holds no tokenizer: {' '.join(str(error).split())[:200]}") from error


def load_encoder(folder: Path, dtype: torch.dtype) -> UMT5EncoderModel:
    """The encoder with every one of its weights from the folder. Raises ValueError, one line, else."""
    try:
        loaded: Any = UMT5EncoderModel.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        model, said = loaded
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder} holds no UMT5 encoder: {' '.join(str(error).split())[:200]}") from error
    lacking = sorted(map(str, [*said["missing_keys"], *said["mismatched_keys"]]))
    if lacking:
        raise ValueError(f"{folder} lacks {len(lacking)} tensors of its UMT5 encoder: {', '.join(lacking[:3])}")
    return model.requires_grad_(False).eval()
