"""The bytes of a log, from the code that packs them."""

import struct

from hf_dpzo.trajectory import records
from hf_dpzo.trajectory.log import MAGIC
from hf_dpzo.trajectory.records import CHECKSUM_BYTES, RecordLayout

from sections.markdown import code, table


# What the front of a record holds, in the order of its format.
FRONT = (
    ("step", "the number of the step, from 0"),
    ("flags", f"{records._VOID}: the release is unknown; {records._BEGINS_PART}: a part of the run begins here"),
    ("smoothing", "the distance to the probe points of this step's stage"),
    ("mask", "a fingerprint of the coordinates that could move; 0 for all"),
)


TYPES = {"I": "uint32", "d": "float64", "Q": "uint64", "q": "int64"}


def build_log_format() -> str:
    """Return the tables of the bytes before the records, and of one record."""
    head = ("offset", "bytes", "type", "what it is")
    return f"## The beginning\n\n{table(head, _list_beginning())}\n## A record\n\n{table(head, _list_record())}"


def list_front() -> list[tuple[int, str, str]]:
    """Return offset, format and name of what the front of a record holds."""
    formats = records._FRONT.format.lstrip("<")
    if len(formats) != len(FRONT):
        raise ValueError(f"front={formats}: a record begins with other numbers than {FRONT}; describe them.")
    return [(struct.calcsize(f"<{formats[:place]}"), formats[place], name) for place, (name, _) in enumerate(FRONT)]


def _list_beginning() -> list[tuple[str, ...]]:
    size = len(MAGIC)
    return [
        ("0", str(size), "text", f"{code(MAGIC.decode().strip())} and a line break"),
        (str(size), "4", "uint32", "H, the length of the header"),
        (str(size + 4), "H", "JSON in UTF-8", "[the header](#the-header)"),
        (f"{size + 4} + H", "32", "", "SHA-256 of all bytes before it"),
        (f"{size + 36} + H", "", "", "the records, one for each step, without anything between them"),
    ]


def _list_record() -> list[tuple[str, ...]]:
    rows = [
        (str(offset), str(struct.calcsize(f"<{letter}")), TYPES[letter], text)
        for (offset, letter, _), (_, text) in zip(list_front(), FRONT, strict=True)
    ]
    empty = RecordLayout(num_directions=0, num_groups=0).record_size - CHECKSUM_BYTES
    return [
        *rows,
        (str(empty), "8 G", "float64", "the learning rate of each of the G groups of parameters"),
        (f"{empty} + 8 G", "8 K", "int64", "the released sum of each of the K directions, in units of the lattice"),
        (
            f"{empty} + 8 G + 8 K",
            str(CHECKSUM_BYTES),
            "",
            "the first bytes of a SHA-256 over the checksum before it (of the header: its first "
            f"{CHECKSUM_BYTES}), the digest of a part that begins here, and the record up to this place",
        ),
    ]
