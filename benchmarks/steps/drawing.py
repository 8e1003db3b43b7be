"""Pictures of what was measured."""

from pathlib import Path

from jobs import title

from findings import AXES, Line, Results
from hf_dpzo.plots import create_figure


def pictures(results: Results, folder: Path) -> None:
    """Draw `steps.png`, the ratios, and `scaling.png`, the lines."""
    _draw_ratios(results, folder / "steps.png")
    _draw_lines(results, folder / "scaling.png")


def _draw_ratios(results: Results, path: Path) -> None:
    cases = [case for case in results.plan["cases"] if "baseline" not in case]
    shown = list(dict.fromkeys(name for case in cases for name in case["contenders"]))
    figure = create_figure(path, size=(10, 1 + 0.55 * len(cases)))
    panels = figure.subplots(1, 2, sharey=True)
    for axes, column, label in zip(panels, ("seconds", "peak"), ("time", "peak memory"), strict=True):
        for number, name in enumerate(shown):
            found = {
                place: results.ratio(case, name, column)
                for place, case in enumerate(cases)
                if name in case["contenders"] and not results.error(title(case), name)
            }
            if not found:
                continue
            medians = [ratio.median for ratio in found.values()]
            ranges = [[r.median - r.low for r in found.values()], [r.high - r.median for r in found.values()]]
            places = [place + 0.08 * (number - len(shown) / 2) for place in found]
            axes.errorbar(medians, places, xerr=ranges, label=name, marker="o", markersize=4, linestyle="none")
        axes.set(xscale="log", xlabel=f"{label}, over that of the floor")
        axes.set_xticks([1, 1.5, 2, 3, 5, 8], labels=["1", "1.5", "2", "3", "5", "8"])
        axes.set_xticks([], minor=True)
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(cases)), [title(case) for case in cases])
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=150)


def _draw_lines(results: Results, path: Path) -> None:
    names = list(results.plan["scaling"]["axes"])
    figure = create_figure(path, size=(3 * len(names), 2.8))
    for axes, name in zip(figure.subplots(1, len(names)), names, strict=True):
        xs, ys = results.axis(name)
        line = Line.through(xs, ys)
        ends = (0.0, max(xs))
        axes.plot(xs, ys, marker="o", linestyle="none")
        axes.plot(ends, [line.at_zero + line.slope * x for x in ends], linewidth=1)
        axes.set(xlabel=AXES[name], ylim=(0, None), title=f"R² = {line.r_squared:.4f}")
    figure.axes[0].set_ylabel("seconds a step")
    figure.savefig(path, dpi=150)
