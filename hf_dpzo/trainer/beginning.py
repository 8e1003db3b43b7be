"""What a run began with, where another training made it: a card that did not say so would seem to count it."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from hf_dpzo.card.files import STATEMENT_FILE
from hf_dpzo.card.repository import read_statement
from hf_dpzo.models.adapters import has_trained_values
from hf_dpzo.models.history import get_origin
from hf_dpzo.models.seeded import get_adapter_seed
from hf_dpzo.models.unwrap import unwrap_model
from hf_dpzo.trajectory.earlier_runs import EarlierRuns, name_log
from hf_dpzo.trajectory.header import TrajectoryError
from hf_dpzo.trajectory.log import Trajectory


# A folder with more entries than this is not searched to its end.
_MAX_ENTRIES = 1000


# A training that no guarantee is known of.
_UNKNOWN = {"epsilon": None, "delta": None}


def find_beginning(
    model: torch.nn.Module, initial: str, *, output_dir: Path, earlier: EarlierRuns, folders: Sequence[str]
) -> dict[str, float | None] | None:
    """Return the epsilon and delta of what made the values that `model` begins with, unless the new run counts it.

    A run is known by the weights that it led to, if its folder is beside `output_dir`, by the folder that the base
    model was loaded from, or because the model was rebuilt from its log. What a counted run itself began with, and does
    not count, is not counted here either. Both numbers are `None` where a training has no guarantee, or is not known.
    The result is `None` for a model that nobody is known to have trained, and for one that a counted run has.

    Args:
        model: the model, before its first step.
        initial: the fingerprint of the values that are trained.
        output_dir: the folder of the new run.
        earlier: the runs that the new one counts.
        folders: their folders.
    """
    makers = dict(_find_makers(model, initial, output_dir))
    uncounted = _describe_uncounted(makers, earlier)
    origin = get_origin(model)
    if not makers and origin is not None:
        uncounted = [] if origin[0] in earlier.names else [_pick_epsilon(origin[1])]
    is_new = not isinstance(model, PeftModel) or get_adapter_seed(model) is not None or not has_trained_values(model)
    if not makers and origin is None and not is_new and not _have_made(folders, initial):
        uncounted = [_UNKNOWN]
    return _add_up([*uncounted, *earlier.beginnings])


def refuse_runs_without_a_claim(folders: Iterable[str]) -> None:
    """Raise `ValueError` for an earlier run whose own card claims no guarantee, such as after an audit of it."""
    for folder in folders:
        statement = read_statement(Path(folder))
        if statement is not None and statement["claim"] is None:
            raise ValueError(
                f"earlier_runs={folder}: its {STATEMENT_FILE} says that it keeps no guarantee, and no epsilon covers "
                "it; begin from a model that it did not make."
            )


def _find_makers(
    model: torch.nn.Module, initial: str, output_dir: Path
) -> Iterator[tuple[Path, dict[str, Any] | None]]:
    """Yield the folders of runs that made what `model` begins with, and their statements; `None` for an unknown one."""
    base = Path(str(getattr(getattr(unwrap_model(model), "config", None), "name_or_path", "") or output_dir))
    for folder in (base, *_list_neighbors(output_dir.resolve())):
        statement = read_statement(folder)
        if folder.resolve() == output_dir.resolve():
            continue
        is_stated = (folder / STATEMENT_FILE).exists()  # A version to come, or a disk that was full, wrote it.
        if (folder == base and is_stated) or (statement is not None and _leads_to(statement, initial)):
            yield folder, statement


def _describe_uncounted(
    makers: Mapping[Path, Mapping[str, Any] | None], earlier: EarlierRuns
) -> list[Mapping[str, Any]]:
    """Return what each of the runs in `makers` adds, once for all copies of its log, unless it is counted."""
    found: dict[str, Mapping[str, Any]] = {}
    for folder, statement in makers.items():
        claim = None if statement is None else statement["claim"]
        log = _read_log(folder)
        if log is None:
            found[str(folder)] = _pick_epsilon(claim)
        elif claim is None or not earlier.count(log):  # A claim that an audit took off is counted by nobody.
            before = log.header.get("began_from")
            found[name_log(log)] = _add_up([_pick_epsilon(claim), *([] if before is None else [before])])
    return list(found.values())


def _leads_to(statement: Mapping[str, Any], initial: str) -> bool:
    weights = statement["reproducibility"]["weights"]
    return weights is not None and weights["sha256"] == initial


def _have_made(folders: Iterable[str], initial: str) -> bool:
    """Return whether one of the runs in `folders`, or one of their checkpoints, led to the values `initial`."""
    places = [place for folder in folders for place in (Path(folder), *Path(folder).glob("checkpoint-*"))]
    return any(_leads_to(statement, initial) for statement in map(read_statement, places) if statement is not None)


def _pick_epsilon(claim: Mapping[str, Any] | None) -> Mapping[str, Any]:
    return _UNKNOWN if claim is None else {name: claim[name] for name in _UNKNOWN}


def _add_up(beginnings: Sequence[Mapping[str, Any]]) -> dict[str, float | None] | None:
    """Return the sums of epsilons and deltas (Dwork and Roth 2014, theorem 3.16); `None` if there are none."""
    if not beginnings:
        return None
    if any(one[name] is None for one in beginnings for name in _UNKNOWN):
        return dict(_UNKNOWN)
    delta = math.fsum(one["delta"] for one in beginnings)
    return {"epsilon": math.fsum(one["epsilon"] for one in beginnings), "delta": delta} if delta < 1 else dict(_UNKNOWN)


def _list_neighbors(output_dir: Path) -> Iterator[Path]:
    """Yield the folders beside the run's own, and their checkpoints."""
    try:
        for _, folder in zip(range(_MAX_ENTRIES), output_dir.parent.iterdir(), strict=False):
            if folder.is_dir():
                yield folder
                yield from folder.glob("checkpoint-*")
    except OSError:
        return


def _read_log(folder: Path) -> Trajectory | None:
    try:
        return Trajectory.read(folder)
    except (OSError, TrajectoryError):
        return None
