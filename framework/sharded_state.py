"""The part of a run's state that is sharded over ranks, in a checkpoint by torch.distributed.checkpoint.

Apart from `framework.checkpoint` because importing it costs a second and most runs have no such part. Its safetensors
files are used, not its default ones, which it unpickles.
"""

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, zeros

PLACE, SHAPE, DTYPE = "$sharded", "shape", "dtype"


def parted(state: Any, path: tuple[str, ...] = ()) -> tuple[Any, dict[str, DTensor]]:
    """A state with a note in the place of each sharded tensor, and those tensors by their place."""
    if isinstance(state, DTensor):
        name = "/".join(path)
        return {PLACE: name, SHAPE: list(state.shape), DTYPE: str(state.dtype).removeprefix("torch.")}, {name: state}
    if isinstance(state, Mapping):
        parts = {key: parted(value, (*path, str(key))) for key, value in state.items()}
        return {key: rest for key, (rest, _) in parts.items()}, joined(found for _, found in parts.values())
    if isinstance(state, list | tuple):
        items = [parted(value, (*path, str(i))) for i, value in enumerate(state)]
        return type(state)(rest for rest, _ in items), joined(found for _, found in items)
    return state, {}


def joined(parts: Any) -> dict[str, DTensor]:
    """One dict of several."""
    return {name: tensor for part in parts for name, tensor in part.items()}


def write_sharded(folder: Path, tensors: Mapping[str, DTensor]) -> None:
    """Every rank writes what it holds, into files of its own. Raises OSError on all ranks where one cannot."""
    with one_error(OSError, f"{folder} cannot be written"):
        checkpoint.save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))


def restored(state: Any, folder: Path, mesh: DeviceMesh | None) -> Any:
    """The state that `parted` took apart: sharded over the mesh, or whole without one.

    The ranks need not be as many as those that wrote it. Raises ValueError where files and notes do not agree.
    """
    empty: dict[str, Tensor] = {}

    def blank(note: Mapping[str, Any]) -> Tensor:
        shape, dtype = note[SHAPE], getattr(torch, note[DTYPE])
        tensor = torch.zeros(shape, dtype=dtype) if mesh is None else zeros(
            *shape, dtype=dtype, device_mesh=mesh, placements=[Shard(0)]
        )  # fmt: skip
        return empty.setdefault(note[PLACE], tensor)

    filled = replaced(state, blank)
    if empty:
        reader = HuggingFaceStorageReader(str(folder))
        check_whole(empty, reader, folder)
        with warnings.catch_warnings(), one_error(ValueError, f"{folder} cannot be read"):
            warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a single process.*")
            checkpoint.load(dict(empty), storage_reader=reader)
    return filled if mesh is None else spread(filled, mesh)


def check_whole(tensors: Mapping[str, Tensor], reader: HuggingFaceStorageReader, folder: Path) -> None:
    """Raises ValueError where the files do not hold all of each tensor; what they lack would stay zero."""
    known = reader.read_metadata().state_dict_metadata
    for name, tensor in tensors.items():
        found = known.get(name)
        parts = [tuple(chunk.sizes) for chunk in found.chunks] if isinstance(found, TensorStorageMetadata) else []
        there, size = sum(map(math.prod, parts)), tensor.numel()
        if there != size:
            raise ValueError(f"{folder} holds {there:,} of the {size:,} numbers of {name}; a shard file is missing")


@contextmanager
def one_error(kind: type[Exception], what: str) -> Iterator[None]:
    """What torch.distributed.checkpoint raises for all ranks, which is no Exception, as one line of another kind."""
    try:
        yield
    except CheckpointException as error:
        rank, (reason, _) = next(iter(error.failures.items()))
        said = (str(reason).splitlines() or [type(reason).__name__])[0]
        raise kind(f"{what}: rank {rank}: {said}") from error


def replaced(state: Any, blank: Any) -> Any:
    """A state with ``blank(note)`` for every note."""
    if isinstance(state, Mapping):
        if PLACE in state:
            return blank(state)
        return {key: replaced(value, blank) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(replaced(value, blank) for value in state)
    return state


def spread(state: dict[str, Any], mesh: DeviceMesh) -> dict[str, Any]:
    """The state of a trainer whose policies and optimiser were whole, for one whose are sharded."""

    def part(value: Any) -> Any:
        if isinstance(value, Tensor) and not isinstance(value, DTensor) and value.ndim:
            return distribute_tensor(value.to(mesh.device_type), mesh, [Shard(0)])
        return {key: part(item) for key, item in value.items()} if isinstance(value, dict) else value

    optimizer = state["torch_optimizer"]
    return state | {
        "policies": part(state["policies"]),
        "torch_optimizer": optimizer | {"state": part(optimizer["state"])},
    }


def mesh_of(state: Any) -> DeviceMesh | None:
    """The ranks that the tensors of a state are sharded over, None where none is."""
    _, tensors = parted(state)
    return next((tensor.device_mesh for tensor in tensors.values()), None)
