"""What a run began with, where another training made it: a card that did not say so would seem to count it."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from hf_dpzo.card.files import STATEMENT_FILE
from hf_dpzo.card.schema import StatementError, check_statement
from hf_dpzo.io.strict_json import parse_json
from hf_dpzo.models.adapters import has_trained_values
from hf_dpzo.models.seeded import get_adapter_seed
from hf_dpzo.models.unwrap import unwrap_model
from hf_dpzo.trajectory.earlier_runs import name_log
from hf_dpzo.trajectory.header import TrajectoryError
from hf_dpzo.trajectory.log import Trajectory


# A folder with more entries than this is not searched to its end.
_MAX_ENTRIES = 1000


# No statement is as long as this, in bytes.
_MAX_BYTES = 1 << 24


def find_beginning(
    model: torch.nn.Module, initial: str, *, output_dir: Path, counted: Collection[str]
) -> dict[str, float | None] | None:
    """Return the epsilon and the delta of the run that made what `model` begins with, as its `privacy.json` says.

    A run is known by the weights that it led to, if its folder is beside `output_dir`, or by the folder that the base
    model was loaded from. Both numbers are `None` for an adapter that something else trained. The result is `None` for
    a model that nobody is known to have trained, and for one that a counted run has.

    Args:
        model: the model, before its first step.
        initial: the fingerprint of the values that are trained.
        output_dir: the folder of the new run.
        counted: the names of the logs that the new run counts; see `name_log`.
    """
    base = Path(str(getattr(getattr(unwrap_model(model), "config", None), "name_or_path", "") or output_dir))
    for folder in (base, *_list_neighbors(output_dir.resolve())):
        statement = _read_statement(folder)
        if statement is None or statement["claim"] is None or folder.resolve() == output_dir.resolve():
            continue
        weights = statement["reproducibility"]["weights"]
        if folder != base and (weights is None or weights["sha256"] != initial):
            continue
        if _read_name(folder) in counted:
            return None
        return {name: statement["claim"][name] for name in ("epsilon", "delta")}
    is_new = not isinstance(model, PeftModel) or get_adapter_seed(model) is not None or not has_trained_values(model)
    return None if is_new or counted else {"epsilon": None, "delta": None}


def _list_neighbors(output_dir: Path) -> Iterator[Path]:
    """Yield the folders beside the run's own, and their checkpoints."""
    try:
        for _, folder in zip(range(_MAX_ENTRIES), output_dir.parent.iterdir(), strict=False):
            if folder.is_dir():
                yield folder
                yield from folder.glob("checkpoint-*")
    except OSError:
        return


def _read_statement(folder: Path) -> dict[str, Any] | None:
    """Return the statement in `folder`; `None` if there is none, or none that this version can read."""
    path = folder / STATEMENT_FILE
    try:
        if not path.is_file() or path.stat().st_size > _MAX_BYTES:
            return None
        return check_statement(parse_json(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError, StatementError):
        return None


def _read_name(folder: Path) -> str | None:
    try:
        return name_log(Trajectory.read(folder))
    except (OSError, TrajectoryError):
        return None
