"""Files that hold a state dict: torch and safetensors files, sharded or not. Nothing in them is run.

Tensors are mapped from the file, not read: what is not used costs no memory, and a checkpoint of 14 billion parameters
is never in memory twice.
"""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from backbones.wan.checkpoints import listed

TORCH = (".pt", ".pth", ".ckpt", ".bin")
SAFETENSORS = ".safetensors"
INDEX = ".safetensors.index.json"


def read_state(path: Path, sub_key: str | None = None) -> dict[str, Tensor]:
    """The state dict in a file, on the CPU. sub_key: the entry that holds it, None where the file is the state dict.

    In a flat file a sub-key is the first component of the keys. Raises ValueError in one line for anything that is not
    a whole file of tensors, and for a sub-key that is missing or was not given.
    """
    return chosen(read_content(path), sub_key, path)


def read_content(path: Path) -> Mapping[str, Any]:
    """What a file holds, of whichever kind it is. Raises ValueError as `read_state` does."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    if path.name.endswith(INDEX):
        return read_shards(path)
    if path.suffix == SAFETENSORS:
        return read_safetensors(path)
    if path.suffix in TORCH:
        return read_torch(path)
    raise ValueError(f"{path} is of no known kind; known are {', '.join((*TORCH, SAFETENSORS, INDEX))}")


def read_torch(path: Path) -> Mapping[str, Any]:
    """The dict in a torch file. Raises ValueError for a damaged file, and for one with anything else than tensors in
    containers: such a file could run code when it is read, so it is not read."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # what is not a whole file of tensors fails with any kind of error
        first = (str(error).strip().splitlines() or [""])[0].split(". ")[0]  # torch goes on to advise against safety
        reason = f"{type(error).__name__}: {first}"
        raise ValueError(
            f"{path} is not a whole torch file of tensors and nothing else, it was not loaded ({reason[:160]})"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict")
    return content


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises ValueError for a damaged one."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def read_index(path: Path) -> dict[str, str]:
    """Tensor → name of the shard that holds it. Raises ValueError for anything else, and for a shard elsewhere."""
    try:
        shards = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not all(type(part) is str for pair in shards.items() for part in pair):
            raise TypeError("weight_map holds something else than names")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no index of a sharded checkpoint: {error}") from error
    outside = sorted({name for name in shards.values() if Path(name).name != name or not name.endswith(SAFETENSORS)})
    if outside:
        raise ValueError(f"{path} names shards that are no safetensors files beside it: {listed(outside)}")
    return dict(shards)


def read_shards(path: Path) -> dict[str, Tensor]:
    """The tensors of all shards of an index. Raises ValueError where shards and index do not agree."""
    index = read_index(path)
    absent = sorted({name for name in index.values() if not (path.parent / name).is_file()})
    if absent:
        raise ValueError(f"{path} names {len(absent)} shards that are not beside it: {listed(absent)}")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(index.values())):
        held = read_safetensors(path.parent / shard)
        promised = {key for key, name in index.items() if name == shard}
        wrong = sorted(held.keys() ^ promised)
        if wrong:
            raise ValueError(f"{path.parent / shard} and its index differ in {len(wrong)} tensors: {listed(wrong)}")
        tensors |= held
    return tensors


def chosen(content: Mapping[str, Any], sub_key: str | None, path: Path) -> dict[str, Tensor]:
    """The state dict under a sub-key. Raises ValueError that names what there is to choose from."""
    if sub_key is None:
        nested = sorted(str(key) for key, value in content.items() if isinstance(value, Mapping))
        if nested:
            raise ValueError(f"{path} holds several state dicts: {listed(nested)}; name one of them as sub_key")
        state: Any = content
    elif sub_key in content:
        state = content[sub_key]
    else:
        state = {key.removeprefix(f"{sub_key}."): content[key] for key in content if key.startswith(f"{sub_key}.")}
        if not state:
            there = sorted({str(key).split(".")[0] for key in content})
            raise ValueError(f"{path} holds no {sub_key!r}, but {listed(there)}; change sub_key")
    if not isinstance(state, Mapping):
        raise ValueError(f"{path}: {sub_key!r} is a {type(state).__name__}, not a state dict; change sub_key")
    strange = sorted(str(key) for key, value in state.items() if type(key) is not str or not is_stored(value))
    if strange or not state:
        raise ValueError(f"{path}: {len(strange)} entries of {sub_key or 'the file'} are no tensors: "
                         f"{listed(strange) or 'it is empty'}")  # fmt: skip
    return dict(state)


def is_stored(value: Any) -> bool:
    """Whether something is a tensor with all of its numbers in the file: neither sparse nor a shape alone."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
