"""Which commit on the Hub a model was loaded from."""

from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name


def cached_commit(name: str, revision: str = "main") -> str | None:
    """Return the commit at which the client's cache has `revision` of the repository `name`; `None` if it has none.

    transformers 5.23 no longer tells a model's commit. Remove when it does: `resolve_revision` knows it while loading.

    >>> cached_commit("package://name/file"), cached_commit("")
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
