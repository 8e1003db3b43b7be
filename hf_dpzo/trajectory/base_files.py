"""The files of a base model: how large they are, and what of them would have to be downloaded."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from huggingface_hub import HfApi, ModelInfo, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import httpx

from hf_dpzo.models.location import PACKAGE_PREFIX
from hf_dpzo.trajectory.base_config import CONFIG_FILE, MAX_CONFIG_BYTES
from hf_dpzo.trajectory.header import TrajectoryError


logger = logging.getLogger(__name__)


# The most bytes of a base model that are downloaded because a log names it, unless more is allowed.
MAX_DOWNLOAD = 2 << 30


# The size of a file that the Hub does not tell: more than any limit.
UNKNOWN_SIZE = 1 << 62


class DownloadError(TrajectoryError):
    """A base model that is too large to be downloaded without being asked for."""


@dataclass(frozen=True, kw_only=True)
class BaseFiles:
    """The files of a base model that a loader takes weights from.

    Args:
        sizes: their sizes in bytes, by their names.
        missing: the names of those that would have to be downloaded.
        config_size: the size of the configuration in bytes; `None` if there is none.
    """

    sizes: Mapping[str, int]
    missing: frozenset[str]
    config_size: int | None

    @classmethod
    def find(cls, location: str, source: Mapping[str, Any]) -> Self:
        """Find the files of the model at `location`, a folder or a name on the Hub.

        Args:
            location: a folder, or a name on the Hub.
            source: the `revision`, and the `gguf_file`, where the model is one.

        Raises:
            OSError: there is neither, or it holds no weights that a replay loads.
        """
        folder = Path(location)
        remote = {} if folder.is_dir() else _list_remote(location, source["revision"])
        if not folder.is_dir() and not remote:  # There is no network, and what was downloaded before must do.
            cached = _find_cached(location, source.get("gguf_file", CONFIG_FILE), source["revision"])
            folder = folder if cached is None else cached.parent
        local = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()} if not remote else {}
        sizes = _select_weights(local or remote, source.get("gguf_file"))
        if not sizes:
            packed = sorted(name for name in local or remote if name.endswith(".gguf"))
            advice = f"; add the name of one of its GGUF files, /{packed[0]}" if packed else " or GGUF"
            raise OSError(f"there are no weights in safetensors{advice}")
        missing = (name for name in sizes if remote and _find_cached(location, name, source["revision"]) is None)
        return cls(sizes=sizes, missing=frozenset(missing), config_size=(local or remote).get(CONFIG_FILE))

    @property
    def file_bytes(self) -> int:
        """The bytes of all files."""
        return sum(self.sizes.values())

    @property
    def missing_bytes(self) -> int:
        """The bytes that would have to be downloaded."""
        return sum(self.sizes[name] for name in self.missing)

    def check_config_size(self) -> None:
        """Raise `TrajectoryError` unless there is a configuration, and it is small."""
        if self.config_size is None or self.config_size > MAX_CONFIG_BYTES:
            held = "there is none" if self.config_size is None else f"it has {self.config_size} bytes"
            raise TrajectoryError(f"{CONFIG_FILE}: {held}; name another place.")


def announce_download(
    name: str, revision: str | None, *, limit: int = MAX_DOWNLOAD, announce: Callable[[str], None] = logger.warning
) -> None:
    """Say how much of the base model `name` has to be downloaded, and refuse more than `limit` bytes.

    Args:
        name: a name on the Hub that a log holds, or a package's file, which is never downloaded.
        revision: its commit.
        limit: the most bytes to download.
        announce: called with one sentence, if there is anything to download.

    Raises:
        DownloadError: there is more to download.
        OSError: there is no such model.
    """
    if name.startswith(PACKAGE_PREFIX):
        return
    source = {"revision": revision or "main"}
    if name.endswith(".gguf"):
        name, _, source["gguf_file"] = name.rpartition("/")
    files = BaseFiles.find(name, source)
    size = files.missing_bytes
    if size > limit:
        told = "of a size that the Hub does not tell" if size >= UNKNOWN_SIZE else f"of {format_bytes(size)}"
        raise DownloadError(
            f"base={name}: the log asks for a download {told}, and {format_bytes(limit)} are allowed; allow more with "
            "--max-download (in Python max_download), or name a copy as base."
        )
    if size:
        announce(f"base={name}: {format_bytes(size)} are downloaded from the Hub, because the log names it.")


def format_bytes(size: int) -> str:
    """Format a number of bytes.

    >>> format_bytes(10), format_bytes(3 << 20), format_bytes(2 << 30)
    ('10 bytes', '3.0 MiB', '2.0 GiB')
    """
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} bytes"


def read_sizes(info: ModelInfo) -> dict[str, int]:
    """Return the sizes in bytes of the files that the Hub lists, by their names."""
    return {file.rfilename: UNKNOWN_SIZE if file.size is None else file.size for file in info.siblings}


def _list_remote(location: str, revision: str) -> dict[str, int]:
    """Return the sizes of the files in a repository; nothing if the Hub does not answer."""
    try:
        info = HfApi().model_info(location, revision=revision, files_metadata=True)
    except (HfHubHTTPError, HFValidationError, OSError, httpx.HTTPError):
        return {}
    return read_sizes(info)


def _find_cached(location: str, name: str, revision: str) -> Path | None:
    try:
        path = try_to_load_from_cache(location, name, revision=revision)
    except HFValidationError:
        return None
    return Path(path) if isinstance(path, str) else None


def _select_weights(sizes: Mapping[str, int], gguf_file: str | None) -> dict[str, int]:
    """Return the files that a loader of safetensors takes: one file, or else all that an index may name."""
    single = gguf_file or "model.safetensors"
    if gguf_file is not None or single in sizes:
        return {name: sizes[name] for name in (single,) if name in sizes}
    return {name: size for name, size in sizes.items() if name.endswith(".safetensors") and "/" not in name}
