"""Tiny commands and parts to configure in tests; nothing here trains anything."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal


class Exploration(ABC):
    """How branches differ."""

    @abstractmethod
    def branches(self) -> int:
        """How many."""


class Judge(ABC):
    """What is liked, e.g. by people. More text."""

    @abstractmethod
    def judge(self) -> float:
        """A number."""


@dataclass(frozen=True)
class Noise(Exploration):
    """Fresh noise, cf. Eq. (3), per branch. scale: of the noise."""

    scale: float = 1.0
    count: int = 4

    def branches(self) -> int:
        return self.count


@dataclass(frozen=True)
class Routing(Exploration):
    """Other histories per branch."""

    routes: tuple[int, ...]
    mode: Literal["hard", "soft"] = "hard"
    limit: float = float("inf")

    def branches(self) -> int:
        return len(self.routes)


class Encoder:
    """Something expensive that judges may share."""

    def __init__(self, width: int = 8) -> None:
        self.width = width


@dataclass
class Colour(Judge):
    """Likes red."""

    weight: float = 1.0
    encoder: Encoder | None = None
    offsets: Sequence[float] = (0.5, 1.0)
    names: Mapping[str, int] | None = None
    transform: Callable[..., Any] | None = None

    def judge(self) -> float:
        return self.weight


@dataclass(frozen=True)
class Strict(Judge):
    """Refuses what it is given."""

    limit: int = 0

    def __post_init__(self) -> None:
        if self.limit == 1:
            raise ValueError("Strict.limit must not be 1\nwas 1")
        if self.limit == 2:
            raise RuntimeError("broken")

    def judge(self) -> float:
        return 0.0


def make_noise(scale: float) -> Noise:
    """Noise by a function."""
    return Noise(scale)


def train(
    *,
    exploration: Exploration,
    judges: Sequence[Judge] = (),
    learning_rate: float = 1e-3,
    max_steps: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    output_dir: str | None = None,
    dry_run: bool = False,
    operative_config: str = "",
) -> dict[str, Any]:
    """Gives back what it was given."""
    if device == "broken":
        raise ValueError("device='broken' is no device\nat all")
    if device == "bug":
        raise RuntimeError("a bug")
    if device == "stop":
        raise KeyboardInterrupt
    given = dict(locals())
    print(f"trained with {exploration}")
    return given


def evaluate(*, exploration: Exploration, adapter: str | None = None, seed: int = 0) -> dict[str, Any]:
    """Another command."""
    return dict(locals())
