"""Trains the head of the quick start many times, on features that are read once: what differs is noise and directions.

    python benchmarks/study/repeat.py --runs 10 --epsilons 0.5 2 8
    python benchmarks/study/repeat.py --train_share 0.4

Reading takes minutes, and is done once: features are kept in out/study.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch
import yaml
from head_runs import Run, measure_accuracy
from task_rows import TaskRows, load_task, read_task

from hf_dpzo.recipe.recipe import read_recipe


sys.path.append(str(Path(__file__).parents[1]))
import shared


RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
FOLDER = Path("out") / "study"
ALL_ROWS = {"train_rows": sys.maxsize, "test_rows": sys.maxsize}


def repeat(rows: TaskRows, epsilon: float, runs: int) -> list[float]:
    """Return the accuracies of heads that were trained as the recipe says, with another epsilon."""
    recipe, args = read_recipe(RECIPE, [f"--target_epsilon={epsilon}"])
    names = ("method", "num_directions", "smoothing", "clip_norm")
    accuracies = []
    for seed in range(runs):
        run = Run(
            contender={name: getattr(args, name) for name in names},
            steps=args.max_steps,
            batch=None,
            learning_rate=args.learning_rate,
            epsilon=epsilon,
            delta=args.target_delta,
            seed=seed,
        )
        accuracies.append(measure_accuracy(run.train(rows.train, len(recipe.labels)), rows.test))
    return accuracies


def main() -> None:
    """Read, train, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--epsilons", type=float, nargs="+", default=[0.5, 2, 8])
    parser.add_argument("--train_share", type=float, help="the share of rows to train on; by default all")
    options = parser.parse_args()
    fields, file = yaml.safe_load(RECIPE.read_text(encoding="utf-8")), FOLDER / "quickstart.safetensors"
    if options.train_share is not None:
        fields["train_share"], file = options.train_share, FOLDER / f"quickstart_{options.train_share:g}.safetensors"
    if not file.exists():
        read_task({**fields, **ALL_ROWS}, {}, file)
    rows, lines = load_task(file, tuning_rows=0), []
    torch.set_num_threads(1)
    for epsilon in options.epsilons:
        found = repeat(rows, epsilon, options.runs)
        shown = (statistics.mean(found), statistics.stdev(found), min(found), max(found))
        lines.append((f"{epsilon:g}", str(len(rows.train)), *(f"{value:.4f}" for value in shown)))
    header = ("epsilon", "rows", "mean accuracy", "standard deviation", "least", "most")
    sys.stdout.write("\n".join([*shared.table(header, lines), ""]))


if __name__ == "__main__":
    main()
