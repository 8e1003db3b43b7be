"""Files that are written whole or not at all, that are on disk when the call returns, and that no link leads astray.

A folder may hold links that a stranger made. What is written goes to a new file with a fresh name, and then takes the
place of whatever has the wanted name: a link is replaced, and what it leads to is not touched.
"""

import os
import re
import secrets
import stat
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


# The names by which a save replaces a file or goes into a folder.
_SAVED = re.compile(r"runs|checkpoint-\d+|.*\.(bin|jinja|json|lock|md|model|png|pt|pth|safetensors|txt|zo)")


_SCRATCH = re.compile(r"\..+\.[0-9a-f]{32}\.new")


class LinkError(ValueError):
    """A link, or what is no plain file, where a file is to be read or written."""


# Whoever may read and write a new file, before the umask takes its part.
_ANYBODY, _OWNER = 0o666, 0o600


def write_atomically(path: Path, data: bytes, *, secretly: bool = False) -> None:
    """Write a file, whole or not at all, and wait until it is on disk.

    Args:
        path: the path of the file.
        data: its content.
        secretly: whether this user alone may read it.
    """
    replace_all({path: data}, mode=_OWNER if secretly else _ANYBODY)


def replace_all(files: Mapping[Path, bytes], *, durably: bool = True, mode: int = _ANYBODY) -> None:
    """Write several files, each whole or not at all.

    Guarantee: nothing is written through a link, or over a file that has another name than those of `files`.

    Args:
        files: the content of each file, by its path.
        durably: whether to wait until the files are on disk. Pass `False` only where the caller syncs them later.
        mode: who may read and write the files, of which the umask takes its part.
    """
    scratch_paths = {path: path.with_name(f".{path.name}.{secrets.token_hex(16)}.new") for path in files}
    try:
        for path, data in files.items():
            _write_new(scratch_paths[path], data, mode)
        if durably:
            sync_all(scratch_paths.values())
        for path, scratch_path in scratch_paths.items():
            scratch_path.replace(path)
    except BaseException:
        for scratch_path in scratch_paths.values():
            scratch_path.unlink(missing_ok=True)
        raise
    if durably:
        sync_all({path.parent for path in files})


def is_scratch_file(name: str) -> bool:
    """Return whether `name` is that of a file which a killed process could not finish. Nothing reads it.

    >>> is_scratch_file(f".README.md.{32 * '0'}.new"), is_scratch_file("README.md.new")
    (True, False)
    """
    return _SCRATCH.fullmatch(name) is not None


def _write_new(path: Path, data: bytes, mode: int) -> None:
    """Write a file that does not exist yet."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags, mode), "wb") as file:
        file.write(data)


def open_plain(path: Path, *, writable: bool = False) -> int:
    """Open a file that is no link, and return its handle.

    Args:
        path: the path of an existing file.
        writable: whether to open it for writing too.

    Raises:
        LinkError: there is a link, or what is no plain file.
        OSError: there is no such file, or it cannot be opened.
    """
    refuse_links(path)
    flags = (os.O_RDWR if writable else os.O_RDONLY) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    handle = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # A pipe would keep its reader waiting.
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise LinkError(f"{path}: it is no plain file; remove it.")
    return handle


def read_plain(path: Path) -> bytes:
    """Return the content of a file that is no link; raise `LinkError` for one."""
    with open(open_plain(path), "rb") as file:
        return file.read()


def refuse_links(*paths: Path) -> None:
    """Raise `LinkError` if one of `paths` is a link, whether or not it leads anywhere."""
    for path in paths:
        if path.is_symlink():
            raise LinkError(
                f"{path}: it is a link, and nothing is read or written through one; put the file itself there, or "
                "remove it."
            )


def refuse_links_in(folder: Path) -> None:
    """Raise `LinkError` if a file that a save into `folder` may write is a link.

    Other libraries save weights and configurations, and they write through links.
    """
    if folder.is_dir():
        refuse_links(*(path for path in sorted(folder.iterdir()) if _SAVED.fullmatch(path.name)))


def sync_all(paths: Iterable[Path]) -> None:
    """Wait until the content of files, or the entries of folders, at `paths` are on disk."""
    paths = list(paths)
    if len(paths) == 1:
        _sync(paths[0])
    elif paths:
        # A disk commits together what is waited for at the same time, so ten small files take hardly longer than one.
        with ThreadPoolExecutor(max_workers=16) as threads:
            list(threads.map(_sync, paths))


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder.
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows flushes only writable files.
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
