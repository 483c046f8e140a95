"""Finds what a released scorer is made of: checkpoint, settings, the base model's config and a tokenizer."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from framework.devices import local_device
from rewards.optional import refuse_broken_torchvision
from rewards.qwen2vl import one_line

if TYPE_CHECKING:
    from transformers import Qwen2VLConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def find_dtype(name: str) -> torch.dtype:
    """Raises ValueError that names those there are."""
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {list(DTYPES)}, got {name!r}")
    return DTYPES[name]


def find_device(name: str) -> str:
    """The device of this process, see `framework.devices.local_device`. Raises ValueError for one that is not there."""
    device = local_device(name)
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device={device!r} cannot be used here ({one_line(error)}); give the reward another"
        ) from error
    return device


def find_release(checkpoint: str, patterns: Sequence[str]) -> Path:
    """A local file or folder, else the folder of a hub repository OWNER/NAME with the files of these patterns.

    Raises ValueError where there is neither.
    """
    path = Path(checkpoint)
    if path.exists():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        if checkpoint.count("/") != 1 or checkpoint.startswith((".", "/")):
            raise HFValidationError("it is no OWNER/NAME")
        return Path(snapshot_download(checkpoint, allow_patterns=list(patterns)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"checkpoint={checkpoint!r} is neither here nor could it be downloaded ({one_line(error)}); download it "
            f"where there is a network, `hf download {checkpoint} --local-dir FOLDER`, and name that folder"
        ) from error


def read_settings(path: Path, name: str) -> Mapping[str, Any]:
    """The JSON file of that name beside a checkpoint or one folder above; ``path``: the checkpoint or its folder."""
    folder = path if path.is_dir() else path.parent
    found = next((place / name for place in (folder, folder.parent) if (place / name).is_file()), None)
    if found is None:
        raise ValueError(f"there is no {name} beside {path}; it belongs to the checkpoint and holds its constants")
    try:
        settings = json.loads(found.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{found} is not JSON: {one_line(error)}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{found} must hold a table of settings, it holds {type(settings).__name__}")
    return settings


def setting(settings: object, name: str) -> Any:
    """The value under a name at any depth. Raises ValueError where it is not there, or twice with other values."""
    found = list(all_settings(settings, name))
    if not found:
        raise ValueError(f"the checkpoint's settings have no {name!r}; they may be of another release")
    if any(value != found[0] for value in found):
        raise ValueError(f"the checkpoint's settings have several values of {name!r}: {found[:3]}")
    return found[0]


def all_settings(settings: object, name: str) -> list[Any]:
    """The values under a name at every depth."""
    if isinstance(settings, dict):
        own = [settings[name]] if name in settings else []
        return own + [value for part in settings.values() for value in all_settings(part, name)]
    if isinstance(settings, list):
        return [value for part in settings for value in all_settings(part, name)]
    return []


def read_config(base: str, rows: int) -> "Qwen2VLConfig":
    """The base model's config, from a folder or the hub, with an embedding table of ``rows`` rows.

    The scorers' tables are smaller than their base's, which is padded.
    """
    refuse_broken_torchvision("a Qwen2-VL reward")
    from transformers import Qwen2VLConfig

    try:
        config = Qwen2VLConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"base={base!r} has no config.json that can be read or downloaded ({one_line(error)}); name a folder with "
            "the base model's config.json and tokenizer; its weights are not needed"
        ) from error
    text: Any = config.text_config
    text.vocab_size = rows
    return config


def read_tokenizer(source: str, special: Sequence[str]) -> Any:
    """A tokenizer from a folder or the hub, with special tokens added at its end where it does not have them yet."""
    refuse_broken_torchvision("a Qwen2-VL reward")
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, TypeError, KeyError) as error:  # what transformers raises for files that are not there
        raise ValueError(f"{source!r} has no tokenizer that can be read or downloaded ({one_line(error)})") from error
    tokenizer.add_tokens(list(special), special_tokens=True)
    return tokenizer


def tokenizer_folder(path: Path, base: str) -> str:
    """The tokenizer beside a checkpoint or one folder below, where there is one, else the base model's."""
    folder = path if path.is_dir() else path.parent
    found = sorted({place.parent for depth in ("", "*/") for place in folder.glob(f"{depth}tokenizer_config.json")})
    if len(found) > 1:
        raise ValueError(
            f"{folder} holds several tokenizers: {[str(place) for place in found]}; name the checkpoint's file"
        )
    return str(found[0]) if found else base
