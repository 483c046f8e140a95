"""What a golden file holds and what comparing with it gives."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """name: the file's name without suffix. hparams: its hyper-parameters. tensors: everything in it."""

    name: str
    hparams: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        """A tensor of the file. Raises ValueError where the file lacks it."""
        if name not in self.tensors:
            raise ValueError(f"{self.name} has no tensor {name!r}")
        return self.tensors[name]

    def hparam(self, name: str) -> Any:
        """A hyper-parameter of the file. Raises ValueError where the file lacks it."""
        if name not in self.hparams:
            raise ValueError(f"{self.name} has no hyper-parameter {name!r}")
        return self.hparams[name]


@dataclass(frozen=True)
class Row:
    """One comparison: the error of a tensor against the tolerance of its case. how: precision and code path."""

    tensor: str
    error: float
    tolerance: float
    how: str

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


class Kind(Protocol):
    """A module that knows one kind of case. Patterns are those of `fnmatch`."""

    INPUTS: tuple[str, ...]
    """Tensors that are given, not expected."""
    NOT_TAKEN_UP: tuple[str, ...]
    """Expected tensors that this project has nothing to compare with yet."""

    def check(self, case: Case) -> list[Row]:
        """Compute and compare all other tensors."""
        ...


def read_case(path: Path) -> Case:
    """Read a golden file. Raises ValueError that names the file where it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        hparams = json.loads(metadata["hparams"])
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a golden file: {error}") from error
    except KeyError as error:
        raise ValueError(f"{path} has no hyper-parameters (metadata field 'hparams')") from error
    return Case(path.stem, hparams, tensors)


def largest_difference(actual: Tensor, expected: Tensor) -> float:
    """max |actual − expected|."""
    return float((actual - expected).abs().max())


def scaled_difference(actual: Tensor, expected: Tensor) -> float:
    """max |actual − expected| / max(1, max |expected|): absolute for small numbers, relative for large ones."""
    return largest_difference(actual, expected) / max(1.0, float(expected.abs().max()))


def relative_norm(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖."""
    return float((actual - expected).norm() / expected.norm())


def compare(case: Case, tensor: str, actual: Tensor, tolerance: float, how: str, measure=largest_difference) -> Row:
    """Compare one tensor in float64. Raises ValueError where the file lacks it or its shape is another."""
    expected = case[tensor]
    if actual.shape != expected.shape:
        raise ValueError(f"{case.name}: {tensor} is {tuple(expected.shape)}, computed {tuple(actual.shape)}")
    return Row(tensor, measure(actual.detach().double(), expected.double()), tolerance, how)
