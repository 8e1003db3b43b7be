"""Every picture: the curve of what a plan costs, and the course of a training run."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_dpzo.privacy.accounting import account, is_costly
from hf_dpzo.privacy.planning import Curve, CurvePoint
from hf_dpzo.privacy.queries import QUERY_CLASSES, Query
from hf_dpzo.privacy.rounding import round_up


if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_AXIS_LABELS = {
    "max_steps": "steps",
    "expected_batch_size": "expected batch size (rows)",
    "noise_multiplier": "noise multiplier (noise scale / sensitivity)",
    "target_epsilon": "target epsilon",
}


def check_output_path(path: Path, *, flag: str) -> None:
    """Raise `ValueError` where no file can be written to `path`. Call it before the work whose result it would hold.

    Args:
        path: the path of the file to write.
        flag: the name of the argument that gives the path, for the message.
    """
    if path.is_dir():
        raise ValueError(f"{flag}={path}: it is a folder; name a file.")
    if not path.parent.is_dir():
        raise ValueError(f"{flag}={path}: there is no such folder; make it, or name another.")


def check_picture_path(path: Path) -> None:
    """Raise `ValueError` where no picture can be written to `path`. Call it before the work that it would show."""
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"picture={path}: it is none of .png, .svg and .pdf; name one.")
    check_output_path(path, flag="picture")
    create_figure(path, size=(1, 1))


def create_figure(path: Path, *, size: tuple[float, float]) -> "Figure":
    """Return an empty figure for `path`, `size` inches wide and high, or raise `ValueError` without matplotlib."""
    try:
        # Not pyplot, which would choose a backend for the whole process and keep the figure.
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(f"picture={path}: it needs matplotlib, which is missing; pip install matplotlib.") from error
    return Figure(figsize=size, layout="constrained")


def draw_curve(curve: Curve, path: Path) -> None:
    """Draw `curve` to a file: epsilon, or the noise that a target needs, with the plan's own point marked.

    Laplace noise has two epsilons, one at the plan's delta and one at delta 0. A target is for the latter.

    Args:
        curve: the curve to draw.
        path: the path of the file to write. Its suffix gives the format: `.png`, `.svg` or `.pdf`.

    Raises:
        ValueError: matplotlib is not installed.
    """
    figure = create_figure(path, size=(7, 5))
    axes = figure.add_subplot()
    x_values = [curve.value_at(point) for point in curve.points]
    lines = _collect_lines(curve.points)
    for label, values in lines.items():
        axes.plot(x_values, values, marker=".", label=label)
    _mark_plan(axes, curve)
    _scale_axis(axes, "x", x_values)
    _scale_axis(axes, "y", [value for values in lines.values() for value in values])
    label = (
        "epsilon (upper bound)" if curve.plan_point.plan.target_epsilon is None else _AXIS_LABELS["noise_multiplier"]
    )
    axes.set(xlabel=_AXIS_LABELS[curve.against], ylabel=label)
    axes.set_title(_format_title(curve), fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def _collect_lines(points: Sequence[CurvePoint]) -> dict[str, list[float]]:
    """Return the lines to draw: a value for each of `points`, by the name of the line."""
    if points[0].plan.target_epsilon is not None:
        return {"noise multiplier": [point.query.noise_multiplier for point in points]}
    lines = {f"epsilon, at delta = {points[0].guarantee.delta:g}": [point.guarantee.epsilon for point in points]}
    if points[0].guarantee.pure is not None:
        lines["pure epsilon, at delta = 0"] = [point.guarantee.pure for point in points]
    return lines


def _mark_plan(axes: "Axes", curve: Curve) -> None:
    """Circle the plan's own point, and say in the legend where it lies."""
    values = [value for (value,) in _collect_lines([curve.plan_point]).values()]
    own_value = curve.value_at(curve.plan_point)
    axes.plot(
        *([own_value] * len(values), values),
        **{"color": "tab:red", "marker": "o", "markersize": 10, "fillstyle": "none", "linestyle": "none"},
        label=f"this plan: {' and '.join(f'{round_up(value):g}' for value in values)} at {own_value:g}",
    )


def _scale_axis(axes: "Axes", name: str, values: Sequence[float]) -> None:
    """Make the axis `name` logarithmic, with plain numbers as ticks, where `values` are far apart."""
    from matplotlib.ticker import LogLocator, NullFormatter

    if not 0 < 5 * min(values) < max(values):
        return
    axes.set(**{f"{name}scale": "log"})
    axis = {"x": axes.xaxis, "y": axes.yaxis}[name]
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) < 1e3 * min(values) else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _format_title(curve: Curve) -> str:
    plan = curve.plan_point.plan
    descriptions = {
        "noise_multiplier": None if plan.noise_multiplier is None else f"noise multiplier {plan.noise_multiplier:g}",
        "target_epsilon": None if plan.target_epsilon is None else f"target epsilon {plan.target_epsilon:g}",
        "expected_batch_size": f"{plan.expected_batch_size} rows in a batch on average",
        "max_steps": f"{plan.max_steps} steps",
    }
    # The target of Laplace noise is a pure epsilon.
    delta = 0 if plan.noise == "laplace" and plan.target_epsilon is not None else plan.target_delta
    fixed = ", ".join(text for name, text in descriptions.items() if text is not None and name != curve.against)
    return (
        f"{plan.noise.capitalize()} noise, {fixed}\n"
        f"delta = {delta:g}; {plan.num_rows} rows; neighbours differ by one row, added or removed"
    )


def draw_plan(plan: Mapping[str, Any], path: Path) -> None:
    """Draw what a run will promise to people with one, two and four rows, and where its time will go.

    Args:
        plan: the plan as JSON.
        path: the path of the file to write. Its suffix gives the format: `.png`, `.svg` or `.pdf`.

    Raises:
        ValueError: matplotlib is not installed.
    """
    figure = create_figure(path, size=(9, 3.6))
    promised, spent = figure.subplots(1, 2, width_ratios=(3, 2))
    figure.suptitle(f"{plan['method']}, {plan['steps']} steps, {plan['units']} {plan['unit']}s", fontsize="medium")
    _draw_promises(promised, plan)
    _draw_seconds(spent, plan)
    figure.savefig(path)


def _draw_promises(axes: "Axes", plan: Mapping[str, Any]) -> None:
    promises = plan["promises"]
    if not promises:
        axes.set_title("no privacy: the method adds no noise", fontsize="small")
        axes.set_axis_off()
        return
    places = range(len(promises))
    kinds = {"membership": "guessed right, of 50 % by chance", "detection": "detected, at 1 % false alarms"}
    for shift, (name, label) in zip((-0.2, 0.2), kinds.items(), strict=True):
        bars = axes.bar(
            [place + shift for place in places], [100 * one[name] for one in promises], width=0.38, label=label
        )
        axes.bar_label(bars, fmt="%.0f %%", fontsize="small")
    ends = ["no bound" if one["epsilon"] is None else f"ε = {one['epsilon']:g}" for one in promises]
    who = [f"{one['rows']} {'row' if one['rows'] == 1 else 'rows'}" for one in promises]
    who = ["a user"] if plan["unit"] == "user" else who
    axes.set_xticks([*places], [f"{person}\n{end}" for person, end in zip(who, ends, strict=True)])
    axes.set(ylim=(0, 115), ylabel="per cent, at most")
    axes.set_title(f"whether a person took part, at δ = {plan['delta']:g}", fontsize="small")
    axes.legend(fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)


def _draw_seconds(axes: "Axes", plan: Mapping[str, Any]) -> None:
    if plan["seconds_per_step"] is None:
        axes.set_title("the run would be refused" if plan["refusals"] else "no step was tried", fontsize="small")
        axes.set_axis_off()
        return
    parts = {
        "loading, checks": plan["seconds_before"],
        "reading rows once": plan["seconds_reading"],
        "steps": plan["steps"] * plan["seconds_per_step"],
    }
    bars = axes.barh([*parts], [*parts.values()], color="tab:gray")
    axes.bar_label(bars, fmt="%.0f s", fontsize="small", padding=2)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set_xlabel("seconds")
    axes.set_title("where its time goes, without evaluation", fontsize="small")


PICTURE_FILE = "training.png"


# The first of these metrics that was measured is drawn.
_METRICS = ("eval_accuracy", "eval_loss")


def draw_training(statement: Mapping[str, Any]) -> bytes | None:
    """Draw the run that `statement` describes as a PNG: epsilon over the steps, and a metric where one was measured.

    Args:
        statement: the run's statement, which holds metrics only where the evaluation data are public.

    Returns:
        the content of the file, or `None` where the statement claims no privacy, or matplotlib is missing.
    """
    if statement["claim"] is None or find_spec("matplotlib") is None:
        return None
    figure = create_figure(Path(PICTURE_FILE), size=(6, 3.6))
    axes = figure.add_subplot()
    steps, epsilons = _compute_epsilons(statement)
    axes.plot(steps, epsilons, color="tab:red")
    axes.set(xlabel="steps", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel(f"ε at δ = {statement['claim']['delta']:g}", color="tab:red")
    history = statement["evaluation"]["history"]
    metric = next((name for name in _METRICS if any(name in row for row in history)), None)
    if metric is not None:
        measured = [(row["step"], row[metric]) for row in history if metric in row]
        metric_axes = axes.twinx()
        metric_axes.plot(*zip(*measured, strict=True), color="tab:blue", marker="o")
        metric_axes.set_ylabel(metric, color="tab:blue")
    return _encode_png(figure)


def draw_trajectory(table: "pd.DataFrame") -> "Figure":
    """Draw what a run released, as `Trajectory.to_pandas` has it.

    Above are epsilon, where the run was private, and the learning rate; below is the root mean square of the released
    coefficients.
    """
    figure = create_figure(Path(PICTURE_FILE), size=(6, 5))
    above, below = figure.subplots(2, sharex=True)
    above.plot(table.index, table["epsilon"], color="tab:red")
    above.set_ylabel("ε spent", color="tab:red")
    rates = above.twinx()
    rates.plot(table.index, table["learning_rate"], color="tab:gray")
    rates.set_ylabel("learning rate", color="tab:gray")
    coefficients = table.filter(regex="^coefficient_")
    below.plot(table.index, (coefficients**2).mean(axis=1) ** 0.5, color="tab:blue")
    below.set(xlabel="steps", ylabel="coefficients, RMS")
    # A notebook shows a figure that pyplot did not make only if it has this method.
    figure._repr_png_ = partial(_encode_png, figure)
    return figure


def _encode_png(figure: "Figure") -> bytes:
    picture = BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()


def _compute_epsilons(statement: Mapping[str, Any]) -> tuple[list[int], list[float]]:
    """Return up to twenty numbers of steps, up to those taken, and epsilon after each.

    Other trials, earlier runs and reports count in full.
    """
    claim = statement["claim"]
    ledger = statement["accounting"]["ledger"][0]
    query = _build_query(ledger["query"], ledger)
    planned = claim["steps_claimed"] // claim.get("trials", 1)
    other_trial_steps = claim["steps_claimed"] - planned
    # At twenty steps the accountants have answered for the log of the training run.
    points = 4 if is_costly(((query, claim["steps_claimed"]),)) else 20
    stride = math.ceil(planned / points)
    steps = sorted({0, *range(stride, claim["steps_taken"], stride), claim["steps_taken"]})
    counts = [other_trial_steps + step for step in steps]
    others = (*claim.get("earlier", ()), *claim.get("report", ()))
    earlier = tuple((_build_query(release["name"], release), release["count"]) for release in others)
    releases = [(*(((query, count),) if count else ()), *earlier) for count in counts]
    return steps, [account(one, delta=claim["delta"]).epsilon for one in releases]


def _build_query(name: str, release: Mapping[str, Any]) -> Query:
    """Return the query of that name, of a release that a statement describes."""
    return QUERY_CLASSES[name](noise_multiplier=release["noise_multiplier"], sampling_rate=release["sampling_rate"])
