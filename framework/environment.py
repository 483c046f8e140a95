"""What a machine needs before a run starts: one function per question, each with an answer and what to do about it."""

import importlib
import importlib.metadata
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import torch
from packaging.requirements import Requirement

from framework.config.registry import Registry, one_line
from framework.devices import META
from framework.distributed import ENVIRONMENT
from framework.interfaces import RewardModel
from framework.memory_estimate import MIB, MemoryEstimate, size

PACKAGE = "armillary"
LITTLE_DISK, NO_DISK = 2048 * MIB, 64 * MIB
"""Bytes free below which a run is warned, and below which it cannot even write its first checkpoint."""
LOADED = ("diffusers", "transformers", "peft", "gin", "av", "ftfy", "tensorboard")
"""Packages that a run loads beside torch; a broken partner of theirs, torchvision first, shows only at import."""


class Verdict(Enum):
    """How bad it is."""

    OK = "ok"
    WARNING = "warning"
    FATAL = "FATAL"


@dataclass(frozen=True)
class Finding:
    """One answer. advice: what to do, empty where nothing is to be done."""

    name: str
    verdict: Verdict
    found: str
    advice: str = ""

    def line(self) -> str:
        """One line for the console."""
        return f"{self.verdict.value:<7}  {self.name}: {self.found}{'; ' if self.advice else ''}{self.advice}"


def check_python(version: tuple[int, int] = sys.version_info[:2]) -> Finding:
    """Python 3.11 or later."""
    found = ".".join(map(str, version))
    if version < (3, 11):
        return Finding("python", Verdict.FATAL, found, "install Python 3.11 or later")
    return Finding("python", Verdict.OK, found)


def installed_version(name: str) -> str | None:
    """The version of an installed distribution, None where there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def needed(package: str = PACKAGE) -> list[Requirement]:
    """What a distribution requires without extras; nothing for a package that runs from its sources uninstalled."""
    try:
        lines = importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    read = [Requirement(line) for line in lines]
    return [r for r in read if r.marker is None or r.marker.evaluate({"extra": ""})]


def check_requirement(requirement: Requirement, installed: str | None) -> Finding:
    """One required package in a version that was tried. A missing one is fatal, another version a warning."""
    name, wanted = requirement.name, str(requirement.specifier) or "any version"
    if installed is None:
        return Finding(name, Verdict.FATAL, "not installed", f"pip install '{name}{requirement.specifier}'")
    if not requirement.specifier.contains(installed, prereleases=True):
        advice = f"armillary was tested with {wanted}: pip install '{name}{requirement.specifier}'"
        return Finding(name, Verdict.WARNING, installed, advice)
    return Finding(name, Verdict.OK, installed)


def check_torchvision(torch_version: str, torchvision: str | None, wants: str | None) -> Finding:
    """A torchvision of another torch: the usual reason why importing transformers or diffusers fails.

    wants: the torch that the installed torchvision names as its requirement, e.g. ``==2.13.0``. Its builds for a CPU
    and for CUDA do not mix either (the local part of the version, ``+cpu``).
    """
    if torchvision is None:
        return Finding("torchvision", Verdict.OK, "not installed, and not needed")
    repair = f"uninstall torchvision, or install the one of torch {torch_version} from the same index"
    if wants and not Requirement(f"torch{wants}").specifier.contains(torch_version, prereleases=True):
        return Finding("torchvision", Verdict.FATAL, f"{torchvision} is for torch {wants}, not {torch_version}", repair)
    builds = {version.partition("+")[2] for version in (torch_version, torchvision)} - {""}
    if len(builds) > 1:
        found = f"{torchvision} beside torch {torch_version}: builds of two kinds"
        return Finding("torchvision", Verdict.WARNING, found, repair)
    return Finding("torchvision", Verdict.OK, f"{torchvision}, of this torch")


def torch_of_torchvision() -> str | None:
    """The torch that the installed torchvision asks for, as a specifier."""
    return next((str(r.specifier) for r in needed("torchvision") if r.name == "torch"), None)


def check_import(name: str) -> Finding:
    """Whether a package can be loaded at all: a broken neighbour shows here and nowhere else."""
    try:
        importlib.import_module(name)
    except Exception as error:  # an import runs anything
        advice = "install it again; if torchvision is named, install the torchvision of this torch or none"
        return Finding(f"import {name}", Verdict.FATAL, f"{type(error).__name__}: {one_line(error)}", advice)
    return Finding(f"import {name}", Verdict.OK, "can be loaded")


def check_parts(registry: Registry) -> Finding:
    """Whether everything that the entry points offer can be loaded."""
    parts, broken = registry.offered()
    if not parts:
        return Finding("parts", Verdict.FATAL, "no entry points", "install armillary: pip install -e .")
    if broken:
        advice = "install armillary again after a change of its parts, or remove the broken package"
        return Finding("parts", Verdict.WARNING, f"{len(broken)} sources are broken: {broken[0]}", advice)
    return Finding("parts", Verdict.OK, f"{len(parts)} can be named in a configuration")


def check_device(device: str) -> Finding:
    """Whether tensors can be made there, and what it is."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        others = ["cpu"] + [f"cuda ({torch.cuda.device_count()})"] * torch.cuda.is_available()
        found = f"{device!r} cannot be used: {one_line(error)}"
        return Finding("device", Verdict.FATAL, found, f"give --device one of {', '.join(others)}")
    if device == META:
        return Finding("device", Verdict.OK, "meta: no machine in particular, sizes alone")
    if torch.device(device).type != "cuda":
        return Finding("device", Verdict.OK, f"{device}, {torch.get_num_threads()} threads")
    properties = torch.cuda.get_device_properties(device)
    found = f"{properties.name}, {size(properties.total_memory)}"
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        return Finding("device", Verdict.WARNING, f"{found}, no bfloat16", "leave precision.BFloat16 out")
    return Finding("device", Verdict.OK, f"{found}, bfloat16")


def check_idle_gpu(device: str, cuda_version: str | None, available: bool) -> Finding:
    """A torch that was built for CUDA and finds no GPU: a driver that is missing or too old."""
    if cuda_version is not None and not available:
        advice = "update the driver (nvidia-smi shows its CUDA version), or install the CPU build of torch"
        return Finding("gpu", Verdict.WARNING, f"torch is built for CUDA {cuda_version} and finds no GPU", advice)
    if available and not device.startswith("cuda"):
        return Finding("gpu", Verdict.OK, "there is one that this run does not use", "give --device cuda to use it")
    return Finding("gpu", Verdict.OK, "none" if cuda_version is None else f"CUDA {cuda_version}")


def existing_parent(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


def check_folder(folder: Path) -> Finding:
    """Whether a run could write there; nothing is created."""
    place = existing_parent(folder)
    if not place.is_dir():
        return Finding("output", Verdict.FATAL, f"{place} is a file", "give another --output_dir")
    if not os.access(place, os.W_OK | os.X_OK):
        return Finding("output", Verdict.FATAL, f"{place} cannot be written", "give another --output_dir")
    if folder.is_dir() and any(folder.iterdir()):
        advice = "only an unfinished run of the same configuration goes on there; a new one needs an empty --output_dir"
        return Finding("output", Verdict.WARNING, f"{folder} holds something", advice)
    return Finding("output", Verdict.OK, f"{folder} can be written")


def check_disk(folder: Path, free: int) -> Finding:
    """Room for checkpoints and videos."""
    found = f"{size(free)} free at {folder}"
    if free < NO_DISK:
        return Finding("disk", Verdict.FATAL, found, "free some space or give another --output_dir")
    if free < LITTLE_DISK:
        return Finding("disk", Verdict.WARNING, found, "checkpoints and videos may not fit; see train.keep_checkpoints")
    return Finding("disk", Verdict.OK, found)


def check_launch(environment: Mapping[str, str]) -> Finding:
    """Variables of torchrun that are set in part: a rank would wait for others that never come."""
    there = [name for name in ENVIRONMENT if name in environment]
    missing = [name for name in ENVIRONMENT if name not in environment]
    if there and missing:
        found = f"{', '.join(there)} set without {', '.join(missing)}"
        return Finding("launch", Verdict.WARNING, found, "start with torchrun, or unset them")
    ranks = environment["WORLD_SIZE"] if there else "1"
    return Finding("launch", Verdict.OK, f"{ranks} process(es)")


def check_reward(reward: RewardModel) -> Finding:
    """Whether the reward can score now."""
    reason = reward.unavailable()
    name = type(reward).__name__
    if reason is not None:
        return Finding("reward", Verdict.FATAL, f"{name} cannot score: {reason}", "start its service, or change REWARD")
    return Finding("reward", Verdict.OK, f"{name} gives {', '.join(reward.signals)}")


def available_memory(device: str) -> int | None:
    """Bytes that could be taken now: of a GPU its free memory, else the machine's; None where nobody says."""
    if device == META or check_device(device).verdict is Verdict.FATAL:
        return None
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    status = Path("/proc/meminfo")
    lines = status.read_text().splitlines() if status.is_file() else []
    kib = next((int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
    return None if kib is None else 1024 * kib


def check_memory(estimate: MemoryEstimate | None, available: int | None) -> Finding:
    """The estimated peak of a training run against what is there."""
    if estimate is None:
        return Finding("memory", Verdict.WARNING, "this generator does not tell its sizes", "watch the first step")
    found, advice = estimate.summary(), ""
    if available is None:
        return Finding("memory", Verdict.OK, found)
    if estimate.peak > available:
        advice = (
            "lower train.micro_batch_size" if estimate.worst == "update" else
            "lower train.prompts_per_step or the group size" if estimate.worst == "rollout" else
            "train fewer parameters: adapters.LoRA in place of all weights, or a smaller rank"
        )  # fmt: skip
    verdict = Verdict.FATAL if advice else Verdict.OK
    return Finding("memory", verdict, f"{found}, of {size(available)} available", advice)


def machine_findings(device: str, folder: Path) -> Iterator[Finding]:
    """Everything that can be asked without a configuration."""
    yield check_python()
    for requirement in needed():
        yield check_requirement(requirement, installed_version(requirement.name))
    yield check_torchvision(torch.__version__, installed_version("torchvision"), torch_of_torchvision())
    for name in LOADED:
        yield check_import(name)
    yield check_parts(Registry())
    yield check_device(device)
    yield check_idle_gpu(device, torch.version.cuda, torch.cuda.is_available())
    yield check_folder(folder)
    place = existing_parent(folder)
    yield check_disk(place, shutil.disk_usage(place).free)
    yield check_launch(os.environ)
