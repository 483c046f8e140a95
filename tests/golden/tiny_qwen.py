"""The tiny scorers of the rewards folder, rebuilt from numbers: config, weights by name, frames and token rows by seed.

A golden file may say its own setup under "config"; what it leaves out is read off the shapes of its key list, and what
these do not say is the packaged set's:

    {"text": {hidden_size, …}, "vision": {depth, …}, "tokens": {"image": 300, …, "VQ": 310, …, "reward": 313},
     "lora": {"rank": 4, "alpha": 8}, "videoalign": {"rows": [ROW, …]}, "hpsv3": {"rows": [ROW, …]}}

with ROW = {"frame_seed": 11, "shape": [T, H, W] or [H, W], "text_seed": 20, "text_tokens": 40}. What shapes cannot say
and no config says: numbers of heads, alpha (see `tests.golden.rewards`), and constants of the text model.
"""

import inspect
import re
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen2VLConfig

from rewards.preprocess import normalise, patchify, token_count
from rewards.qwen2vl import LinearHead, PreferenceHead, Qwen2VLReward, RewardTokens
from rewards.qwen2vl_loading import UnmergedLoRA, load_reward
from tests.golden.tiny_rows import drawn_frames, known_rows, known_tokens

TEXT = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 4096, "rope_theta": 1e6,
    "mrope_section": [2, 3, 3],
    "rms_norm_eps": 1e-5,  # the README of the set says 1e-6, but its numbers were made with transformers' default
}  # fmt: skip
VISION = {
    "depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14,
    "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
TOKENS = {
    "image": 300, "video": 301, "vision_start": 302, "vision_end": 303, "pad": 304, "VQ": 310, "MQ": 311, "TA": 312,
    "reward": 313,
}  # fmt: skip
LORA = {"rank": 4, "alpha": 8}
ROWS = {
    "videoalign": [
        {"frame_seed": 11, "shape": [4, 56, 84], "text_seed": 20, "text_tokens": 40},
        {"frame_seed": 12, "shape": [6, 84, 56], "text_seed": 21, "text_tokens": 33},
    ],
    "hpsv3": [
        {"frame_seed": 31, "shape": [56, 84], "text_seed": 40, "text_tokens": 30},
        {"frame_seed": 32, "shape": [84, 56], "text_seed": 41, "text_tokens": 24},
    ],
}
MODELS = ("videoalign", "hpsv3")
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
           "mlp.up_proj", "mlp.down_proj")  # fmt: skip
"""Those of a text layer that have adapters."""


def fill(name: str, shape: Sequence[int]) -> Tensor:
    """The values of a parameter by its canonical name."""
    z = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF).standard_normal(tuple(shape))
    if "norm" in name or ".ln_q." in name:
        values = (1.0 if name.endswith("weight") else 0.0) + 0.05 * z
    else:
        values = (0.05 if len(shape) == 1 or "lora_" in name else 0.15) * z
    return torch.from_numpy(np.asarray(values)).float()


def canonical(key: str) -> str:
    """The name by which a key of the old layout is filled."""
    name = key.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".default.", ".")
    return "language_model." + name.removeprefix("model.") if name.startswith("model.") else name


@dataclass(frozen=True)
class Setup:
    """What one golden file was made with; the fields are those of "config"."""

    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    tokens: Mapping[str, int]
    lora: UnmergedLoRA
    rows: Mapping[str, Sequence[Mapping[str, Any]]]
    output_dim: int = 1

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> "Setup":
        """From a golden document: the scores' with the key lists' of its companion in it.

        Raises ValueError for a config with an entry that nothing reads.
        """
        given = document.get("config", document.get("hparams", {}))
        check_config(given)
        shapes = {
            canonical(key): entry[0]
            for model in MODELS
            if isinstance(document.get(model), dict)
            for key, entry in document[model].get("parameters", {}).items()
        }
        text = TEXT | _text_sizes(shapes) | given.get("text", {})
        text |= {} if "mrope_section" in given.get("text", {}) else {"mrope_section": sections(text)}
        lora = LORA | _lora_sizes(shapes) | given.get("lora", {})
        vision = VISION | {"hidden_size": text["hidden_size"]} | _vision_sizes(shapes) | given.get("vision", {})
        tokens = dict(TOKENS)
        for model in MODELS:
            tokens = known_tokens(model, document.get(model), tokens, text["vocab_size"])
        tokens |= given.get("tokens", {})
        rows = {
            model: given.get(model, {}).get("rows")
            or known_rows(
                model,
                document.get(model),
                document.get(f"{model}_pixel_sum"),
                ROWS[model],
                lambda row, grid, model=model: row_of_tokens(model, row, grid, tokens),
            )
            for model in MODELS
        }
        head = shapes.get("rm_head.weight", [1])[0]
        return cls(text, vision, tokens, UnmergedLoRA(lora["rank"], lora["alpha"]), rows, given.get("output_dim", head))

    def config(self) -> Qwen2VLConfig:
        """transformers' config, as a base model's config.json gives it."""
        text = {name: value for name, value in self.text.items() if name not in ("rope_theta", "mrope_section")}
        rope = {"rope_type": "default", **{name: self.text[name] for name in ("rope_theta", "mrope_section")}}
        ids = {f"{name}_token_id": self.tokens[name] for name in ("image", "video", "vision_start", "vision_end")}
        free = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        return Qwen2VLConfig(
            text_config={**text, **free, "rope_parameters": rope, "use_sliding_window": False},
            vision_config={**self.vision, "in_channels": 3},
            **ids,
        )

    def reward_tokens(self, model: str) -> RewardTokens:
        """Of one of the two models."""
        ids = self.tokens
        if model == "videoalign":
            return RewardTokens(ids["video"], (ids["VQ"], ids["MQ"], ids["TA"]), ids["pad"])
        return RewardTokens(ids["image"], (ids["reward"],), ids["pad"])

    def checkpoint(self, model: str) -> dict[str, Tensor]:
        """Every tensor of the released layout, in its order, filled by name; the language model's own head is noise."""
        return {key: fill(canonical(key), shape) for key, shape in self.layout(model).items()}

    def layout(self, model: str) -> dict[str, tuple[int, ...]]:
        """The keys of `checkpoint` with their shapes."""
        prefix = "base_model.model." if model == "videoalign" else ""
        return {f"{prefix}{key}": shape for key, shape in self._layout(model == "videoalign").items()}

    def _layout(self, adapted: bool) -> dict[str, tuple[int, ...]]:
        text, vision = self.text, self.vision
        wide, embed = text["hidden_size"], vision["embed_dim"]
        patch, inner = vision["patch_size"], int(embed * vision["mlp_ratio"])
        keys: dict[str, tuple[int, ...]] = {
            "visual.patch_embed.proj.weight": (embed, 3, vision["temporal_patch_size"], patch, patch)
        }
        for i in range(vision["depth"]):
            block = {"norm1": (), "norm2": (), "attn.qkv": (3 * embed, embed), "attn.proj": (embed, embed)}
            block |= {"mlp.fc1": (inner, embed), "mlp.fc2": (embed, inner)}
            for name, shape in block.items():
                keys[f"visual.blocks.{i}.{name}.weight"] = shape or (embed,)
                keys[f"visual.blocks.{i}.{name}.bias"] = (shape or (embed,))[:1]
        merged = embed * vision["spatial_merge_size"] ** 2
        keys |= {"visual.merger.ln_q.weight": (embed,), "visual.merger.ln_q.bias": (embed,)}
        for name, shape in {"0": (merged, merged), "2": (vision["hidden_size"], merged)}.items():
            keys |= {f"visual.merger.mlp.{name}.weight": shape, f"visual.merger.mlp.{name}.bias": shape[:1]}
        keys["model.embed_tokens.weight"] = (text["vocab_size"], wide)
        narrow = wide // text["num_attention_heads"] * text["num_key_value_heads"]
        deep = text["intermediate_size"]
        sizes = [(wide, wide), (narrow, wide), (narrow, wide), (wide, wide), (deep, wide), (deep, wide), (wide, deep)]
        base, rank = (".base_layer" if adapted else ""), self.lora.rank
        for i in range(text["num_hidden_layers"]):
            for name, (rows, columns) in zip(LINEARS, sizes, strict=True):
                stem = f"model.layers.{i}.{name}"
                keys[f"{stem}{base}.weight"] = (rows, columns)
                if name[-6:] in ("q_proj", "k_proj", "v_proj"):
                    keys[f"{stem}{base}.bias"] = (rows,)
                if adapted:
                    keys[f"{stem}.lora_A.default.weight"] = (rank, columns)
                    keys[f"{stem}.lora_B.default.weight"] = (rows, rank)
            keys |= {
                f"model.layers.{i}.{name}.weight": (wide,) for name in ("input_layernorm", "post_attention_layernorm")
            }
        keys |= {"model.norm.weight": (wide,), "lm_head.weight": (text["vocab_size"], wide)}
        if adapted:
            return {**keys, "rm_head.weight": (self.output_dim, wide)}
        for name, shape in {"0": (1024, wide), "3": (16, 1024), "5": (2, 16)}.items():
            keys |= {f"rm_head.{name}.weight": shape, f"rm_head.{name}.bias": shape[:1]}
        return keys

    def head(self, model: str) -> torch.nn.Module:
        """Without weights."""
        wide = self.text["hidden_size"]
        return LinearHead(wide, self.output_dim, 3) if model == "videoalign" else PreferenceHead(wide)

    def load(
        self, model: str, path: Path, dtype: torch.dtype = torch.float32, attention: str = "eager"
    ) -> Qwen2VLReward:
        """The scorer out of a checkpoint on disk."""
        lora = self.lora if model == "videoalign" else None
        tokens = self.reward_tokens(model)
        return load_reward(path, self.config(), self.head(model), tokens, lora, dtype, "cpu", attention)

    def build(self, model: str, dtype: torch.dtype = torch.float32, attention: str = "eager") -> Qwen2VLReward:
        """The scorer, through a checkpoint in the released layout."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.pth"
            torch.save(self.checkpoint(model), path)
            return self.load(model, path, dtype, attention)

    def frames(self, model: str) -> list[Tensor]:
        """The batch's frames [T, 3, H, W] in 0 … 255, float32; an image is one frame."""
        return [drawn_frames(row) for row in self.rows[model]]

    def patches(self, model: str) -> tuple[Tensor, list[tuple[int, int, int]]]:
        """What the vision tower is given: patches of all rows, and their grids."""
        parts = [patchify(normalise(frames)) for frames in self.frames(model)]
        return torch.cat([patches for patches, _ in parts]), [grid for _, grid in parts]

    def token_rows(self, model: str, grids: Sequence[tuple[int, int, int]]) -> list[list[int]]:
        """The batch's rows of token ids."""
        return [row_of_tokens(model, row, grid, self.tokens) for row, grid in zip(self.rows[model], grids, strict=True)]


def row_of_tokens(model: str, row: Mapping[str, Any], grid: tuple[int, int, int], ids: Mapping[str, int]) -> list[int]:
    """A row's token ids: given, or drawn around its vision and reward tokens."""
    if "input_ids" in row:
        return list(row["input_ids"])
    s = np.random.RandomState(row["text_seed"]).randint(0, row.get("text_bound", 290), row["text_tokens"]).tolist()
    vision = [ids["video" if model == "videoalign" else "image"]] * token_count(grid)
    shown = [ids["vision_start"], *vision, ids["vision_end"]]
    if model == "videoalign":
        return [*s[:5], *shown, *s[5:15], ids["VQ"], *s[15:22], ids["MQ"], *s[22:28], ids["TA"], *s[28:]]
    return [*s[:4], *shown, *s[4:20], ids["reward"], *s[20:]]


def check_config(given: Mapping[str, Any]) -> None:
    """Raises ValueError for an entry of a file's config that nothing reads: its values would be taken for others."""
    known = {"text": TEXT, "vision": VISION, "tokens": TOKENS, "lora": LORA} | {model: {"rows": ()} for model in MODELS}
    unread = sorted(given.keys() - known.keys() - {"output_dim"})
    for name, table in known.items():
        unread += [f"{name}.{part}" for part in given.get(name, {}) if part not in table]
    if unread:
        raise ValueError(f"the config has entries that nothing reads: {unread}")


def multimodal_positions(
    reward: Qwen2VLReward, rows: Sequence[Sequence[int]], grids: Sequence[Sequence[int]]
) -> Tensor:
    """The 3-D positions [3, B, L] that a present-day call computes by itself: the wrong ones."""
    ids, mask = reward.pad(rows)
    kinds = (ids == reward.tokens.vision).int() * (1 if reward.modality == "image" else 2)
    sizes = {f"{reward.modality}_grid_thw": torch.tensor([list(grid) for grid in grids])}
    find = reward.backbone.get_rope_index
    if "mm_token_type_ids" in inspect.signature(find).parameters:  # transformers 5.0 finds the vision tokens itself
        sizes["mm_token_type_ids"] = kinds
    return find(input_ids=ids, attention_mask=mask, **sizes)[0]


def _text_sizes(shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    if "language_model.embed_tokens.weight" not in shapes:
        return {}
    vocab, wide = shapes["language_model.embed_tokens.weight"]
    narrow = shapes["language_model.layers.0.self_attn.k_proj.weight"][0]
    layers = {match[1] for name in shapes if (match := re.match(r"language_model\.layers\.(\d+)\.", name))}
    return {
        "vocab_size": vocab,
        "hidden_size": wide,
        "num_hidden_layers": len(layers),
        "intermediate_size": shapes["language_model.layers.0.mlp.gate_proj.weight"][0],
        "num_key_value_heads": narrow * TEXT["num_attention_heads"] // wide,
    }


def _vision_sizes(shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    if "visual.patch_embed.proj.weight" not in shapes:
        return {}
    embed = shapes["visual.patch_embed.proj.weight"][0]
    blocks = {match[1] for name in shapes if (match := re.match(r"visual\.blocks\.(\d+)\.", name))}
    return {
        "depth": len(blocks),
        "embed_dim": embed,
        "mlp_ratio": shapes["visual.blocks.0.mlp.fc1.weight"][0] // embed,
        "hidden_size": shapes["visual.merger.mlp.2.weight"][0],
    }


def _lora_sizes(shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    ranks = {shape[0] for name, shape in shapes.items() if ".lora_A." in name}
    return {"rank": ranks.pop()} if len(ranks) == 1 else {}


def sections(text: Mapping[str, Any]) -> list[int]:
    """The packaged sections, or for another head size an eighth for time and the rest for height and width."""
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    if half == sum(TEXT["mrope_section"]):
        return TEXT["mrope_section"]
    return [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
