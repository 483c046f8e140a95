"""How much memory a process took at its highest, as the operating system counts it."""

import json
import sys
from pathlib import Path

import torch

MIB = 2**20


def peak_rss_mib() -> float | None:
    """Peak resident-set size of this process, in MiB; None where the system does not say.

    Linux: VmHWM of /proc/self/status, since what getrusage reports there also counts the process that started this
    one. Elsewhere getrusage (bytes on macOS).
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    kib = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
    if kib is not None:
        return kib / 1024
    if sys.platform == "win32":
        return None
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (MIB if sys.platform == "darwin" else 1024)


def write_memory(folder: Path) -> None:
    """Write memory.json: peak resident set, and the peak of the GPU's allocator where one was used."""
    peak = peak_rss_mib()
    numbers = {} if peak is None else {"peak_rss_mib": round(peak, 1)}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        numbers["peak_device_mib"] = round(torch.cuda.max_memory_allocated() / MIB, 1)
    (folder / "memory.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


def read_memory(folder: Path) -> dict[str, float]:
    """The numbers of memory.json; none where a run left no such file."""
    file = folder / "memory.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
