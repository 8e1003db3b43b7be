"""Files that are written whole or not at all, and are on disk when that returns."""

import os
from pathlib import Path


def replace_durably(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all, and wait until it is on disk."""
    scratch = path.with_name(f"{path.name}.new")
    with open(scratch, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders.
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
