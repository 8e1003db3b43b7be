"""Which published files a loader takes, and which were not looked at."""

from collections import defaultdict
from pathlib import PurePosixPath

from hf_dpzo.auditing.coins import COINS_FILE
from hf_dpzo.card.files import (
    CARD_FILE,
    CONFIG_FILES,
    PUBLIC_SUFFIXES,
    STATEMENT_FILE,
    is_checkpoint,
    is_weights_file,
)
from hf_dpzo.card.sources import Source, SourceError
from hf_dpzo.io.files import is_scratch_file
from hf_dpzo.trajectory.initial import INITIAL_FILE
from hf_dpzo.trajectory.log import LOG_FILE
from hf_dpzo.trajectory.parts import PARTS_FILE
from hf_dpzo.verification.finding import Finding


CHECKED_FILES = {CARD_FILE, STATEMENT_FILE, LOG_FILE, INITIAL_FILE, PARTS_FILE, *CONFIG_FILES}


# Files of a run's own folder and of the Hub. Nothing is loaded from them.
HARMLESS_FILES = {"training_args.bin", ".gitattributes", ".gitignore", "LICENSE", f"{LOG_FILE}.lock", COINS_FILE}


# By an index, a loader takes weights from files of any other names.
INDEX_SUFFIX = ".index.json"


# What a loader that is given a subfolder takes weights or an adapter from.
_LOADABLE_SUFFIXES = {".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pkl", ".pt", ".pth", ".safetensors"}


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


def check_other_files(source: Source) -> Finding:
    """Check that no file which was not looked at could run code or hold other weights."""
    suspect = [name for name in source.sizes if not _is_known(name)]
    if suspect:
        detail = f"{', '.join(suspect[:3])}: what may run code, or hold other weights, was not opened"
        return Finding(name="other files", holds=False, detail=detail)
    checked = (name for name in source.sizes if is_weights_file(name) or name.endswith(INDEX_SUFFIX))
    rest = sorted(set(source.sizes) - CHECKED_FILES - set(checked))
    folders = sorted({str(PurePosixPath(name).parent) for name in source.nested if _is_loadable(name)})
    named = [*rest, *(f"{folder}/ (with weights)" for folder in folders)]
    # A run's own checkpoints are no other model. Each has a card and a log, and can be verified by its own name.
    strange = [folder for folder in folders if not is_checkpoint(folder)]
    detail = f"not looked at: {', '.join(named)}" if named else "none"
    return Finding(name="other files", holds=None if strange else True, detail=detail)


def _is_known(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix in PUBLIC_SUFFIXES or name in HARMLESS_FILES or is_scratch_file(path.name)


def _is_loadable(name: str) -> bool:
    path = PurePosixPath(name)
    return (
        path.suffix.lower() in _LOADABLE_SUFFIXES or path.name in CONFIG_FILES or path.name.endswith(INDEX_SUFFIX)
    ) and path.name not in HARMLESS_FILES
