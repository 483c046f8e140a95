"""Packages that armillary does without: imported where a part needs them, with one line that says what to install."""

import importlib
import importlib.metadata
import importlib.util
from types import ModuleType

import torch


def import_extra(module: str, extra: str, user: str) -> ModuleType:
    """The module of an optional package. user: the part that asks, for the message.

    Raises ValueError where the package is missing or does not import.
    """
    package = module.split(".")[0]
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{user} needs {package}, which is not installed: pip install 'armillary[{extra}]'")
    try:
        return importlib.import_module(module)
    except Exception as error:  # a build for another torch fails with whatever its libraries raise
        raise ValueError(f"{user} needs {broken(package, error)}") from error


def refuse_broken_torchvision(user: str) -> None:
    """Raises ValueError where torchvision is installed but does not import.

    transformers takes it for granted once it finds it, and then fails with a message about something else. Nothing here
    needs torchvision beside the flow rewards, so that it may well be missing.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        raise ValueError(
            f"{user} loads a transformers model, which would import {broken('torchvision', error)}, or remove it"
        ) from error


def broken(package: str, error: Exception) -> str:
    """What to say about a package that is there and does not import."""
    version = next((d for d in [_version(package)] if d), "of unknown version")
    reason = next(iter(str(error).splitlines()), "")
    return (
        f"{package} {version}, which is installed but does not import ({type(error).__name__}: {reason}): it was "
        f"probably built for another torch than {torch.__version__}; install the build that belongs to it from the "
        f"index that torch came from"
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
