"""Where the relative paths of a recipe's file are, so that it means the same data from whatever folder one types."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


# The fields that may be paths of this machine, from which a run reads.
PATH_FIELDS = ("model_name_or_path", "data", "eval_data", "calibrate_on")


def locate_paths(folder: Path, values: Mapping[str, Any]) -> dict[str, str]:
    """Return the paths among the `values` of a recipe in `folder` that are others than the current folder's.

    What is read is looked for in the current folder first, then in `folder`. A ledger is always the one in `folder`,
    because another one, which knows nothing of earlier runs, must not begin in each folder that one types in.

    Raises:
        ValueError: the only ledger of that name is in the current folder, so that it is not clear which one is meant.
    """
    found = {}
    for name in PATH_FIELDS:
        value = values.get(name)
        if isinstance(value, str) and value and not Path(value).exists() and (folder / value).exists():
            found[name] = str(folder / value)
    ledger = values.get("privacy_ledger")
    if isinstance(ledger, str) and ledger and not ledger.startswith("~"):
        beside = folder / ledger
        if Path(ledger).exists() and not beside.exists():
            raise ValueError(
                f"privacy_ledger={ledger}: it means the one beside the recipe ({beside.absolute()}), and there is one "
                f"in the current folder alone; move it there, or write {Path(ledger).absolute()} into the recipe."
            )
        found["privacy_ledger"] = str(beside)
    return found
