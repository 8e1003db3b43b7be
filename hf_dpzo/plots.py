"""Pictures: where they may be written, and the curve of what a plan costs."""

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_dpzo.privacy.accounting import account
from hf_dpzo.privacy.ledger import round_up
from hf_dpzo.privacy.planning import Curve, CurvePoint
from hf_dpzo.privacy.queries import QUERIES


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_AXIS_LABELS = {
    "max_steps": "steps",
    "expected_batch_size": "expected batch size (rows)",
    "noise_multiplier": "noise multiplier (noise scale / sensitivity)",
    "target_epsilon": "target epsilon",
}


def check_output_path(path: Path, *, flag: str) -> None:
    """Raise `ValueError` where the folder of `path`, which `flag` names, is missing, before any work."""
    if path.is_dir():
        raise ValueError(f"{flag}={path}: it is a folder; name a file.")
    if not path.parent.is_dir():
        raise ValueError(f"{flag}={path}: there is no such folder; make it, or name another.")


def check_picture_path(path: Path) -> None:
    """Raise `ValueError` where no picture can be written to `path`, before the work that it would show."""
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"picture={path}: it is none of .png, .svg and .pdf; name one.")
    check_output_path(path, flag="picture")
    create_figure(path, size=(1, 1))


def create_figure(path: Path, *, size: tuple[float, float]) -> "Figure":
    """Return an empty figure for `path`, `size` inches wide and high, or raise `ValueError` without matplotlib."""
    try:
        # A figure of its own: pyplot would choose a backend, and keep the figure, for the whole process.
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(f"picture={path}: it needs matplotlib, which is missing; pip install matplotlib.") from error
    return Figure(figsize=size, layout="constrained")


def draw_curve(curve: Curve, path: Path) -> None:
    """Write `curve` as a picture: epsilon, or the noise that a target asks for, with the plan's own point marked.

    Laplace noise has two epsilons, one at the plan's delta and one at delta 0; a target is for the latter.

    Args:
        curve: what to draw.
        path: of the file to write; its suffix says the format, as `.png` or `.svg`.

    Raises:
        ValueError: matplotlib is not installed.
    """
    figure = create_figure(path, size=(7, 5))
    axes = figure.add_subplot()
    places, heights = [curve.value_at(point) for point in curve.points], _heights(curve.points)
    for label, values in heights.items():
        axes.plot(places, values, marker=".", label=label)
    _mark_plan(axes, curve)
    _scale_axis(axes, "x", places)
    _scale_axis(axes, "y", [value for values in heights.values() for value in values])
    label = (
        "epsilon (upper bound)" if curve.plan_point.plan.target_epsilon is None else _AXIS_LABELS["noise_multiplier"]
    )
    axes.set(xlabel=_AXIS_LABELS[curve.against], ylabel=label)
    axes.set_title(_title(curve), fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def _heights(points: Sequence[CurvePoint]) -> dict[str, list[float]]:
    """What to draw over each of `points`, by the name of the line."""
    if points[0].plan.target_epsilon is not None:
        return {"noise multiplier": [point.query.noise_multiplier for point in points]}
    lines = {f"epsilon, at delta = {points[0].guarantee.delta:g}": [point.guarantee.epsilon for point in points]}
    if points[0].guarantee.pure is not None:
        lines["pure epsilon, at delta = 0"] = [point.guarantee.pure for point in points]
    return lines


def _mark_plan(axes: "Axes", curve: Curve) -> None:
    """Circle the plan's own point, and say in the legend where it lies."""
    values = [value for (value,) in _heights([curve.plan_point]).values()]
    place = curve.value_at(curve.plan_point)
    axes.plot(
        *([place] * len(values), values),
        **{"color": "tab:red", "marker": "o", "markersize": 10, "fillstyle": "none", "linestyle": "none"},
        label=f"this plan: {' and '.join(f'{round_up(value):g}' for value in values)} at {place:g}",
    )


def _scale_axis(axes: "Axes", name: str, values: Sequence[float]) -> None:
    """Make the axis `name` logarithmic where `values` are far apart, with plain numbers for ticks."""
    from matplotlib.ticker import LogLocator, NullFormatter

    if not 0 < 5 * min(values) < max(values):
        return
    axes.set(**{f"{name}scale": "log"})
    axis = {"x": axes.xaxis, "y": axes.yaxis}[name]
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) < 1e3 * min(values) else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _title(curve: Curve) -> str:
    plan = curve.plan_point.plan
    fixed = {
        "noise_multiplier": None if plan.noise_multiplier is None else f"noise multiplier {plan.noise_multiplier:g}",
        "target_epsilon": None if plan.target_epsilon is None else f"target epsilon {plan.target_epsilon:g}",
        "expected_batch_size": f"{plan.expected_batch_size} rows in a batch on average",
        "max_steps": f"{plan.max_steps} steps",
    }
    # The target of Laplace noise is pure.
    delta = 0 if plan.noise == "laplace" and plan.target_epsilon is not None else plan.target_delta
    said = ", ".join(text for name, text in fixed.items() if text is not None and name != curve.against)
    return (
        f"{plan.noise.capitalize()} noise, {said}\n"
        f"delta = {delta:g}; {plan.num_rows} rows; neighbours differ by one row, added or removed"
    )


PICTURE_FILE = "training.png"


_QUERY_CLASSES = {kind.__name__: kind for kind in QUERIES.values()}


# The first of these that was measured is drawn.
_METRICS = ("eval_accuracy", "eval_loss")


def draw_training(statement: Mapping[str, Any], path: Path) -> None:
    """Write the picture that `statement` asks for to `path`; none without a claim, or where matplotlib is missing.

    Epsilon is the accountants', at twenty places. Metrics are drawn where the evaluation data are public.
    """
    if statement["claim"] is None or find_spec("matplotlib") is None:
        return
    figure = create_figure(path, size=(6, 3.6))
    axes = figure.add_subplot()
    steps, epsilons = _compute_epsilons(statement)
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


def _compute_epsilons(statement: Mapping[str, Any]) -> tuple[list[int], list[float]]:
    """Steps, and epsilon after them, up to the steps that were taken; with all steps of other trials, if there are."""
    claim, ledger = statement["claim"], statement["accounting"]["ledger"][0]
    query = _QUERY_CLASSES[ledger["query"]](
        noise_multiplier=ledger["noise_multiplier"], sampling_rate=ledger["sampling_rate"]
    )
    planned = claim["steps_claimed"] // claim.get("trials", 1)
    others = claim["steps_claimed"] - planned
    share = math.ceil(planned / 20)  # As logs ask for it while training.
    steps = sorted({0, *range(share, claim["steps_taken"], share), claim["steps_taken"]})
    counts = [others + count for count in steps]
    return steps, [account(((query, n),) if n else (), delta=claim["delta"]).epsilon for n in counts]
