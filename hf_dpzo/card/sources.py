"""The sources of published files: a folder, or one commit of a repository on the Hub. Neither is trusted."""

import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_dpzo.io.foreign import one_sentence
from hf_dpzo.io.strict_json import parse_json
from hf_dpzo.models.hub import HUB_ERRORS, find_status
from hf_dpzo.models.location import is_local_place
from hf_dpzo.trajectory.base_files import read_sizes
from hf_dpzo.trajectory.log import LOG_FILE


# The largest card, configuration or statement, in bytes.
MAX_TEXT_BYTES = 1 << 20


# A run's folder holds a few files for each of its checkpoints.
MAX_NESTED_FILES = 100_000


_REMEDY = "name the output_dir of a run, or user/model on the Hub"


class SourceError(ValueError):
    """A file that does not exist, or that is larger than it may be."""


class Source(ABC):
    """A set of files. None of them is opened before its size is known.

    Args:
        sizes: the sizes of the files, in bytes, by their names.
        nested: the sizes of the files in subfolders, by their names.
        linked: the names of subfolders that are links to elsewhere. What they hold is not listed.
    """

    sizes: Mapping[str, int]
    nested: Mapping[str, int]
    linked: frozenset[str]

    def fetch(self, limits: Mapping[str, int]) -> Path:
        """Fetch files, and return the folder that holds them.

        Args:
            limits: the largest size of each file, in bytes, by its name.

        Raises:
            SourceError: a file does not exist, or is larger.
        """
        sizes = {**self.nested, **self.sizes}
        for name, limit in limits.items():
            if name not in sizes:
                raise SourceError(f"{name}: there is no such file; name a folder or a repository that holds one.")
            _check_size(name, sizes[name], limit)
        folder = self._fetch_folder(list(limits))
        for name, limit in limits.items():
            _check_size(name, (folder / name).stat().st_size, limit)
        return folder

    @abstractmethod
    def _fetch_folder(self, names: Sequence[str]) -> Path:
        """Return a folder that holds the files of these `names`, whose sizes have been checked."""

    def read_text(self, name: str) -> str:
        """Return the text of a file of at most `MAX_TEXT_BYTES`.

        Raises:
            SourceError: the file does not exist, is larger, or is no text.
        """
        with open(self.fetch({name: MAX_TEXT_BYTES}) / name, "rb") as file:
            data = file.read(MAX_TEXT_BYTES)
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise SourceError(f"{name}: it is no text; take it anew.") from None

    def read_json(self, name: str) -> Any:
        """Return the parsed JSON of a file of at most `MAX_TEXT_BYTES`.

        Raises:
            SourceError: the file does not exist, is larger, or is no JSON.
        """
        text = self.read_text(name)
        with one_sentence(f"{name}: it is not valid JSON", SourceError, remedy="take it anew"):
            return parse_json(text)


class LocalFolder(Source):
    """A folder on this machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
        found = list(itertools.islice(_walk_subfolders(folder), MAX_NESTED_FILES + 1))
        if len(found) > MAX_NESTED_FILES:
            raise SourceError(
                f"{folder}: its subfolders hold more than {MAX_NESTED_FILES} files; name a folder of the model alone."
            )
        self.nested = {name: _read_size(folder / name) for name, is_link in found if not is_link}
        self.linked = frozenset(name for name, is_link in found if is_link)

    def _fetch_folder(self, names: Sequence[str]) -> Path:
        return self._folder


class HubCommit(Source):
    """The newest commit of a branch on the Hub. All files come from this one commit, so they belong together."""

    def __init__(self, repository: str, revision: str | None = None) -> None:
        try:
            validate_repo_id(repository)
            info = HfApi().model_info(repository, revision=revision, files_metadata=True)
        except HFValidationError:
            fault = "it is neither a folder nor user/model on the Hub; name one"
        except (*HUB_ERRORS, OSError) as error:
            reason = _explain(error)
            fault = f"it is no folder here, and not to be had from the Hub ({reason}); {_REMEDY}"
        else:
            fault = None
        if fault is not None:  # What the Hub's client says of itself takes many lines, and explains nothing more.
            raise SourceError(f"model={repository}: {fault}.")
        self._repository, self._commit = repository, info.sha
        sizes = read_sizes(info)
        self.sizes = {name: size for name, size in sizes.items() if "/" not in name}
        self.nested = {name: size for name, size in sizes.items() if "/" in name}
        self.linked = frozenset()

    def _fetch_folder(self, names: Sequence[str]) -> Path:
        try:
            paths = [Path(hf_hub_download(self._repository, name, revision=self._commit)) for name in names]
        except (*HUB_ERRORS, OSError) as error:
            fault = f"{names[0]} cannot be had from the Hub ({_explain(error)}); try again, or name a folder"
        else:
            fault = None
        if fault is not None:
            raise SourceError(f"model={self._repository}: {fault}.")
        return paths[0].parents[names[0].count("/")]


def open_source(name: str | Path, revision: str | None = None) -> Source:
    """Open the folder `name`, or the repository of that name on the Hub.

    Args:
        name: a folder, or a repository on the Hub.
        revision: a branch, tag or commit of the repository.

    Raises:
        SourceError: there is neither.
    """
    _refuse_mistyped(str(name))
    return LocalFolder(Path(name)) if Path(name).is_dir() else HubCommit(str(name), revision)


def _refuse_mistyped(name: str) -> None:
    """Raise `SourceError` for what can only be a place of this machine, and is no folder: the Hub is not asked."""
    path = Path(name).expanduser()
    if path.is_dir():
        return
    if path.exists():
        raise SourceError(f"model={name}: it is a file; {_REMEDY}.")
    runs = [one.name for one in _list_runs(path.parent)] if len(path.parts) > 1 else []
    if runs or is_local_place(name):
        raise SourceError(
            f"model={name}: it is neither a folder nor user/model on the Hub; name the output_dir of a run "
            f"({path.parent.absolute()} holds {', '.join(sorted(runs)[:8]) or 'none'})."
        )


def _list_runs(folder: Path) -> list[Path]:
    return [one for one in folder.iterdir() if (one / LOG_FILE).is_file()] if folder.is_dir() else []


def _explain(error: Exception) -> str:
    """Return why the Hub gave nothing, in a few words."""
    status = find_status(error)
    reason = f"{type(error).__name__}" if status is None else f"{type(error).__name__}, status {status}"
    return f"{reason}: check the name and the network" if status is None else reason


def _walk_subfolders(folder: Path) -> Iterator[tuple[str, bool]]:
    """Yield the names of the files in the subfolders of `folder`, and whether each is a subfolder that is a link.

    A link to a place in `folder` is left out, because what it leads to is found there.
    """
    root = folder.resolve()
    for place, folders, files in os.walk(folder):
        here = Path(place).relative_to(folder)
        yield from (((here / name).as_posix(), False) for name in files if here.parts)
        links = (name for name in folders if Path(place, name).is_symlink())
        yield from (
            ((here / name).as_posix(), True) for name in links if not Path(place, name).resolve().is_relative_to(root)
        )


def _read_size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _check_size(name: str, size: int, limit: int) -> None:
    if size > limit:
        raise SourceError(f"{name}: it has {size} bytes, and may have {limit}; it is not opened.")
