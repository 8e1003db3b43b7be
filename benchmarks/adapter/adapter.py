"""Measures what the adapter of recipes/adapter.yaml learns in some minutes, beside MeZO and DP-AdamW.

    python benchmarks/adapter/adapter.py prompts     # what untouched prompts reach
    python benchmarks/adapter/adapter.py run         # all contenders and seeds; a run that has ended is not repeated
    python benchmarks/adapter/adapter.py report      # a table, and accuracy.png

Flags of recipes follow, such as `--data sst2/train.jsonl --eval_data sst2/test.jsonl --without where,eval_rows`. All
contenders train the same adapter on the same rows, with the keys and values before the invocation kept for the whole
run. `--steps mezo=400` gives one another number of steps, so that all take the same time on another machine. A curve
shows the time of training alone, from the beginning of `train`: held-out rows are evaluated outside of it.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from curve import Clock, Curve
from prefixes import KeptPrefixes
from prompts import measure_prompts

from hf_dpzo.frozen.store import CACHE_DTYPES
from hf_dpzo.recipe.recipe import read_recipe
from hf_dpzo.recipe.run import build_trainer


sys.path.append(str(Path(__file__).parents[1]))
import shared


HERE = Path(__file__).parent
RECIPE, RUNS, PICTURE = HERE.parents[1] / "recipes" / "adapter.yaml", HERE / "runs", HERE / "accuracy.png"


@dataclass(frozen=True, kw_only=True)
class Contender:
    """What is trained.

    Args:
        name: its name.
        flags: the flags that replace fields of the recipe.
        first_order: what DP-AdamW takes, in place of them.
        steps: the number of steps that take as long as the recipe's; `None` for the recipe's.
    """

    name: str
    flags: tuple[str, ...] = ()
    first_order: dict[str, Any] = field(default_factory=dict)
    steps: int | None = None


CONTENDERS = (
    Contender(name="recipe"),
    Contender(
        name="mezo",
        flags=(
            *("--method", "mezo", "--learning_rate", "1"),
            *("--without", "target_epsilon,target_delta,clip_norm"),
        ),
    ),
    Contender(
        name="dp-adamw", first_order={"learning_rate": 2e-3, "clip_norm": 0.3, "expected_batch_size": 128}, steps=40
    ),
)


def run_contender(
    contender: Contender,
    seed: int,
    options: argparse.Namespace,
    flags: list[str],
    prefixes: dict[Any, torch.Tensor],
) -> dict[str, Any]:
    """Train one contender with one seed, and return its curve and its epsilon.

    `prefixes` keeps what comes before the invocation of held-out rows for the runs to come. Each run computes that of
    the rows that it trains on, within its time.
    """
    steps = dict(one.split("=") for one in options.steps).get(contender.name, contender.steps)
    steps = None if steps is None else int(steps)
    flags = merge_without([*flags, *contender.flags])
    with tempfile.TemporaryDirectory() as folder:
        common = ["--seed", str(seed), "--output_dir", folder, "--disable_tqdm", "true"]
        count = [] if steps is None else ["--max_steps", str(steps)]
        trainer = build_trainer(*read_recipe(RECIPE, [*flags, *count, *common]))
        steps = steps or trainer.args.max_steps
        dtype = CACHE_DTYPES[trainer.args.frozen_cache_dtype]
        kept = KeptPrefixes(trainer, dtype, prefixes)
        rows = trainer.eval_dataset
        # A loss tries at its first call what its model can leave out, by rows that go on after no prefix.
        trainer.per_example_loss(trainer.model, trainer.data_collator([rows[0]]))
        some = rows.shuffle(seed=0).select(range(min(options.rows, len(rows))))
        curve = Curve(
            lambda every_row: kept.measure_accuracy(rows if every_row else some),
            every=max(1, steps // options.points),
            steps=steps,
        )
        before = kept.measure_accuracy(rows)
        sys.stderr.write(f"{contender.name}, seed {seed}: {before:.4f} before\n")
        curve.clock = Clock()
        curve.measure(0)
        if contender.first_order:
            from first_order import train_first_order  # It needs Opacus.

            epsilon = train_first_order(trainer, KeptPrefixes(trainer, dtype), contender.first_order, steps, curve)
        else:
            trainer.add_callback(curve)
            trainer.train()
            epsilon = trainer.budget.guarantee().epsilon if trainer.budget.private else None
    return {
        "contender": contender.name,
        "seed": seed,
        "steps": steps,
        "epsilon": epsilon,
        "before": before,
        "curve": curve.points,
    }


def merge_without(flags: list[str]) -> list[str]:
    """Return `flags` with one `--without` in place of several.

    >>> merge_without(["--without", "a", "--seed", "1", "--without", "b,c"])
    ['--seed', '1', '--without', 'a,b,c']
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--without", action="append", default=[])
    found, rest = parser.parse_known_args(flags)
    return [*rest, *(["--without", ",".join(found.without)] if found.without else [])]


def list_runs() -> Iterator[dict[str, Any]]:
    """Yield the results of all runs that have ended."""
    yield from (json.loads(path.read_text("utf-8")) for path in sorted(RUNS.glob("*.json")))


def report() -> list[str]:
    """Draw accuracy against minutes, and return the lines of a table with means over seeds and their spread."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    lines = []
    for number, contender in enumerate(CONTENDERS):
        runs = [run for run in list_runs() if run["contender"] == contender.name]
        for place, run in enumerate(runs):
            minutes, accuracies = zip(*((seconds / 60, some) for seconds, some, _ in run["curve"]), strict=True)
            axes.plot(minutes, accuracies, color=f"C{number}", alpha=0.7, label=None if place else contender.name)
        if runs:
            before, after = [run["before"] for run in runs], [run["curve"][-1][2] for run in runs]
            gains = [100 * (b - a) for a, b in zip(before, after, strict=True)]
            minutes = statistics.mean(run["curve"][-1][0] / 60 for run in runs)
            epsilon = "none" if runs[0]["epsilon"] is None else f"{runs[0]['epsilon']:.2f}"
            steps = str(runs[0]["steps"])
            cells = (show(before), show(after), show(gains, digits=1), f"{minutes:.1f}", str(len(runs)))
            lines.append((contender.name, epsilon, steps, *cells))
    axes.set(xlabel="minutes of training", ylabel="accuracy on held-out rows")
    axes.legend()
    figure.savefig(PICTURE, dpi=150)
    return shared.table(("contender", "epsilon", "steps", "before", "after", "gain, points", "minutes", "runs"), lines)


def show(values: Sequence[float], digits: int = 3) -> str:
    """Return the mean of `values` and their standard deviation.

    >>> show([0.5, 0.7]), show([3.0], digits=1)
    ('0.600 (s 0.141)', '3.0')
    """
    spread = f" (s {statistics.stdev(values):.{digits}f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def main() -> None:
    """Measure prompts, train, or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("prompts", "run", "report"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--contenders", nargs="+", default=[contender.name for contender in CONTENDERS])
    parser.add_argument("--steps", nargs="+", default=[], metavar="CONTENDER=STEPS")
    parser.add_argument("--points", type=int, default=6, help="of a curve, besides the first")
    parser.add_argument("--rows", type=int, default=400, help="held-out rows for these; the last point is of all rows")
    options, flags = parser.parse_known_args()
    if options.command == "prompts":
        lines = shared.table(("template", "words", "accuracy", "centred"), measure_prompts(RECIPE, flags))
        sys.stdout.write("\n".join([*lines, ""]))
    elif options.command == "report":
        sys.stdout.write("\n".join([*report(), ""]))
    else:
        RUNS.mkdir(exist_ok=True)
        kept: dict[Any, torch.Tensor] = {}
        for seed in options.seeds:
            for contender in CONTENDERS:
                path = RUNS / f"{contender.name}_{seed}.json"
                if contender.name in options.contenders and not path.exists():
                    result = run_contender(contender, seed, options, flags, kept)
                    path.write_text(json.dumps(result) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
