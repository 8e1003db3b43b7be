"""Files that are written whole or not at all, and are on disk when that returns."""

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all, and wait until it is on disk."""
    replace_all({path: data})


def replace_all(files: Mapping[Path, bytes], *, durably: bool = True) -> None:
    """Write files, each whole or not at all, and wait until they are on disk, unless somebody else will."""
    scratch = {path: path.with_name(f"{path.name}.new") for path in files}
    for path, data in files.items():
        scratch[path].write_bytes(data)
    if durably:
        sync_all(scratch.values())
    for path, written in scratch.items():
        written.replace(path)
    if durably:
        sync_all({path.parent for path in files})


def sync_all(paths: Iterable[Path]) -> None:
    """Wait until files, or the entries of folders, are on disk."""
    paths = list(paths)
    if len(paths) == 1:
        _sync(paths[0])
    elif paths:
        # Disks commit together what is waited for at the same time: ten small files take hardly longer than one.
        with ThreadPoolExecutor(max_workers=16) as threads:
            list(threads.map(_sync, paths))


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders.
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows flushes only what may be written.
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
