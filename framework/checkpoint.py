"""Checkpoints: the state of a run as files that are whole or refused, and never unpickled.

A checkpoint is a folder ``step-000012``. It is written beside its place under another name, every file is hashed and
flushed to the disk, the manifest comes last, and one rename publishes it: whoever finds the folder finds all of it. A
state is nested dicts, lists and tuples of tensors, numbers, texts and None. Its tensors are those of a safetensors
file, the rest is JSON in the header of the same file.
"""

import hashlib
import json
import math
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import framework
from framework.weights import save_tensors

FORMAT = 1
"""Of what is written here; an older one is read as long as this module says how, a newer one is refused."""
MANIFEST, LATEST, CONFIG = "manifest.json", "latest", "config.gin"
ASIDE = "set-aside"
SHARED = "shared"
"""The part that rank 0 writes for all."""


class CheckpointError(ValueError):
    """A checkpoint that must not be used; the message is one line and says what is wrong with which file."""


def rank_part(rank: int) -> str:
    """The name of what one process keeps for itself."""
    return f"rank-{rank:05d}"


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself. files: name → (sha256, bytes). world: how many processes wrote it."""

    step: int
    world: int
    versions: dict[str, str]
    files: dict[str, tuple[str, int]]


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run, newest last.

    keep: how many stay; older ones are removed after a new one is published. rank, world, barrier: one process of
    several writes its own part, rank 0 publishes; with one process the barrier is nothing.
    """

    root: Path
    keep: int = 2
    rank: int = 0
    world: int = 1
    barrier: Callable[[], object] = lambda: None

    def folders(self) -> list[Path]:
        """All published checkpoints by step."""
        found = [path for path in self.root.glob("step-*") if path.name.removeprefix("step-").isdigit()]
        return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))

    def write(
        self, step: int, parts: Mapping[str, Any], config: str, together: Callable[[Path], None] | None = None
    ) -> Path:
        """Publish a checkpoint; every process calls it with the parts that are its own. One of that step is replaced.

        parts: name → state, e.g. ``shared`` from rank 0 and ``rank-00001`` from rank 1. together: writes further files
        into the folder, called by all processes at once. Raises ValueError for a state that cannot be written, OSError
        for a disk that cannot take it; the checkpoints that are there stay as they are.
        """
        name = f"step-{step:06d}"
        staged, final = self.root / f".staged-{name}", self.root / name
        try:
            if self.rank == 0:
                self.tidy()
                staged.mkdir(parents=True)
            self.barrier()
            for part, state in parts.items():
                write_part(staged / f"{part}.safetensors", state)
            if together is not None:
                together(staged)
            self.barrier()
            if self.rank == 0:
                (staged / CONFIG).write_text(config, encoding="utf-8")
                write_manifest(staged, step, self.world)
                self.publish(staged, final)
        except BaseException:
            if self.rank == 0:
                shutil.rmtree(staged, ignore_errors=True)
            raise
        self.barrier()
        return final

    def publish(self, staged: Path, final: Path) -> None:
        """Give a staged checkpoint its name, point ``latest`` to it, and remove what is more than ``keep``."""
        if final.exists():
            final.rename(final.with_name(f".removed-{final.name}"))
        staged.rename(final)
        pointer = self.root / f".staged-{LATEST}"
        pointer.write_text(final.name + "\n", encoding="utf-8")
        pointer.replace(self.root / LATEST)
        flush(self.root)
        for old in self.folders()[: -self.keep]:
            old.rename(old.with_name(f".removed-{old.name}"))  # a removal that is cut short leaves no half checkpoint
        self.tidy()

    def tidy(self) -> None:
        """Remove what a killed process left half written or half removed."""
        for pattern in (".staged-*", ".removed-*"):
            for path in self.root.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def set_aside_after(self, step: int) -> list[Path]:
        """Move the checkpoints of later steps out of the way, below ``set-aside``; where they are now."""
        moved = []
        for folder in self.folders():
            if int(folder.name.removeprefix("step-")) > step:
                place, number = self.root / ASIDE / folder.name, 2
                while place.exists():
                    place, number = self.root / ASIDE / f"{folder.name}-{number}", number + 1
                place.parent.mkdir(exist_ok=True)
                moved.append(folder.rename(place))
        return moved

    def verified(self, folder: Path) -> Manifest:
        """Its manifest, after every byte of its files was read and found to be what was written.

        Raises CheckpointError that says what is wrong, and which earlier checkpoint of the run is whole.
        """
        try:
            return verify(folder)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {self.offer(folder)}") from error.__cause__

    def offer(self, instead_of: Path) -> str:
        """A half sentence: the newest whole checkpoint before another one, with the argument that continues it."""
        there = self.folders()
        before = there[: there.index(instead_of)] if instead_of in there else there
        for folder in reversed(before):
            try:
                verify(folder)
            except CheckpointError:
                continue
            return f"{folder.name} before it is whole: --resume {folder}"
        return "no checkpoint before it is whole; start again in another --output_dir"


# one checkpoint


def versions() -> dict[str, str]:
    """Of what computes here."""
    return {"armillary": framework.__version__, "torch": torch.__version__, "python": platform.python_version()}


def write_manifest(folder: Path, step: int, world: int) -> None:
    """List the files of a folder with size and hash, the manifest's own hash among it, and flush all to the disk."""
    files = {}
    for path in sorted(folder.iterdir()):
        files[path.name] = {"sha256": file_hash(path), "bytes": path.stat().st_size}
        flush(path)
    body = {"format": FORMAT, "step": step, "world": world, "versions": versions(), "files": files}
    text = json.dumps(body | {"sha256": body_hash(body)}, indent=2) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    flush(folder / MANIFEST)
    flush(folder)


def read_manifest(folder: Path) -> Manifest:
    """Raises CheckpointError for a folder without a manifest, and for one that is damaged or of a newer format."""
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder} is no checkpoint: it holds no {MANIFEST}")
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        number, digest = body["format"], body.pop("sha256")
        if isinstance(number, int) and number > FORMAT:
            raise CheckpointError(
                f"{folder} was written by a newer armillary: its format is {number}, this version reads {FORMAT}"
            )
        if number != FORMAT or digest != body_hash(body):
            raise ValueError("its hash differs")
        files = {name: (str(entry["sha256"]), int(entry["bytes"])) for name, entry in body["files"].items()}
        return Manifest(body["step"], body["world"], body["versions"], files)
    except CheckpointError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def verify(folder: Path) -> Manifest:
    """Read a checkpoint once. Raises CheckpointError for a missing, truncated or changed file."""
    manifest = read_manifest(folder)
    for name, (digest, size) in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        there = path.stat().st_size
        if there != size:
            kind = "truncated" if there < size else "damaged"
            raise CheckpointError(f"{path} is {kind}: {there:,} bytes of {size:,}")
        if file_hash(path) != digest:
            raise CheckpointError(f"{path} is damaged: its hash differs from the one in {MANIFEST}")
    return manifest


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def body_hash(body: Mapping[str, Any]) -> str:
    """Of everything that a manifest says but this."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def flush(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# one part


def write_part(path: Path, state: Any) -> None:
    """Write a state as one file. Raises ValueError that names what a checkpoint cannot hold."""
    tensors = Collected()
    text = json.dumps(encode(state, (), tensors), allow_nan=False)
    save_tensors(path, tensors.named, metadata={"state": text})


def read_part(path: Path) -> Any:
    """The state of `write_part`, tensors on the CPU. Raises CheckpointError for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            # cloned: what safetensors returns may be the file itself, which a later checkpoint removes
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return decode(json.loads((file.metadata() or {})["state"]), tensors)
    except (SafetensorError, OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{path} is no part of a checkpoint: {error}") from error


class Collected:
    """The tensors of a state by name, on the CPU, each in memory of its own, as safetensors wants them."""

    def __init__(self) -> None:
        self.named: dict[str, Tensor] = {}
        self._storages: set[int] = set()

    def add(self, name: str, tensor: Tensor) -> str:
        """Take a tensor; returns the name that it has in the file."""
        while name in self.named:
            name += "'"
        value = tensor.detach().cpu().contiguous()
        if value.numel() and value.untyped_storage().data_ptr() in self._storages:
            value = value.clone()
        self._storages.add(value.untyped_storage().data_ptr())
        self.named[name] = value
        return name


def encode(value: Any, path: tuple[str, ...], tensors: Collected) -> Any:
    """JSON for a state; its tensors are put into ``tensors`` under their place in it.

    A dict with other keys than texts is ``{"$pairs": …}``, a tuple ``{"$tuple": …}``, a tensor ``{"$tensor": name}``,
    nan and the infinities ``{"$float": …}``.
    """
    if isinstance(value, Tensor):
        return {"$tensor": tensors.add("/".join(path), value)}
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if type(value) in (list, tuple):
        items = [encode(item, (*path, str(i)), tensors) for i, item in enumerate(value)]
        return items if type(value) is list else {"$tuple": items}
    if isinstance(value, Mapping):
        pairs = [(key, encode(item, (*path, str(key)), tensors)) for key, item in value.items()]
        if all(type(key) is str and not key.startswith("$") for key, _ in pairs):
            return dict(pairs)
        return {"$pairs": [[encode(key, (*path, "key"), tensors), item] for key, item in pairs]}
    raise ValueError(
        f"a checkpoint cannot hold {'.'.join(path) or 'this state'}, a {type(value).__name__}; a state is made of "
        f"tensors, numbers, texts, None, dicts, lists and tuples"
    )


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The state that `encode` made JSON of."""
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"$tensor": name}:
            return tensors[name]
        case {"$float": text}:
            return float(text)
        case {"$tuple": items}:
            return tuple(decode(item, tensors) for item in items)
        case {"$pairs": pairs}:
            return {decode(key, tensors): decode(item, tensors) for key, item in pairs}
    return {key: decode(item, tensors) for key, item in value.items()}
