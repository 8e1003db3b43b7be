"""The published files that no other check opens: what they are by their names, and where they are.

A suffix tells what a loader may do with a file. Code and unknown kinds beside the model are refused, because a loader
may run them. Weights in a subfolder are another model unless the subfolder is a checkpoint of this very run.
"""

import re
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from hf_dpzo.auditing.coins import COINS_FILE
from hf_dpzo.card.files import (
    CARD_FILE,
    CONFIG_FILES,
    PUBLIC_SUFFIXES,
    RECIPE_FILE,
    STATEMENT_FILE,
    is_weights_file,
    split_checkpoint,
)
from hf_dpzo.card.sources import Source, SourceError
from hf_dpzo.data_ledger.entry_mark import MARK_FILE
from hf_dpzo.io.files import is_scratch_file
from hf_dpzo.trajectory.initial import INITIAL_FILE
from hf_dpzo.trajectory.log import LOG_FILE, Trajectory
from hf_dpzo.trajectory.parts import PARTS_FILE
from hf_dpzo.verification.finding import Finding
from hf_dpzo.verification.published import INDEX_SUFFIX


CHECKED_FILES = {CARD_FILE, STATEMENT_FILE, LOG_FILE, INITIAL_FILE, PARTS_FILE, *CONFIG_FILES}


# What the Trainer saves of its arguments. No loader of a model opens it.
_PICKLE = "training_args.bin"


# Files of a run's own folder and of the Hub, and those that trackers write there. Nothing is loaded from them.
_HARMLESS_NAMES = re.compile(
    "|".join(
        [
            *map(re.escape, (_PICKLE, f"{LOG_FILE}.lock", COINS_FILE, MARK_FILE)),
            r"\.gitattributes|\.gitignore|\.DS_Store|events\.out\.tfevents\..*|(LICENSE|NOTICE)[\w.-]{0,20}",
        ]
    )
)


# Documents, tables, pictures, settings of programs that load no model, and the word lists of tokenizers.
_INERT_SUFFIXES = PUBLIC_SUFFIXES - {".safetensors"} | {
    ".bib", ".bpe", ".cff", ".cfg", ".csv", ".gif", ".ini", ".jpeg", ".jpg", ".jsonl", ".log", ".ndjson", ".parquet",
    ".pdf", ".rst", ".spm", ".svg", ".tex", ".tiktoken", ".toml", ".tsv", ".vocab", ".webp", ".yaml", ".yml",
}  # fmt: skip


# What a loader that is given a subfolder takes weights or an adapter from.
_WEIGHT_SUFFIXES = {
    ".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".npy", ".npz", ".onnx", ".pickle", ".pkl", ".pt", ".pth",
    ".safetensors",
}  # fmt: skip


# What Python, a shell or a loader of kernels runs wherever it is. transformers imports it from subfolders too.
_CODE_SUFFIXES = {
    ".bat", ".cmd", ".cu", ".dll", ".dylib", ".exe", ".ipynb", ".jar", ".js", ".ps1", ".ptx", ".py", ".pyc", ".pyd",
    ".pyw", ".sh", ".so", ".whl", ".zip",
}  # fmt: skip


# What git and the Hub's client keep of a download, under names of their own.
_CLIENT_FOLDERS = (".git/", ".cache/huggingface/")


# A run keeps a few checkpoints. The logs of more are not compared.
_MAX_CHECKPOINTS = 100


_MAX_NAMED = 20


def check_other_files(source: Source, log: Path) -> Finding:
    """Check that no file which was not looked at could run code or hold other weights.

    Args:
        source: the published files.
        log: the log of the run.
    """
    checked = {name for name in source.sizes if is_weights_file(name) or name.endswith(INDEX_SUFFIX)} | CHECKED_FILES
    if "recipe" in Trajectory.read(log).header:
        checked.add(RECIPE_FILE)
    suspect = [name for name in source.sizes if name not in checked and not _is_inert(name)]
    suspect += [name for name in source.nested if PurePosixPath(name).suffix.lower() in _CODE_SUFFIXES]
    suspect += [name for name in source.sizes if name not in checked and _asks_for_code(source, name)]
    if suspect:
        detail = f"{_join(suspect, 3)}: what may run code, or hold other weights, was not opened"
        return Finding(name="other files", holds=False, detail=detail)
    folders = _list_weight_folders(source)
    # Each checkpoint has a card and a log, and can be verified by its own name.
    own = _list_own_checkpoints(source, log, folders)
    strange = [f"{folder}/ (with weights)" for folder in sorted(folders) if split_checkpoint(folder) not in own]
    strange += [f"{name}/ (a link)" for name in sorted(source.linked)]
    strange += sorted(name for name in source.nested if _is_unknown(name))
    named = [*strange, *(f"{folder}/ (of this run)" for folder in sorted(own))]
    named += sorted(set(source.sizes) - checked)
    inert = "" if strange else "of kinds that no loader of a model runs; "
    detail = f"{inert}not looked at: {_join(named, _MAX_NAMED)}" if named else "none"
    if any(PurePosixPath(name).name == _PICKLE for name in (*source.sizes, *source.nested)):
        detail += f"; {_PICKLE} is a pickle, which runs what it holds where torch.load opens it: leave it closed"
    return Finding(name="other files", holds=None if strange else True, detail=detail)


def _is_inert(name: str) -> bool:
    path = PurePosixPath(name)
    return (
        path.suffix.lower() in _INERT_SUFFIXES
        or _HARMLESS_NAMES.fullmatch(path.name) is not None
        or is_scratch_file(path.name)
    )


def _asks_for_code(source: Source, name: str) -> bool:
    """Return whether the configuration of a tokenizer or a processor names code, which a loader may be told to run."""
    if not name.endswith("config.json"):
        return False
    try:
        content = source.read_json(name)
    except SourceError:  # No loader can read it either.
        return False
    return isinstance(content, dict) and bool(content.get("auto_map") or content.get("custom_pipelines"))


def _is_loadable(name: str) -> bool:
    path = PurePosixPath(name)
    is_weights = path.suffix.lower() in _WEIGHT_SUFFIXES
    return (is_weights or path.name in CONFIG_FILES or path.name.endswith(INDEX_SUFFIX)) and not (
        _HARMLESS_NAMES.fullmatch(path.name)
    )


def _is_unknown(name: str) -> bool:
    return not (_is_inert(name) or _is_loadable(name) or name.startswith(_CLIENT_FOLDERS))


def _list_weight_folders(source: Source) -> dict[str, list[str]]:
    """Return the subfolders that hold what a loader may take, each with the names of these files."""
    folders = defaultdict(list)
    for name in source.nested:
        if _is_loadable(name):
            folders[str(PurePosixPath(name).parent)].append(name)
    return dict(folders)


def _list_own_checkpoints(source: Source, log: Path, folders: Collection[str]) -> set[str]:
    """Return which of `folders` are, or are in, checkpoints whose logs are the beginning of the run's `log`."""
    candidates = sorted({split_checkpoint(folder) for folder in folders} - {None})[:_MAX_CHECKPOINTS]
    length = log.stat().st_size
    names = {name: f"{name}/{LOG_FILE}" for name in candidates}
    short = {name: file for name, file in names.items() if 0 < source.nested.get(file, 0) <= length}
    if not short:
        return set()
    root = source.fetch(dict.fromkeys(short.values(), length))
    return {name for name, file in short.items() if _is_beginning(root / file, log)}


def _is_beginning(path: Path, log: Path) -> bool:
    """Return whether the log at `path` holds the header of `log` and some of its first records, and nothing else."""
    if not path.is_file():  # A pipe would keep its reader waiting.
        return False
    with open(path, "rb") as part, open(log, "rb") as whole:
        while chunk := part.read(1 << 20):
            if chunk != whole.read(len(chunk)):
                return False
    return True


def _join(names: list[str], most: int) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{rest}"
