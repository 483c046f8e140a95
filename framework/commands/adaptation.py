"""What ``--adapter`` takes, for every command that has it: a run, its adapter, or exported LoRA weights."""

from pathlib import Path

from framework.adapters import EXPORTED, load_adaptation
from framework.interfaces import StreamingGenerator
from framework.reporting.progress import say


def adapter_folder(adapter: str) -> Path:
    """The folder that `load_adaptation` reads: of a run its adapter, of an exported file the one that it is in."""
    path = Path(adapter)
    if path.is_file() and path.name == EXPORTED:
        return path.parent
    return path / "adapter" if (path / "adapter").is_dir() else path


def put_on(generator: StreamingGenerator, adapter: str | None) -> None:
    """Put an adapter on a generator and say which; None leaves it as it is. Raises ValueError as `load_adaptation`."""
    if adapter is not None:
        say(f"adapter: {load_adaptation(generator.network, adapter_folder(adapter))}")
