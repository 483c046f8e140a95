"""Where a released file is: in a local folder, else on the Hugging Face hub; its licence is said before a download."""

from pathlib import Path, PurePosixPath

from framework.reporting.progress import say


def find_file(repository: str, file: str, folder: str | None = None, licence: str = "see its model card") -> Path:
    """The path of a file of a hub repository.

    folder: looked at first, and needs no network; the file lies there as in the repository or below the repository's
    name, a .pt file also without the repository's folders. licence: said before a download. Raises ValueError in one
    line where the file can be had nowhere.
    """
    here = find_here(repository, file, folder)
    return _fetched(repository, file, folder, licence) if here is None else here


def find_here(repository: str, file: str, folder: str | None = None) -> Path | None:
    """The path of a file that can be had without a network: in the folder, or fetched before; else None."""
    relative = PurePosixPath(file)
    if relative.is_absolute() or ".." in relative.parts or not relative.name:
        raise ValueError(f"file={file!r} is no path inside the repository {repository}")
    if folder is not None:
        for place in _places(Path(folder), repository, relative):
            if place.is_file():
                return place
    import huggingface_hub  # its import takes a while and most commands fetch nothing

    cached = huggingface_hub.try_to_load_from_cache(repository, file)
    return Path(cached) if isinstance(cached, str) else None


def _places(folder: Path, repository: str, file: PurePosixPath) -> tuple[Path, ...]:
    """Where a file of a repository may lie in a folder, most specific first."""
    name = PurePosixPath(repository).name
    whole = (folder / repository / file, folder / name / file, folder / file)
    # other names, e.g. config.json, are not unique: several parts of a model have one
    return (*whole, folder / name / file.name, folder / file.name) if file.suffix == ".pt" else whole


def _fetched(repository: str, file: str, folder: str | None, licence: str) -> Path:
    """From the hub."""
    import huggingface_hub

    try:
        say(f"fetching {file} of https://huggingface.co/{repository}, licence: {licence}")
        return Path(huggingface_hub.hf_hub_download(repository, file))
    except Exception as error:  # offline, gated, renamed: the hub's client raises many kinds
        looked = "no folder was given" if folder is None else f"it is not in folder={folder!r}"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{file} of {repository} cannot be had: {looked}, and the hub gives no file ({type(error).__name__}: "
            f"{reason[:120]}); download it and give its folder as the parameter folder"
        ) from error
