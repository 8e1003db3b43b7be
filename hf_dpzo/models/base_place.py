"""Refuses the place of a base model where it holds no model, in one sentence that says what it holds."""

from collections.abc import Collection
from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache

from hf_dpzo.models.hub import HUB_ERRORS, explain_hub_error
from hf_dpzo.models.location import is_local_place, resolve_path


CONFIG_FILE, GGUF_SUFFIX = "config.json", ".gguf"


# How many names of files a message lists.
_MOST_NAMES = 8


def refuse_base_place(name: str, *, revision: str | None = None, gguf_file: str | None = None) -> None:
    """Raise `ValueError` unless `name` is a folder, a place in a package or a repository that holds a model.

    Args:
        name: a folder, package://name, or a repository on the Hub, which is asked unless its files are here already.
        revision: a branch, tag or commit of the repository.
        gguf_file: the GGUF file in it that is to be loaded; `None` for a model of transformers.

    Raises:
        ValueError: there is no such place, or no such model in it; the message names the field of a recipe.
    """
    told, path = f"model_name_or_path={name}", Path(resolve_path(name)).expanduser()
    if path.is_dir():
        _refuse_files(told, "the folder", [file.name for file in path.iterdir()], gguf_file)
        if gguf_file is not None and not (path / gguf_file).is_file():
            raise ValueError(f"gguf_file={gguf_file}: it is no file in {name}; name a file of that folder.")
        return
    if path.is_file():
        remedy = f"the folder {path.parent}"
        remedy += f", and gguf_file={path.name}" if path.suffix == GGUF_SUFFIX else ""
        raise ValueError(f"{told}: it is a file; name {remedy}.")
    if is_local_place(name):
        raise ValueError(
            f"{told}: there is no such folder ({path.absolute()}); name one, package://name, or user/model on the Hub."
        )
    if isinstance(try_to_load_from_cache(name, gguf_file or CONFIG_FILE, revision=revision), str):
        return
    try:
        info = HfApi().model_info(name, revision=revision)
    except HUB_ERRORS as error:
        fault = explain_hub_error(error, writes=False)
    else:
        fault = None
    if fault is not None:
        raise ValueError(
            f"{told}: it is no folder here ({path.absolute()}), and {fault}, or name a folder or package://name."
        )
    _refuse_files(told, "the repository", [file.rfilename for file in info.siblings or ()], gguf_file)


def _refuse_files(told: str, what: str, files: Collection[str], gguf_file: str | None) -> None:
    """Raise `ValueError` if a model is not among the `files` of a place."""
    packed = sorted(file for file in files if file.endswith(GGUF_SUFFIX))
    listed = ", ".join(packed[:_MOST_NAMES])
    if gguf_file is not None:
        if gguf_file not in files and "/" not in gguf_file:
            remedy = f"only {listed}; name one of these" if packed else "nor any other; leave gguf_file out"
            raise ValueError(f"gguf_file={gguf_file}: {what} of {told} holds no such file, {remedy}.")
    elif CONFIG_FILE not in files and packed:
        raise ValueError(f"gguf_file: missing; {what} of {told} holds GGUF files, {listed}; set it to one of these.")
    elif CONFIG_FILE not in files:
        there = ", ".join(sorted(files)[:_MOST_NAMES]) or "nothing"
        raise ValueError(f"{told}: {what} holds no {CONFIG_FILE}, only {there}; name a model that was saved there.")
