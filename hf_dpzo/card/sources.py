"""Where published files come from: a folder, or one commit of a repository on the Hub. Neither is trusted."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import httpx, validate_repo_id

from hf_dpzo.io.strict_json import parse_json


# For a card, a configuration or a statement, in bytes.
MAX_TEXT_BYTES = 1 << 20


_UNKNOWN_SIZE = 1 << 62


class SourceError(ValueError):
    """Files that are not there, or that are larger than they may be."""


class Source(ABC):
    """Files with names, none of which is opened before its size is known.

    Args:
        sizes: of the files, in bytes, by their names.
    """

    sizes: Mapping[str, int]

    def fetch(self, limits: Mapping[str, int]) -> Path:
        """Return a folder that holds these files.

        Args:
            limits: how many bytes each of them may have.

        Raises:
            SourceError: one is not there, or larger.
        """
        for name, limit in limits.items():
            if name not in self.sizes:
                raise SourceError(f"{name}: there is no such file; name a folder or a repository that holds one.")
            _check_size(name, self.sizes[name], limit)
        folder = self._fetch_folder(list(limits))
        for name, limit in limits.items():
            _check_size(name, (folder / name).stat().st_size, limit)
        return folder

    @abstractmethod
    def _fetch_folder(self, names: Sequence[str]) -> Path:
        """A folder that holds these files, whose sizes are no more than they may be."""

    def read_text(self, name: str) -> str:
        """Return what a file says that is no larger than `MAX_TEXT_BYTES`."""
        with open(self.fetch({name: MAX_TEXT_BYTES}) / name, "rb") as file:
            data = file.read(MAX_TEXT_BYTES)
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise SourceError(f"{name}: it is no text; take it anew.") from None

    def read_json(self, name: str) -> Any:
        """Return what a file holds, as JSON."""
        try:
            return parse_json(self.read_text(name))
        except SourceError:
            raise
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{name}: it is not valid JSON ({error!s:.100}); take it anew.") from None


class LocalFolder(Source):
    """A folder on this machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}

    def _fetch_folder(self, names: Sequence[str]) -> Path:
        return self._folder


class HubCommit(Source):
    """The newest commit of a branch on the Hub, and no other: what is downloaded belongs together."""

    def __init__(self, repository: str, revision: str | None = None) -> None:
        try:
            validate_repo_id(repository)
            info = HfApi().model_info(repository, revision=revision, files_metadata=True)
        except HFValidationError:
            raise SourceError(f"{repository}: it is neither a folder nor user/model on the Hub; name one.") from None
        except (HfHubHTTPError, OSError, httpx.HTTPError) as error:
            reason = str(error).splitlines()[0]
            raise SourceError(f"{repository}: it is no folder, and not to be had from the Hub ({reason}).") from error
        self._repository, self._commit = repository, info.sha
        self.sizes = {file.rfilename: _UNKNOWN_SIZE if file.size is None else file.size for file in info.siblings}

    def _fetch_folder(self, names: Sequence[str]) -> Path:
        try:
            paths = [Path(hf_hub_download(self._repository, name, revision=self._commit)) for name in names]
        except (OSError, httpx.HTTPError) as error:
            reason = str(error).splitlines()[0]
            raise SourceError(f"{self._repository}: {names[0]} can not be had from the Hub ({reason}).") from error
        return paths[0].parent


def open_source(name: str | Path, revision: str | None = None) -> Source:
    """Return the folder `name`, or the repository of that name on the Hub.

    Raises:
        SourceError: there is neither.
    """
    return LocalFolder(Path(name)) if Path(name).is_dir() else HubCommit(str(name), revision)


def _check_size(name: str, size: int, limit: int) -> None:
    if size > limit:
        raise SourceError(f"{name}: it has {size} bytes, and may have {limit}; it is not opened.")
