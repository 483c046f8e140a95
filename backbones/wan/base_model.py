"""Where the frozen companions of a transformer are: the text encoder, tokenizer and autoencoder of the base model."""

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from backbones.wan.hub import find_here
from backbones.wan.recipes import WanRecipe
from backbones.wan.text import ENCODER
from backbones.wan.vae import VAE
from framework.reporting.progress import say

LICENCE = "Apache-2.0"
"""Of Wan 2.1, whose text encoder and autoencoder all recipes use."""


def base_folder(repository: str, parts: Sequence[str], folder: str | None, parameter: str) -> Path:
    """A folder in diffusers' layout that holds the subfolders ``parts`` of a hub repository.

    folder: looked at first, and needs no network: the repository's content, or a folder that holds it under its name.
    parameter: what a message tells to set. Raises ValueError in one line where they can be had nowhere.
    """
    if folder is not None:
        name = PurePosixPath(repository).name
        for place in (Path(folder), Path(folder) / name, Path(folder) / repository):
            if all((place / part).is_dir() for part in parts):
                return place
    wanted = " and ".join(parts)
    import huggingface_hub  # its import takes a while and most commands fetch nothing

    try:
        if find_here(repository, f"{parts[0]}/config.json") is None:
            say(f"fetching {wanted} of https://huggingface.co/{repository}, licence: {LICENCE}")
        place = Path(huggingface_hub.snapshot_download(repository, allow_patterns=[f"{part}/*" for part in parts]))
        missing = [part for part in parts if not (place / part).is_dir()]
        if missing:
            raise FileNotFoundError(f"{place} has no {missing[0]}")
        return place
    except Exception as error:  # offline, gated, renamed: the hub's client raises many kinds
        looked = "no folder was given" if folder is None else f"they are not in {folder!r}"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{wanted} of {repository} cannot be had: {looked}, and the hub gives none ({type(error).__name__}: "
            f"{reason[:120]}); download them and set wan.generator.{parameter} to their folder"
        ) from error


def whereabouts(repository: str, file: str, folder: str | None, licence: str) -> str:
    """Where a file is, or from where it would be fetched; nothing is. A folder is known by its config.json."""
    sample = file if PurePosixPath(file).suffix else f"{file}/config.json"
    here = find_here(repository, sample, folder)
    if here is not None:
        return str(here if sample == file else here.parent)
    return f"to be fetched from https://huggingface.co/{repository}: {file}, licence: {licence}"


def needed_files(
    recipe: WanRecipe, folder: str | None, text_folder: str | None, vae_folder: str | None
) -> Iterator[str]:
    """What a recipe would read, one line each: where it lies, or from where it would be fetched under which licence."""
    yield f"{recipe.name}: weights: {whereabouts(recipe.repository, recipe.file, folder, recipe.licence)}"
    for lora in recipe.lora:
        yield f"{recipe.name}: LoRA: {whereabouts(lora.repository, lora.file, folder, recipe.licence)}"
    yield f"{recipe.name}: text encoder and tokenizer: {whereabouts(recipe.base, ENCODER, text_folder, LICENCE)}"
    yield f"{recipe.name}: video decoder: {whereabouts(recipe.base, VAE, vae_folder, LICENCE)}"
