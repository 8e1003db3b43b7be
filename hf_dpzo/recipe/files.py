"""Opens files and folders of rows, and keeps what `datasets` caches of them under a digest of their bytes.

`datasets` itself finds its cache by name and time stamp, so that a row which was removed may be trained on.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import Features, Json, Value
from datasets.data_files import DataFilesDict, get_data_patterns
from datasets.packaged_modules import _EXTENSION_TO_MODULE

from hf_dpzo._version import __version__
from hf_dpzo.recipe.bars import advance
from hf_dpzo.recipe.written import OPENERS, TEXT_SUFFIXES, TextFile, UnreadableFileError, find_suffix


@dataclass(frozen=True, kw_only=True)
class FileReader:
    """Reads files and folders of rows.

    Args:
        encoding: the encoding of text files; `None` for UTF-8.
        separator: what separates cells; `None` for the comma or tab of the suffix.
        missing_words: what stands for a missing cell in a text file, next to an empty one.

    Guarantee: what is read from one row of a text file does not depend on the other rows. The types of other files are
    those that they state.
    """

    encoding: str | None = None
    separator: str | None = None
    missing_words: Sequence[str] = ()

    def read_file(self, path: Path) -> datasets.Dataset:
        """Return the rows of a file.

        Raises:
            UnreadableFileError: no reader is known for its suffix, or it is not what its suffix says.
        """
        return self._read_files([path], find_suffix(path))

    def read_folder(self, path: Path, config: str | None, split: str) -> datasets.Dataset:
        """Return a split of a folder: one that `save_to_disk` made, or one with files that `datasets` knows."""
        path = path.resolve()  # Never a name on the Hub.
        explained = f"data={path}: it holds no {split} split of files that can be read"
        if (path / "dataset_dict.json").is_file():
            path = path / split
            if not path.is_dir():
                raise UnreadableFileError(f"data={path.parent}: it has no split {split}; name one of its folders.")
        if (path / "state.json").is_file():
            return _explain(explained, lambda: datasets.load_from_disk(str(path)))
        builder = _explain(explained, lambda: datasets.load_dataset_builder(str(path), config))
        found = (builder.config.data_files or {}).get(split, ())
        files = [Path(file) for file in found]
        suffixes = {find_suffix(file) for file in files}
        _explain(explained, lambda: _refuse_mixed_folder(path, split, files))
        if len(suffixes) == 1 and suffixes <= {*TEXT_SUFFIXES}:
            return self._read_files(files, suffixes.pop())
        options = {"split": split, "cache_dir": find_cache(files)}
        return _explain(explained, lambda: datasets.load_dataset(str(path), config, **options))

    def _read_files(self, paths: Sequence[Path], suffix: str) -> datasets.Dataset:
        explained = f"data={paths[0]}: it can not be read as a file {suffix}"
        if suffix in TEXT_SUFFIXES:
            return _explain(explained, lambda: self._read_texts(paths))
        if suffix not in _EXTENSION_TO_MODULE:
            raise UnreadableFileError(
                f"data={paths[0]}: no reader is known for its suffix; name a file of one of the kinds "
                f"{', '.join(TEXT_SUFFIXES)}, which may be compressed ({', '.join(OPENERS)}), .parquet or .arrow."
            )
        module, options = _EXTENSION_TO_MODULE[suffix]
        options = {**options, "split": "train", "cache_dir": find_cache(paths)}
        files = [str(path) for path in paths]
        return _explain(explained, lambda: datasets.load_dataset(module, data_files=files, **options))

    def _read_texts(self, paths: Sequence[Path]) -> datasets.Dataset:
        options = {"encoding": self.encoding, "separator": self.separator, "missing_words": self.missing_words}
        # In tuples, because `datasets` takes lists for shards.
        files = tuple(TextFile(path=path, **options) for path in paths)
        names = tuple(dict.fromkeys(name for file in files for name in file.names()))
        # A JSON value may be a list in one row and a text in another. As JSON, it does not decide about the others.
        holds_json = not all(file.suffix in (".csv", ".tsv", ".txt") for file in files)
        features = Features(dict.fromkeys(names, Json() if holds_json else Value("string")))
        made_from = {"files": files, "names": names, "holds_json": holds_json}
        return datasets.Dataset.from_generator(
            _generate_rows, features=features, gen_kwargs=made_from, cache_dir=find_cache(paths)
        )


def list_suffixes() -> list[str]:
    """Return the suffixes of the files that hold rows, as far as `datasets` and this module read them."""
    # Its tasks of agents are folders, though it knows them by files such as README.md.
    modules = _EXTENSION_TO_MODULE.items()
    known = {suffix for suffix, (module, _) in modules if not module.endswith("folder") and module != "harbor"}
    return [*TEXT_SUFFIXES, *sorted({suffix.lower() for suffix in known} - {*TEXT_SUFFIXES})]


def _refuse_mixed_folder(path: Path, split: str, files: Sequence[Path]) -> None:
    """Raise `UnreadableFileError` if a split has files of other kinds than `files`, which `datasets` would not read."""
    patterns = {split: get_data_patterns(str(path)).get(split, [])}
    there = [Path(file) for file in DataFilesDict.from_patterns(patterns, base_path=str(path))[split]]
    read = {find_suffix(file) for file in files}
    kinds = sorted(read | ({find_suffix(file) for file in there} & {*list_suffixes()}))
    pages = [path / name for name in (datasets.config.REPOCARD_FILENAME, datasets.config.REPOYAML_FILENAME)]
    says_itself = any("data_files:" in page.read_text(errors="replace") for page in pages if page.is_file())
    if len(read) > 1 or (len(kinds) > 1 and not says_itself):
        raise UnreadableFileError(
            f"data={path}: the split {split} has files of the kinds {', '.join(kinds)}; name one of them, or a folder "
            "with files of one kind."
        )


def find_cache(paths: Sequence[Path]) -> str:
    """Return the folder for what `datasets` caches of files, which no other content of theirs shares."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return str(Path(datasets.config.HF_DATASETS_CACHE) / f"hf_dpzo-{__version__}" / digest.hexdigest()[:32])


def _generate_rows(files: Sequence[TextFile], names: Sequence[str], holds_json: bool) -> Iterator[dict[str, Any]]:
    is_empty = True
    for file in files:
        for row in file.rows():
            is_empty = False
            advance()
            yield {name: _encode(row.get(name), holds_json=holds_json) for name in names}
    if is_empty:
        raise UnreadableFileError(f"data={files[0].path}: it holds no row; name a file of rows.")


def _encode(cell: Any, *, holds_json: bool) -> str | None:
    # `Json` would take a text that looks like JSON for what it looks like.
    return json.dumps(cell) if holds_json and cell is not None else cell


def _explain(explained: str, read: Callable[[], datasets.Dataset]) -> Any:
    """Return what `read` returns, or raise one sentence that shows no value where it fails."""
    try:
        return read()
    except Exception as error:
        chain: list[BaseException] = [error]
        while chain[-1].__cause__ is not None:
            chain.append(chain[-1].__cause__)
        own = next((link for link in chain if isinstance(link, UnreadableFileError)), None)
        reason = type(chain[-1]).__name__
    if own is not None:
        raise own from None
    raise UnreadableFileError(f"{explained} ({reason}); check the file and its suffix, or write it anew.")
