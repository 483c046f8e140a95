"""Where else the scalars of a run are shown; metrics.jsonl is written always, and before any of them."""

import hashlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class Mirror(ABC):
    """Something that shows the scalars of a run while it goes on."""

    @abstractmethod
    def open(self, folder: Path, config: str) -> None:
        """Start, or go on, with the run of this folder; config: its operative configuration."""

    @abstractmethod
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """The values of one line of metrics.jsonl."""

    @abstractmethod
    def close(self) -> None:
        """No more values come."""


@dataclass
class WandB(Mirror):
    """Weights & Biases, an extra: ``pip install 'armillary[wandb]'``.

    project: where the run is listed. mode: "offline" keeps everything in the run's folder until ``wandb sync`` sends
    it, and needs no account; "online" sends at once.
    """

    project: str = "armillary"
    mode: str = "offline"

    def __post_init__(self) -> None:
        if self.mode not in ("offline", "online"):
            raise ValueError(f"WandB.mode must be 'offline' or 'online', got {self.mode!r}")
        if importlib.util.find_spec("wandb") is None:
            raise ValueError("WandB needs its package: pip install 'armillary[wandb]', or leave WandB out")
        self._run: Any = None

    def open(self, folder: Path, config: str) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        # the same folder is the same run, so a resumed one goes on in its place
        identity = hashlib.blake2b(str(folder.resolve()).encode(), digest_size=8).hexdigest()
        self._run = wandb.init(
            project=self.project, name=folder.name, id=identity, dir=str(folder), mode=self.mode, resume="allow",
            config={"gin": config},
        )  # fmt: skip

    def log(self, step: int, values: Mapping[str, float]) -> None:
        assert self._run is not None, "a mirror is opened before the first line"
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
