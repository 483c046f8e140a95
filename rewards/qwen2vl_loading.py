"""Reads a released scorer's checkpoint into `rewards.qwen2vl.Qwen2VLReward`, every tensor accounted for.

    in the file                                            in the network
    base_model.model. (VideoAlign, as PEFT saved it)       stripped
    visual.*                                               visual.*
    model.embed_tokens, model.layers.N.*, model.norm       language_model.*
    *.base_layer.*, *.lora_A.default, *.lora_B.default     *.*, W += (alpha/rank) B A in float32, then cast
    lm_head.weight                                         dropped: no score needs it
    rm_head.*                                              the head

The layouts that transformers 5 writes (model.visual.*, model.language_model.*, or both without model.) are read too.
A file is of one layout; a key that is missing, unknown or of another shape is an error that names it, and then nothing
is loaded.
"""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rewards.qwen2vl import Qwen2VLReward, RewardTokens, empty_backbone, one_line, tensors_digest

if TYPE_CHECKING:
    from transformers import Qwen2VLConfig

PEFT = "base_model.model."
LAYOUTS: dict[str, dict[str, str]] = {
    "transformers 4": {
        "visual.": "visual.",
        "model.embed_tokens.": "language_model.embed_tokens.",
        "model.layers.": "language_model.layers.",
        "model.norm.": "language_model.norm.",
    },
    "transformers 5": {"model.visual.": "visual.", "model.language_model.": "language_model."},
    "the body alone": {"visual.": "visual.", "language_model.": "language_model."},
}
"""Prefixes in the file → prefixes in the network."""
LM_HEAD = "lm_head.weight"
ADAPTED = re.compile(r"(?P<module>.+)\.(?:base_layer\.(?P<leaf>weight|bias)|lora_(?P<factor>[AB])\.default\.weight)")
LAYER = re.compile(r"\.\d+\.")
PICKLED = (".pth", ".pt", ".bin")


@dataclass(frozen=True)
class UnmergedLoRA:
    """Adapters that a checkpoint holds beside its weights: W += alpha/rank · B A."""

    rank: int
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def load_reward(
    path: Path,
    config: "Qwen2VLConfig",
    head: nn.Module,
    tokens: RewardTokens,
    lora: UnmergedLoRA | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    attention: str = "sdpa",
) -> Qwen2VLReward:
    """A scorer with the weights of ``path``: a file, an index of shards, or a folder with one of them.

    head: filled from the file's rm_head. dtype: of the body; the head stays float32. Raises ValueError that names the
    file and the key.
    """
    backbone = empty_backbone(config, attention)
    given = read_checkpoint(path)
    text: Any = config.text_config
    widths = (text.vocab_size, text.hidden_size)
    expected = {**backbone.state_dict(), **head.state_dict()}
    sources = match_keys({name: tensor.shape for name, tensor in given.items()}, expected, widths, lora, str(path))
    body: dict[str, Tensor] = {}
    top: dict[str, Tensor] = {}
    for name, source in sources.items():
        in_head = name.startswith("rm_head.")
        tensor = source.build(given, lora).to(device, torch.float32 if in_head else dtype, copy=True)
        (top if in_head else body)[name] = tensor
    backbone.load_state_dict(body, assign=True)
    head.load_state_dict(top, assign=True)
    reward = Qwen2VLReward(backbone, head, tokens, tensors_digest(given))
    left = [name for name, tensor in reward.named_parameters() if tensor.is_meta]
    assert not left, f"parameters without a value: {left[:3]}"
    return reward.to(device)  # the position tables; parameters are there


@dataclass(frozen=True)
class Source:
    """Where a parameter comes from: the key of its weight, and those of the adapter on it, if there is one."""

    weight: str
    down: str | None = None
    up: str | None = None

    def build(self, given: Mapping[str, Tensor], lora: UnmergedLoRA | None) -> Tensor:
        """The weight, its adapter merged in float32 on the CPU."""
        weight = given[self.weight]
        if self.down is None or self.up is None or lora is None:
            return weight
        return weight.float() + lora.scale * (given[self.up].float() @ given[self.down].float())


@dataclass(frozen=True)
class Layout:
    """How a file spells the network's names. peft: the prefix of all of its keys, or nothing. table: see `LAYOUTS`."""

    title: str
    peft: str

    @classmethod
    def of(cls, keys: Collection[str]) -> "Layout":
        """The layout that fits most keys: one wrong key then is the one that is named."""
        peft = PEFT if 2 * sum(key.startswith(PEFT) for key in keys) > len(keys) else ""
        layouts = [cls(title, peft) for title in LAYOUTS]
        return max(layouts, key=lambda layout: sum(layout.name(key) is not None for key in keys))

    def name(self, key: str) -> str | None:
        """What the network calls a key's tensor, adapters aside; None for a key that the layout does not have."""
        if not key.startswith(self.peft):
            return None
        key = key.removeprefix(self.peft)
        if key == LM_HEAD or key.startswith("rm_head."):
            return key
        old = next((old for old in LAYOUTS[self.title] if key.startswith(old)), None)
        return None if old is None else LAYOUTS[self.title][old] + key.removeprefix(old)

    def key(self, name: str) -> str:
        """The reverse of `name`."""
        old = next((old for old, new in LAYOUTS[self.title].items() if name.startswith(new)), None)
        return self.peft + (name if old is None else old + name.removeprefix(LAYOUTS[self.title][old]))


def match_keys(
    shapes: Mapping[str, torch.Size],
    expected: Mapping[str, Tensor],
    embedding: tuple[int, int],
    lora: UnmergedLoRA | None,
    source: str,
) -> dict[str, Source]:
    """Which keys of a file make which parameter. Raises ValueError naming keys that are missing, unknown or of another
    shape, and for adapters that no ``lora`` was given for, or the reverse.

    shapes: of the file's tensors. expected: parameters by name. embedding: (rows, width) of the token table.
    """
    layout = Layout.of(shapes)
    names = {key: layout.name(key) for key in shapes}
    parts = {key: ADAPTED.fullmatch(name) for key, name in names.items() if name is not None}
    # a module that has adapters in one layer has them in all: one without is of a file that is not whole
    kinds = {LAYER.sub(".", match["module"]) for match in parts.values() if match is not None}
    modules = {name.rpartition(".")[0] for name in expected}
    wrapped = {match["module"] for match in parts.values() if match is not None}
    wrapped |= {module for module in modules if LAYER.sub(".", module) in kinds}

    def key_of(name: str, factor: str = "") -> str:
        """The key that a parameter, or one factor of the adapter on it, must have in this file."""
        module, _, leaf = name.rpartition(".")
        if factor:
            return layout.key(f"{module}.lora_{factor}.default.weight")
        return layout.key(f"{module}.base_layer.{leaf}" if module in wrapped else name)

    adapted = {name for name in expected if name.endswith(".weight") and name.removesuffix(".weight") in wrapped}
    needed = {key_of(name): tuple(tensor.shape) for name, tensor in expected.items()}
    rank = 0 if lora is None else lora.rank
    for name in adapted:
        rows, columns = expected[name].shape[0], expected[name].shape[-1]
        needed |= {key_of(name, "A"): (rank, columns), key_of(name, "B"): (rows, rank)}
    head = layout.key(LM_HEAD)
    if head in shapes or layout.title == "transformers 4":  # each such file has one, so one without is not whole
        needed[head] = embedding

    missing, unknown = sorted(needed.keys() - shapes.keys()), sorted(shapes.keys() - needed.keys())
    if missing or unknown:
        raise ValueError(
            f"{source} does not fit the network (layout of {layout.title}): {len(missing)} keys missing {missing[:3]}, "
            f"{len(unknown)} unknown {unknown[:3]}"
        )
    if bool(adapted) != (lora is not None):
        there = f"{len(adapted)} unmerged adapters" if adapted else "no unmerged adapters"
        raise ValueError(
            f"{source} has {there}, but lora={lora}; give their rank and alpha, or None where there are none"
        )
    wrong = [f"{key} is {tuple(shapes[key])}, not {shape}" for key, shape in needed.items() if shapes[key] != shape]
    if wrong:
        raise ValueError(f"{source} does not fit the network: {len(wrong)} shapes differ: {'; '.join(wrong[:3])}")
    return {
        name: Source(key_of(name), *([key_of(name, "A"), key_of(name, "B")] if name in adapted else []))
        for name in expected
    }


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, of the shards of an index, or of the one checkpoint of a folder; torch files are mapped.

    Raises ValueError that names the file for anything else, and for an index that does not agree with its shards.
    """
    file = find_weights(path)
    if file.name.endswith(".index.json"):
        return _read_shards(file)
    return _read_file(file)


def find_weights(path: Path) -> Path:
    """The file or index that holds the weights: ``path`` itself, or the only one of that folder."""
    if not path.is_dir():
        if not path.is_file():
            raise ValueError(f"there is no checkpoint {path}")
        return path
    indices = sorted(path.glob("*.index.json"))
    files = sorted(file for suffix in (".safetensors", *PICKLED) for file in path.glob(f"*{suffix}"))
    folders = sorted(folder for folder in path.glob("checkpoint-*") if folder.is_dir())
    found = indices or [file for file in files if file.stem == "model"] or files or folders
    if len(found) != 1:
        names = [file.name for file in found]
        raise ValueError(f"the folder {path} must hold one checkpoint, found {names}; name the file")
    return find_weights(found[0]) if found[0].is_dir() else found[0]


def _read_shards(index: Path) -> dict[str, Tensor]:
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted({str(shard) for shard in places.values()})
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of shards ({type(error).__name__}: {error})") from error
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        if Path(shard).name != shard:
            raise ValueError(f"{index} names the shard {shard!r}, which is not in its own folder")
        there = _read_file(index.parent / shard)
        differing = sorted({key for key, file in places.items() if file == shard} ^ there.keys())
        if differing:
            raise ValueError(f"{index} and its shard {shard} disagree about {differing[:3]}")
        tensors |= there
    return tensors


def _read_file(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} is not a whole safetensors file: {error}") from error
    elif file.suffix in PICKLED:
        try:
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # what a broken or unsafe file raises is not one family
            raise ValueError(f"{file} cannot be read as plain tensors: {one_line(error)}") from error
    else:
        raise ValueError(f"{file} is no checkpoint: its name must end in .safetensors, .pth, .pt, .bin or .index.json")
    if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
        raise ValueError(f"{file} must hold tensors by name, it holds {type(tensors).__name__}")
    wrong = [name for name, tensor in tensors.items() if not isinstance(tensor, Tensor)]
    wrong = wrong or [name for name, tensor in tensors.items() if not tensor.is_floating_point()]
    if wrong:
        raise ValueError(f"{file}: {wrong[:3]} must be tensors of floats")
    return tensors
