"""The coins of canaries: which are in the data. Secret until an audit; kept beside the log, and never published."""

import hashlib
import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from hf_dpzo.io.files import write_atomically
from hf_dpzo.io.strict_json import parse_json


# No file with this suffix is ever uploaded.
COINS_FILE = "canaries.secret"


# More than any audit needs: each canary has one letter, and a recipe has some hundred flags.
_MAX_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Coins:
    """The coins of a run, and what tells them from any others.

    Args:
        values: whether each canary is in the data, `[canaries]`. SECRET.
        nonce: a secret number in hexadecimal, so that nobody can find the coins by trying them on the commitment.
        recipe: the flags of the recipe that the run was made from; empty for a run that Python code made.

    >>> coins = Coins.flip(3)
    >>> len(coins.values), len(coins.commitment)
    (3, 64)
    """

    values: tuple[bool, ...]
    nonce: str
    recipe: tuple[str, ...] = ()

    @classmethod
    def flip(cls, count: int, recipe: tuple[str, ...] = ()) -> Self:
        """Return `count` fair and independent coins of the operating system."""
        values = tuple(bool(byte & 1) for byte in secrets.token_bytes(count))
        return cls(values=values, nonce=secrets.token_hex(32), recipe=recipe)

    @property
    def commitment(self) -> str:
        """A public fingerprint. It says nothing about the coins, but nobody can show other coins for it."""
        text = f"{self.nonce}:{''.join(str(int(value)) for value in self.values)}"
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def mask(self) -> np.ndarray:
        """The coins as an array of booleans, `[canaries]`. SECRET."""
        return np.array(self.values, dtype=bool)

    def save(self, folder: Path) -> None:
        """Write the coins into `folder`, readable by this user alone, and wait until they are on disk."""
        folder.mkdir(parents=True, exist_ok=True)
        content = {"coins": [int(value) for value in self.values], "nonce": self.nonce, "recipe": list(self.recipe)}
        write_atomically(folder / COINS_FILE, json.dumps(content).encode(), secretly=True)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Return the coins in `folder`.

        Raises:
            ValueError: there are none, or they cannot be read.
        """
        path = folder / COINS_FILE
        if not path.is_file():
            raise ValueError(
                f"{path}: the coins of the canaries are not there, and without them a run with canaries can neither go "
                "on nor be audited; bring the file back from where the run began."
            )
        try:
            with open(path, "rb") as file:
                return cls._parse(parse_json(file.read(_MAX_BYTES).decode()))
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f"{path}: it does not hold the coins of a run; bring the file back from a copy.") from None

    @classmethod
    def _parse(cls, content: dict[str, Any]) -> Self:
        if not {0, 1}.issuperset(content["coins"]):
            raise ValueError("coins")
        recipe = tuple(str(flag) for flag in content["recipe"])
        return cls(values=tuple(map(bool, content["coins"])), nonce=str(content["nonce"]), recipe=recipe)
