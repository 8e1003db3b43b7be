"""Files that are written whole or not at all, and that are on disk when the call returns."""

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all, and wait until it is on disk."""
    replace_all({path: data})


def replace_all(files: Mapping[Path, bytes], *, durably: bool = True) -> None:
    """Write several files, each whole or not at all.

    Args:
        files: the content of each file, by its path.
        durably: whether to wait until the files are on disk. Pass `False` only where the caller syncs them later.
    """
    temporary_paths = {path: path.with_name(f"{path.name}.new") for path in files}
    for path, data in files.items():
        temporary_paths[path].write_bytes(data)
    if durably:
        sync_all(temporary_paths.values())
    for path, temporary_path in temporary_paths.items():
        temporary_path.replace(path)
    if durably:
        sync_all({path.parent for path in files})


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
