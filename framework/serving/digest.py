"""What tells two reward models apart: a hash of class, settings, weights and version.

A model that knows better says so itself, in a method ``digest() -> str``. Of any other the class, its fields or
attributes and the weights of its modules are hashed, however deep they are nested; of the attributes of modules inside
of it the numbers, since texts there may be paths.
"""

import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy
import torch
from torch import Tensor, nn

from framework import __version__
from framework.interfaces import RewardModel


@runtime_checkable
class Digested(Protocol):
    """What names itself."""

    def digest(self) -> str:
        """A text that is another wherever scores could be."""
        ...


def model_digest(model: object) -> str:
    """64 hexadecimal digits: of another model, other settings, other weights or another version other ones."""
    return hashlib.sha256(f"{__version__} {described(model)}".encode()).hexdigest()


def described(value: Any, above: tuple[int, ...] = ()) -> str:
    """A value in words that do not depend on where in memory it is."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | Path | torch.dtype | Enum):
        return repr(value)
    if isinstance(value, torch.device):
        return "device"  # where a score is computed is not what is computed
    if id(value) in above:
        return "itself"
    inner = (*above, id(value))
    if isinstance(value, Tensor):
        return f"{value.dtype}{list(value.shape)}{bits(value)}"
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, Mapping):
        pairs = sorted(f"{described(k, inner)}: {described(v, inner)}" for k, v in value.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(described(item, inner) for item in value)}]"
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(described(item, inner) for item in value))}}}"
    if isinstance(value, partial):
        return f"partial({described([value.func, value.args, value.keywords], inner)})"
    if isinstance(value, numpy.ndarray):
        return f"{value.dtype}{list(value.shape)}{hashlib.sha256(value.tobytes()).hexdigest()}"
    if inspect.ismethod(value):
        return f"{value.__module__}.{value.__qualname__} of {described(value.__self__, inner)}"
    if isinstance(value, type) or inspect.isroutine(value):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, Digested):
        return f"{kind}({value.digest()})"
    if isinstance(value, nn.Module):
        return f"{kind}({described(dict(value.state_dict()), inner)}, {described(settings(value), inner)})"
    if is_dataclass(value):
        given = {field.name: getattr(value, field.name) for field in fields(value) if field.init}
        loaded = getattr(value, "__dict__", {})  # what was made of the fields is another thing where it has weights
        given |= {name: part for name, part in loaded.items() if isinstance(part, Tensor | nn.Module)}
        return f"{kind}({described(given, inner)})"
    try:
        return f"{kind}({described(vars(value), inner)})"
    except TypeError:  # no attributes of its own
        return kind


def settings(module: nn.Module) -> dict[str, Any]:
    """What else a module's results depend on: the numbers that it and the modules in it keep as attributes, and of a
    reward all that it keeps."""
    given = {
        f"{name}.{key}": value
        for name, part in module.named_modules()
        for key, value in vars(part).items()
        if not key.startswith("_") and isinstance(value, bool | int | float)
    }
    if isinstance(module, RewardModel):
        given |= {key: value for key, value in vars(module).items() if not key.startswith("_")}
    return given


def bits(tensor: Tensor) -> str:
    """sha256 of a tensor's numbers."""
    return hashlib.sha256(tensor.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
