"""Files that installed Python packages carry, such as a model or data."""

import importlib.util
from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name


PACKAGE_PREFIX = "package://"


def resolve_path(path: str) -> str:
    """Return the real path of `package://name/...`, and anything else unchanged. Nothing is imported.

    Raises:
        ValueError: there is no such package, or the path leads out of it.

    >>> Path(resolve_path("package://hf_dpzo/recipe.py")).name
    'recipe.py'
    """
    if not path.startswith(PACKAGE_PREFIX):
        return path
    package, _, rest = path.removeprefix(PACKAGE_PREFIX).partition("/")
    folder = _find_package_folder(package, path)
    found = (folder / rest).resolve()
    # A log may have named it, and nothing but what the package carries was meant to be open to logs.
    if not found.is_relative_to(folder):
        raise ValueError(f"{path}: it leads out of the package; name a file in {package}.")
    return str(found)


def _find_package_folder(package: str, path: str) -> Path:
    # Found without importing it: a package that carries a model may need libraries that nothing here needs. A name with
    # a dot would import what stands before it.
    try:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    except ValueError:  # Of __main__, and of other modules that are no files.
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{path}: the Python package {package} is not installed; install it, or name a folder.")
    return Path(spec.submodule_search_locations[0]).resolve()


def find_cached_commit(name: str, revision: str = "main") -> str | None:
    """Return the commit at which the client's cache has `revision` of the repository `name`; `None` if it has none.

    transformers 5.23 no longer tells a model's commit. Remove when it does: `resolve_revision` knows it while loading.

    >>> find_cached_commit("package://name/file"), find_cached_commit("")
    (None, None)
    """
    if Path(name).exists():
        return None
    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        return None
    if isinstance(found, str):
        return Path(found).parent.name
    snapshots = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"), "snapshots")
    commits = [path.name for path in snapshots.glob("*")]
    return commits[0] if len(commits) == 1 else None  # Of a branch or a tag whose name nobody kept.
