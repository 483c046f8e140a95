"""Where a command computes: a checked device, and how many CPU threads."""

import os

import torch
from torch import nn


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
    device = local_device(device)
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={device!r} cannot be used here ({reason}); give another --device") from error
    network.to(device)
