"""Where a model comes from: a file in an installed Python package, or a commit in the Hub client's cache."""

import importlib.util
from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name


PACKAGE_PREFIX = "package://"


def resolve_path(path: str) -> str:
    """Return the real path of `package://name/...`, and any other path unchanged. Nothing is imported.

    Raises:
        ValueError: the package is not installed, or the path leads out of it.

    >>> Path(resolve_path("package://hf_dpzo/recipe.py")).name
    'recipe.py'
    """
    if not path.startswith(PACKAGE_PREFIX):
        return path
    package, _, rest = path.removeprefix(PACKAGE_PREFIX).partition("/")
    folder = _find_package_folder(package, path)
    real_path = (folder / rest).resolve()
    # The path may come from a stranger's log, and a log must open nothing but files of the package.
    if not real_path.is_relative_to(folder):
        raise ValueError(f"{path}: it leads out of the package; name a file in {package}.")
    return str(real_path)


def is_local_place(name: str) -> bool:
    """Return whether `name` can only be meant for a place on this machine, and not for a repository on the Hub.

    >>> [is_local_place(name) for name in ("user/model", "model", "./model", "~/model", "a/b/c")]
    [False, False, True, True, True]
    """
    return name.startswith(("/", ".", "~")) or name.count("/") > 1


def _find_package_folder(package: str, path: str) -> Path:
    # The package is not imported, because it may need libraries that are not installed. A name with a dot would import
    # the package before the dot.
    try:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    except ValueError:  # `find_spec` raises it for __main__ and other modules without a file.
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{path}: the Python package {package} is not installed; install it, or name a folder.")
    return Path(spec.submodule_search_locations[0]).resolve()


def find_cached_commit(name: str, revision: str = "main") -> str | None:
    """Return the commit at which the Hub client's cache holds `revision` of a repository; `None` if it holds none.

    A loaded model of transformers 5.23 no longer says its commit. Remove when it does: `resolve_revision` knows the
    commit while loading.

    Args:
        name: the repository's name; the path of a local folder has no commit.
        revision: a commit, a branch or a tag.

    >>> find_cached_commit("package://name/file"), find_cached_commit("")
    (None, None)
    """
    if Path(name).exists():
        return None
    try:
        cached_file = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        return None
    if isinstance(cached_file, str):
        return Path(cached_file).parent.name
    snapshots = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"), "snapshots")
    commits = [path.name for path in snapshots.glob("*")]
    # The cache may hold a commit without the name of the branch or tag that led to it.
    return commits[0] if len(commits) == 1 else None
