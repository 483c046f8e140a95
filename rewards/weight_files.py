"""Small files of weights, read as tensors and as nothing else."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from framework.weights import read_tensors


def read_weights(file: str) -> Mapping[str, Tensor]:
    """Tensors by name of a .safetensors file, or of one that torch saved; with anything else in it, it is not read.

    Raises ValueError for a file that is missing, damaged, or holds more than tensors.
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"there is no file {file!r}; download the weights and name the file")
    if path.suffix == ".safetensors":
        return read_tensors(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a broken or unsafe file raises is not one family
        reason = next(iter(str(error).splitlines()), "")
        raise ValueError(f"{file} is not a file of tensors: {type(error).__name__}: {reason[:120]}") from error
    if not isinstance(found, Mapping) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise ValueError(f"{file} must hold tensors by name and nothing else, got {type(found).__name__}")
    return found
