"""Pictures of the study: accuracy against epsilon, against the number of directions, and of all methods beside."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from study_results import Mean, Results


if TYPE_CHECKING:
    from matplotlib.axes import Axes


# Few enough lines to tell apart.
DRAWN = ("dpzero-b8", "dpzero", "aggzo-16", "aggzo-64", "dp-sgd")


def draw_all(results: Results, plan: Mapping[str, Any], folder: Path) -> None:
    """Write `epsilon.png`, `directions.png` and `methods.png` to `folder`, each of the tasks whose runs have ended."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    for name, draw, settings in (
        ("epsilon", _draw_epsilon, ["equal-steps"]),
        ("directions", _draw_directions, ["equal-steps", "equal-time"]),
        ("methods", _draw_methods, ["equal-steps", "equal-time"]),
    ):
        tasks = [task for task in plan["tasks"] if _has_ended(results, plan, task, settings)]
        if not tasks:
            continue
        size = (max(6.0, 4 * len(tasks)), 4.6 if name == "methods" else 3.8)
        figure, axes = plt.subplots(1, len(tasks), figsize=size, layout="constrained", squeeze=False)
        for axis, task in zip(axes[0], tasks, strict=True):
            draw(axis, results, plan, task)
            axis.set_title(task)
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
        figure.savefig(folder / f"{name}.png", dpi=110)
        plt.close(figure)


def _has_ended(results: Results, plan: Mapping[str, Any], task: str, settings: Sequence[str]) -> bool:
    return all(
        len(results.accuracies(task=task, setting=setting, contender=contender, epsilon=epsilon)) > 1
        for setting in settings
        for contender in plan["contenders"]
        for epsilon in plan["settings"][setting]["epsilons"]
    )


def _draw_epsilon(axis: "Axes", results: Results, plan: Mapping[str, Any], task: str) -> None:
    epsilons = plan["settings"]["equal-steps"]["epsilons"]
    for contender in DRAWN:
        means = _measure(results, [(task, "equal-steps", contender, epsilon) for epsilon in epsilons])
        _draw_line(axis, epsilons, means, label=contender, dashed=contender == "dp-sgd")
    _draw_untouched(axis, results, task)
    axis.set(xscale="log", xlabel="epsilon", ylabel="accuracy, %")
    axis.set_xticks(epsilons, [f"{epsilon:g}" for epsilon in epsilons])
    axis.minorticks_off()


def _draw_directions(axis: "Axes", results: Results, plan: Mapping[str, Any], task: str) -> None:
    counts = {"dpzero": 1, "aggzo-4": 4, "aggzo-16": 16, "aggzo-64": 64}
    for setting, label in (("equal-steps", "equal steps"), ("equal-time", "equal time")):
        means = _measure(results, [(task, setting, contender, 2) for contender in counts])
        _draw_line(axis, list(counts.values()), means, label=label, dashed=setting == "equal-time")
    _draw_untouched(axis, results, task)
    axis.set(xscale="log", xlabel="directions per step", ylabel="accuracy at ε = 2, %")
    axis.set_xticks(list(counts.values()), [str(count) for count in counts.values()])
    axis.minorticks_off()


def _draw_methods(axis: "Axes", results: Results, plan: Mapping[str, Any], task: str) -> None:
    names = list(reversed(plan["contenders"]))
    for shift, setting, label in ((0.2, "equal-steps", "equal steps"), (-0.2, "equal-time", "equal time")):
        means = _measure(results, [(task, setting, name, 2) for name in names])
        places = [number + shift for number in range(len(names))]
        values, errors = [100 * mean.value for mean in means], [100 * mean.error for mean in means]
        axis.barh(places, values, xerr=errors, height=0.36, label=label, error_kw={"elinewidth": 1})
    axis.axvline(100 * results.untouched[task], color="black", linestyle=":", linewidth=1, label="untouched")
    axis.set_yticks(range(len(names)), names, fontsize=8)
    lowest = min(100 * results.untouched[task], *values)
    axis.set(xlabel="accuracy at ε = 2, %", xlim=(max(0, lowest - 8), None))


def _measure(results: Results, cells: Sequence[tuple[str, str, str, float]]) -> list[Mean]:
    return [
        Mean.measure(results.accuracies(task=task, setting=setting, contender=contender, epsilon=epsilon))
        for task, setting, contender, epsilon in cells
    ]


def _draw_line(axis: "Axes", x: Sequence[float], means: Sequence[Mean], *, label: str, dashed: bool) -> None:
    values, errors = [100 * mean.value for mean in means], [100 * mean.error for mean in means]
    style = "--" if dashed else "-"
    axis.errorbar(x, values, yerr=errors, label=label, linestyle=style, marker="o", markersize=4, capsize=3)


def _draw_untouched(axis: "Axes", results: Results, task: str) -> None:
    axis.axhline(100 * results.untouched[task], color="black", linestyle=":", linewidth=1, label="untouched")
