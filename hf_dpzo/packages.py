"""Files that installed Python packages carry, such as a model or data."""

import importlib.util
from pathlib import Path


PACKAGE = "package://"


def resolve(path: str) -> str:
    """Return the real path of `package://name/...`, and anything else unchanged. Nothing is imported.

    Raises:
        ValueError: there is no such package, or the path leads out of it.

    >>> Path(resolve("package://hf_dpzo/recipe.py")).name
    'recipe.py'
    """
    if not path.startswith(PACKAGE):
        return path
    package, _, rest = path.removeprefix(PACKAGE).partition("/")
    folder = _folder_of(package, path)
    found = (folder / rest).resolve()
    # A log may have named it, and nothing but what the package carries was meant to be open to logs.
    if not found.is_relative_to(folder):
        raise ValueError(f"{path}: it leads out of the package; name a file in {package}.")
    return str(found)


def _folder_of(package: str, path: str) -> Path:
    # Found without importing it: a package that carries a model may need libraries that nothing here needs. A name with
    # a dot would import what stands before it.
    try:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    except ValueError:  # Of __main__, and of other modules that are no files.
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{path}: the Python package {package} is not installed; install it, or name a folder.")
    return Path(spec.submodule_search_locations[0]).resolve()
