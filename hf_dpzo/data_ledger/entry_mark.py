"""What a run's folder keeps of its entry in a ledger, so that the run is the same entry when it goes on."""

import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from hf_dpzo.io.files import LinkError, read_plain, write_atomically
from hf_dpzo.io.strict_json import parse_json


# No file with this suffix is ever uploaded.
MARK_FILE = "ledger-entry.secret"


@dataclass(frozen=True, kw_only=True)
class EntryMark:
    """The ledger and the entry of a run, both as random texts.

    Args:
        ledger: what tells the ledger from others.
        name: what tells the run from others.
    """

    ledger: str
    name: str

    @classmethod
    def new(cls, ledger: str) -> Self:
        """Return a mark that no other run has."""
        return cls(ledger=ledger, name=secrets.token_hex(16))

    def save(self, folder: Path) -> None:
        """Write the mark into `folder`, readable by this user alone, and wait until it is on disk."""
        write_atomically(
            folder / MARK_FILE, json.dumps({"ledger": self.ledger, "name": self.name}).encode(), secretly=True
        )

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """Return the mark in `folder`; `None` if there is none, or none that can be read, and the run counts anew."""
        try:
            content = parse_json(read_plain(folder / MARK_FILE).decode())
            return cls(ledger=str(content["ledger"]), name=str(content["name"]))
        except (OSError, LinkError, ValueError, KeyError, TypeError, RecursionError):
            return None
