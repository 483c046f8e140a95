"""Safetensors files, read and written so that what goes wrong names the file."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors. Raises OSError that names the path, e.g. for a full disk."""
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file. Raises ValueError for anything that is not a whole safetensors file."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def check_tensors(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    """Every name and shape must agree. Raises ValueError that shows the first differences."""
    missing, foreign = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    if missing or foreign:
        raise ValueError(
            f"{source} does not fit the network: {len(missing)} tensors missing {missing[:3]}, "
            f"{len(foreign)} unknown {foreign[:3]}"
        )
    for name, tensor in given.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{source} does not fit the network: {name} has shape {tuple(tensor.shape)}, "
                f"the network needs {tuple(expected[name].shape)}"
            )


def start_hash(*networks: nn.Module, entries: int = 64) -> str:
    """A hash of names, shapes and some evenly spaced entries of the weights that networks start from: of the frozen
    ones, of all where everything trains.

    A few milliseconds where hashing every byte would take seconds; a single changed entry may go unseen.
    """
    digest = hashlib.sha256()
    for network in networks:
        named = dict(network.named_parameters())
        frozen = {name: parameter for name, parameter in named.items() if not parameter.requires_grad}
        for name, parameter in (frozen or named).items():
            sample = parameter.detach().flatten()[:: max(1, parameter.numel() // entries)].double().cpu()
            digest.update(f"{name}{list(parameter.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()
