"""Where a command computes: a checked device, and how many CPU threads."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn

META = "meta"
"""torch's device without numbers."""
_SIZES_ONLY: ContextVar[bool] = ContextVar("sizes_only", default=False)


@contextmanager
def sizes_only() -> Iterator[None]:
    """What is built inside need not read its weights: a network may be made on the meta device, which has sizes alone.

    For whoever plans a run and takes no step of it; a generator that does not ask is built as ever.
    """
    token = _SIZES_ONLY.set(True)
    try:
        yield
    finally:
        _SIZES_ONLY.reset(token)


def is_sizes_only() -> bool:
    """Whether sizes are enough for what is being built."""
    return _SIZES_ONLY.get()


def local_device(device: str) -> str:
    """The device of this process: "cuda" means, for a rank that torchrun started, the GPU of its own.

    Raises ValueError where all ranks of a job are told to use one and the same GPU.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not device.startswith("cuda"):
        return device
    if device != "cuda":
        raise ValueError(f"device={device!r} would put every rank on one GPU; give --device cuda")
    return f"cuda:{os.environ['LOCAL_RANK']}"


def prepare(network: nn.Module, device: str, threads: int | None) -> None:
    """Move the network to a device and set torch's CPU threads (None leaves torch's choice).

    Raises ValueError for a device that this torch does not have, before anything is written.
    """
    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)
    if device == META:
        raise ValueError("device='meta' holds no numbers to compute with; only doctor and train --dry_run take it")
    device = local_device(device)
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={device!r} cannot be used here ({reason}); give another --device") from error
    network.to(device)
