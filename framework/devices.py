"""Where a command computes: a checked device, and how many CPU threads."""

import torch
from torch import nn


def prepare(network: nn.Module, device: str, threads: int | None) -> None:
    """Move the network to a device and set torch's CPU threads (None leaves torch's choice).

    Raises ValueError for a device that this torch does not have, before anything is written.
    """
    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={device!r} cannot be used here ({reason}); give another --device") from error
    network.to(device)
