"""Named random streams: a draw depends on (seed, name), never on the rank, the batch or the order of calls.

Noise is drawn on the CPU and then moved, so that a run has the same noise on every device.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Name = str | int


def derive_seed(seed: int, *names: Name) -> int:
    """A 63-bit seed from a base seed and any names, equal on every machine and Python version."""
    text = "\x1f".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def check_seed(seed: int, name: str) -> None:
    """Raises ValueError for a seed that torch cannot take; name: the parameter, for the message."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"{name} must lie in 0 … 2⁶³ − 1, got {seed}")


def make_generator(seed: int) -> torch.Generator:
    """A CPU generator that starts from ``seed``.

    torch's Mersenne Twister reads the low 32 bits alone: some two of n streams coincide with probability n² / 2³³.
    """
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Streams:
    """The random streams of one place in the run, e.g. ``Streams(seed).at("rl", step)``."""

    seed: int
    path: tuple[Name, ...] = ()

    def at(self, *names: Name) -> "Streams":
        """The streams below this one."""
        return Streams(self.seed, (*self.path, *names))

    def derive(self, *names: Name) -> int:
        """The seed of one named stream, to be stored in a plan."""
        return derive_seed(self.seed, *self.path, *names)

    def __call__(self, *names: Name) -> torch.Generator:
        """A fresh generator for one named stream."""
        return make_generator(self.derive(*names))


def draw_noise(seeds: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """One standard normal sample per seed: [len(seeds), *shape], float32. Equal seeds give equal noise."""
    drawn: dict[int, Tensor] = {}
    for seed in seeds:
        if seed not in drawn:
            drawn[seed] = torch.randn(tuple(shape), generator=make_generator(seed))
    return torch.stack([drawn[seed] for seed in seeds]).to(device)
