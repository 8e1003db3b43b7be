"""The picture in a card: how epsilon was spent, and what was measured on the way."""

import math
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hf_dpzo.accounting import guarantee
from hf_dpzo.pictures import new_figure
from hf_dpzo.queries import QUERIES


PICTURE_FILE = "training.png"
_KINDS = {kind.__name__: kind for kind in QUERIES.values()}
# The first of these that was measured is drawn.
_METRICS = ("eval_accuracy", "eval_loss")


def draw_training(statement: Mapping[str, Any], path: Path) -> None:
    """Write the picture that `statement` asks for to `path`; none without a claim, or where matplotlib is missing.

    Epsilon is the accountants', at twenty places. Metrics are drawn where the evaluation data are public.
    """
    path.unlink(missing_ok=True)
    if statement["claim"] is None or find_spec("matplotlib") is None:
        return
    figure = new_figure(path, size=(6, 3.6))
    axes = figure.add_subplot()
    steps, epsilons = _spent(statement)
    axes.plot(steps, epsilons, color="tab:red")
    axes.set(xlabel="steps", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel(f"ε at δ = {statement['claim']['delta']:g}", color="tab:red")
    name = next((one for one in _METRICS if any(one in row for row in statement["evaluation"]["history"])), None)
    if name is not None:
        measured = [(row["step"], row[name]) for row in statement["evaluation"]["history"] if name in row]
        other = axes.twinx()
        other.plot(*zip(*measured, strict=True), color="tab:blue", marker="o")
        other.set_ylabel(name, color="tab:blue")
    figure.savefig(path, metadata={"Software": None})


def _spent(statement: Mapping[str, Any]) -> tuple[list[int], list[float]]:
    """Steps, and epsilon after them, up to the steps that were taken; with all steps of other trials, if there are."""
    claim, ledger = statement["claim"], statement["accounting"]["ledger"][0]
    query = _KINDS[ledger["query"]](noise_multiplier=ledger["noise_multiplier"], sampling_rate=ledger["sampling_rate"])
    planned = claim["steps_claimed"] // claim.get("trials", 1)
    others = claim["steps_claimed"] - planned
    share = math.ceil(planned / 20)  # As logs ask for it while training.
    steps = sorted({0, *range(share, claim["steps_taken"], share), claim["steps_taken"]})
    counts = [others + count for count in steps]
    return steps, [guarantee(((query, n),) if n else (), delta=claim["delta"]).epsilon for n in counts]
