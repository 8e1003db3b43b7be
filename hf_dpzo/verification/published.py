"""Which published files a loader takes weights from."""

from collections import defaultdict

from hf_dpzo.card.files import is_weights_file
from hf_dpzo.card.sources import Source, SourceError


# By an index, a loader takes weights from files of any other names.
INDEX_SUFFIX = ".index.json"


def holds_weights(source: Source) -> bool:
    """Return whether there is anything in `source` that a loader may take weights from."""
    return any(is_weights_file(name) or name.endswith(INDEX_SUFFIX) for name in source.sizes)


def list_loaded_files(source: Source, *, adapter: bool) -> dict[str, set[str] | None]:
    """Return the names of the files that a loader takes weights from, and of the tensors that an index says they hold.

    Guarantee: there are no other weights beside them, so every loader takes these, and a loader takes all of them.

    Args:
        source: the published files.
        adapter: whether they are an adapter's, which are one file, and not a model's, which may be several.

    Raises:
        SourceError: there are other weights beside them, or the index leads elsewhere.
    """
    single = "adapter_model.safetensors" if adapter else "model.safetensors"
    index = f"{single}{INDEX_SUFFIX}"
    is_single = adapter or single in source.sizes
    if is_single and single not in source.sizes:
        raise SourceError(f"{single}: there is no such file, and a loader of adapters takes no other; save it anew.")
    shards = {single: None} if is_single else _read_index(source, index)
    known = set(shards) if is_single else {*shards, index}
    others = sorted(
        name for name in source.sizes if (is_weights_file(name) or name.endswith(INDEX_SUFFIX)) and name not in known
    )
    if others:
        raise SourceError(
            f"{others[0][:100]}: a loader may take it instead of {min(shards)}, or beside it; remove one."
        )
    return shards


def _read_index(source: Source, name: str) -> dict[str, set[str]]:
    """Return the tensors of each file by the index `name`, all of whose files must lie beside it."""
    content = source.read_json(name)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places:
        raise SourceError(f"{name}: it maps no tensor to a file; save the weights anew.")
    shards = defaultdict(set)
    for tensor, file in places.items():
        if not (isinstance(file, str) and is_weights_file(file) and file in source.sizes):
            raise SourceError(
                f"{name}: it leads a loader to {file!a:.100}, which is no file of weights beside it; save them anew."
            )
        shards[file].add(tensor)
    return dict(shards)
