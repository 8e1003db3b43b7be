"""Pictures: where they may be written, and the curve of what a plan costs."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_dpzo.ledger import round_up
from hf_dpzo.tradeoff import Curve, Point


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_LABELS = {
    "max_steps": "steps",
    "expected_batch_size": "expected batch size (rows)",
    "noise_multiplier": "noise multiplier (noise scale / sensitivity)",
    "target_epsilon": "target epsilon",
}


def check_folder(path: Path, *, flag: str) -> None:
    """Raise `ValueError` where the folder of `path`, which `flag` names, is missing, before any work."""
    if path.is_dir():
        raise ValueError(f"{flag}={path}: it is a folder; name a file.")
    if not path.parent.is_dir():
        raise ValueError(f"{flag}={path}: there is no such folder; make it, or name another.")


def check_picture(path: Path) -> None:
    """Raise `ValueError` where no picture can be written to `path`, before the work that it would show."""
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"picture={path}: it is none of .png, .svg and .pdf; name one.")
    check_folder(path, flag="picture")
    new_figure(path, size=(1, 1))


def new_figure(path: Path, *, size: tuple[float, float]) -> "Figure":
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
    figure = new_figure(path, size=(7, 5))
    axes = figure.add_subplot()
    places, heights = [curve.place(point) for point in curve.points], _heights(curve.points)
    for label, values in heights.items():
        axes.plot(places, values, marker=".", label=label)
    _mark(axes, curve)
    _scale(axes, "x", places)
    _scale(axes, "y", [value for values in heights.values() for value in values])
    label = "epsilon (upper bound)" if curve.asked.plan.target_epsilon is None else _LABELS["noise_multiplier"]
    axes.set(xlabel=_LABELS[curve.against], ylabel=label)
    axes.set_title(_title(curve), fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def _heights(points: Sequence[Point]) -> dict[str, list[float]]:
    """What to draw over each of `points`, by the name of the line."""
    if points[0].plan.target_epsilon is not None:
        return {"noise multiplier": [point.query.noise_multiplier for point in points]}
    lines = {f"epsilon, at delta = {points[0].spent.delta:g}": [point.spent.epsilon for point in points]}
    if points[0].spent.pure is not None:
        lines["pure epsilon, at delta = 0"] = [point.spent.pure for point in points]
    return lines


def _mark(axes: "Axes", curve: Curve) -> None:
    """Circle the plan's own point, and say in the legend where it lies."""
    values = [value for (value,) in _heights([curve.asked]).values()]
    place = curve.place(curve.asked)
    axes.plot(
        *([place] * len(values), values),
        **{"color": "tab:red", "marker": "o", "markersize": 10, "fillstyle": "none", "linestyle": "none"},
        label=f"this plan: {' and '.join(f'{round_up(value):g}' for value in values)} at {place:g}",
    )


def _scale(axes: "Axes", name: str, values: Sequence[float]) -> None:
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
    plan = curve.asked.plan
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
