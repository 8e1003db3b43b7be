"""Reads text files of rows as they are written: no value is taken for a number, a date or a missing cell.

So what is read from a line or an object does not depend on the others. `datasets` and pandas take types from all.
"""

import bz2
import codecs
import csv
import gzip
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from hf_dpzo.data.cells import is_missing, to_text


Row = dict[str, Any]


OPENERS: dict[str, Callable[..., IO]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


SEPARATORS = {".csv": ",", ".tsv": "\t"}


LINES_OF_JSON = (".jsonl", ".ndjson")


TEXT_SUFFIXES = (*SEPARATORS, ".json", *LINES_OF_JSON, ".txt")


# More than names of columns have, and less than most texts.
_LONGEST_NAME, _QUESTION = 32, "does the first row name the columns?"


_DAMAGED = (EOFError, OSError, zlib.error, lzma.LZMAError)


class UnreadableFileError(ValueError):
    """A file of rows cannot be read. The message shows none of its values."""


@dataclass(frozen=True, kw_only=True)
class TextFile:
    """A CSV, TSV, JSON or text file, which may be compressed.

    Args:
        path: the file. Its suffix says what it is.
        encoding: the encoding of the text.
        separator: what separates the cells of a row; `None` for the comma or tab of the suffix.
        missing_words: what stands for a missing cell, next to an empty one and JSON's null.

    Raises:
        UnreadableFileError: the file is not what its suffix says; raised where it is read.
    """

    path: Path
    encoding: str | None = None
    separator: str | None = None
    missing_words: Sequence[str] = ()

    @property
    def suffix(self) -> str:
        """The suffix in lower case, without that of a compression."""
        return find_suffix(self.path)

    def names(self) -> list[str]:
        """Return the names of the columns. Those of JSON are all that any object has."""
        if self.suffix in SEPARATORS:
            with self._explained(), self._open() as file:
                return self._header(self._reader(file))
        return [*dict.fromkeys(name for row in self._objects() for name in row)] if self.suffix != ".txt" else ["text"]

    def rows(self) -> Iterator[Row]:
        """Yield the rows. A cell is text, `None` if it is missing, or for JSON a list or a dictionary."""
        if self.suffix in SEPARATORS:
            yield from self._table()
        elif self.suffix == ".txt":
            with self._explained(), self._open() as file:
                yield from ({"text": self._cell(line.rstrip("\r\n"), "text")} for line in file)
        else:
            for row in self._objects():
                yield {name: self._cell(value, name) for name, value in row.items()}

    def _table(self) -> Iterator[Row]:
        with self._explained(), self._open() as file:
            reader = self._reader(file)
            names = self._header(reader)
            try:
                for cells in filter(None, reader):
                    if len(cells) > len(names):
                        raise csv.Error
                    cells += [""] * (len(names) - len(cells))
                    yield {name: self._cell(cell, name) for name, cell in zip(names, cells, strict=True)}
            except csv.Error:
                raise self._broken(f" (line {reader.line_num})", names) from None

    def _reader(self, file: IO) -> Any:
        """Return a reader that fails where a quote is not closed before a separator, and would swallow rows."""
        separator = SEPARATORS[self.suffix] if self.separator is None else self.separator
        csv.field_size_limit(sys.maxsize)
        return csv.reader(file, delimiter=separator, strict=True)

    def _header(self, reader: Any) -> list[str]:
        """Return the names of the columns, of which those without one are numbered."""
        try:
            first = next(filter(None, reader), [])
        except csv.Error:
            first = []
        if not first:
            raise self._broken(" in its first line")
        names = [name or f"Unnamed: {place}" for place, name in enumerate(first)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UnreadableFileError(f"data={self.path}: it has two columns {list_columns(twice)}; rename one.")
        return names

    def _broken(self, place: str, names: Sequence[str] = ()) -> UnreadableFileError:
        separator = find_separator(names)
        if separator is not None:
            return UnreadableFileError(f"data={self.path}: {explain_separator(separator)}.")
        return UnreadableFileError(
            f"data={self.path}: its rows do not have the cells that its first row names{place}; quote cells that hold "
            "the separator, write quotes in them twice, or set separator."
        )

    def _objects(self) -> Iterator[Mapping[str, Any]]:
        with self._explained():
            if self.suffix == ".json":
                with self._open() as file:
                    text = file.read()
                try:
                    rows = self._find_rows(_parse(text))
                except json.JSONDecodeError as error:
                    if error.msg != "Extra data":
                        raise self._refuse_json(error.lineno, error.colno) from None
                    rows = self._parse_lines(text.split("\n"))
                yield from self._checked(rows)
            else:
                with self._open() as file:
                    yield from self._checked(self._parse_lines(file))

    def _parse_lines(self, lines: Iterable[str]) -> Iterator[Any]:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield _parse(line.rstrip())  # Its end would be a line of its own in what an error says.
                except json.JSONDecodeError as error:
                    raise self._refuse_json(number, error.colno) from None

    def _refuse_json(self, line: int, column: int) -> UnreadableFileError:
        return UnreadableFileError(
            f"data={self.path}: it is not valid JSON at line {line}, column {column}; mend that line, or give the file "
            "the suffix of what it is."
        )

    def _checked(self, rows: Iterable[Any]) -> Iterator[Mapping[str, Any]]:
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, dict):
                raise UnreadableFileError(
                    f"data={self.path}: row {number} is no object with the names of columns; write one for each row."
                )
            yield row

    def _find_rows(self, value: Any) -> list[Any]:
        """Return the list of rows in a JSON document: it itself, its only list of objects, or its columns."""
        if isinstance(value, list):
            return value
        fields = value if isinstance(value, dict) else {}
        lists = [item for item in fields.values() if isinstance(item, list)]
        objects = [item for item in lists if item and all(isinstance(row, dict) for row in item)]
        if len(objects) == 1 and len(lists) == 1:
            return objects[0]
        if lists and len(lists) == len(fields) and len({len(item) for item in lists}) == 1:
            return [dict(zip(fields, cells, strict=True)) for cells in zip(*lists, strict=True)]
        # A single object may be a file of one line.
        if fields and not lists and not any(isinstance(item, dict) for item in fields.values()):
            return [value]
        raise UnreadableFileError(
            f"data={self.path}: it holds no list of rows; write one object for each row, as JSON lines or in a list."
        )

    def _cell(self, value: Any, column: str) -> Any:
        if isinstance(value, list | dict):
            return value
        text = value.written if isinstance(value, _WrittenFloat) else to_text(value, column)
        return None if is_missing(value) or text == "" or text in self.missing_words else text

    def _open(self) -> IO:
        opener = OPENERS.get(self.path.suffix.lower(), open)
        # utf-8-sig also reads the mark that some programs put in front.
        encoding = self.encoding or "utf-8"
        encoding = "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding
        return opener(self.path, "rt", encoding=encoding, newline="" if self._is_table else None)

    @property
    def _is_table(self) -> bool:
        return self.suffix in SEPARATORS

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Raise one sentence without values of the file where a reader would fail otherwise."""
        reason = remedy = None
        try:
            yield
        except UnreadableFileError:
            raise
        except (UnicodeError, LookupError):
            reason = f"it is not text in the encoding {self.encoding or 'utf-8'}"
            remedy = "set encoding to that of the file, such as latin-1, cp1252 or utf-16"
        except RecursionError:
            reason, remedy = "its JSON has too many brackets within each other", "write it anew"
        except _DAMAGED:
            reason, remedy = "it can not be opened, or is damaged", "check the file, and that its suffix is right"
        if reason is not None:
            raise UnreadableFileError(f"data={self.path}: {reason}; {remedy}.")


class _WrittenFloat(float):
    """A number of a JSON file that is not whole, with its text. Inside a list or a dictionary it is a number."""

    written: str

    def __new__(cls, text: str) -> "_WrittenFloat":
        """Return the number that `text` is."""
        number = super().__new__(cls, text)
        number.written = text
        return number


def _parse(text: str) -> Any:
    """Return the JSON value in `text`. Numbers that are none, such as NaN, are missing."""
    return json.loads(text, parse_float=_WrittenFloat, parse_constant=lambda name: None)


def find_separator(names: Sequence[str]) -> str | None:
    """Return what separates the names of columns, where a table was read as if it had one: Excel writes semicolons.

    >>> find_separator(["note;urgent"]), find_separator(["note", "urgent; really"]), find_separator(["note"])
    (';', None, None)
    """
    return next((one for one in (";", "\t", "|") if len(names) == 1 and one in names[0]), None)


def explain_separator(separator: str) -> str:
    r"""Return what is wrong with a table whose cells are separated by `separator`, remedy first.

    >>> explain_separator("\t")
    'set separator: "\\t" (--separator "\\t"), which stands between the names in its first row'
    """
    written = separator.replace("\t", "\\t")
    how = f'set separator: "{written}" (--separator "{written}")'
    return f"{how}, which stands between the names in its first row"


def find_suffix(path: Path) -> str:
    """Return the suffix of a file in lower case, without that of a compression.

    >>> find_suffix(Path("rows.JSONL.gz")), find_suffix(Path("rows.tsv")), find_suffix(Path("rows"))
    ('.jsonl', '.tsv', '')
    """
    if path.suffix.lower() in OPENERS:
        path = path.with_suffix("")
    return path.suffix.lower()


def list_columns(names: Sequence[str]) -> str:
    """Return the names of columns for a message, without those as long as a text: a table may begin with a row.

    >>> list_columns(["note", "The pump has stopped again, please call Smith"])
    'note, (45 characters; does the first row name the columns?)'
    """
    told = (name if len(name) <= _LONGEST_NAME else f"({len(name)} characters; {_QUESTION})" for name in names)
    return ", ".join(told)
