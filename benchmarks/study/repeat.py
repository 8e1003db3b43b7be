"""Trains the head of a recipe many times, on features that are read once: what differs is noise and directions.

    python benchmarks/study/repeat.py --runs 10 --epsilons 0.5 2 8
    python benchmarks/study/repeat.py --train_share 0.4
    python benchmarks/study/repeat.py --recipe recipes/encoder.yaml --position last

Flags of recipes follow. The last line of the table is a logistic regression without privacy on the same features.
Reading takes minutes, and is done once: features are kept in out/study.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from head_runs import Run, measure_accuracy
from task_rows import TaskRows, load_task, read_task

from hf_dpzo.recipe.recipe import read_recipe


sys.path.append(str(Path(__file__).parents[1]))
import shared


RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
FOLDER = Path("out") / "study"
# Of the logistic regression without privacy: the scale of features that have norm 1, and the weight of its penalty.
FEATURE_NORM, PENALTY = 20.0, 1e-3
ALL_ROWS = {"train_rows": sys.maxsize, "test_rows": sys.maxsize}


def repeat(rows: TaskRows, path: Path, flags: Sequence[str], runs: int) -> list[float]:
    """Return the accuracies of heads that were trained as the recipe at `path` says."""
    recipe, args = read_recipe(path, flags)
    if args.expected_batch_size != "all":
        raise ValueError(
            f"expected_batch_size={args.expected_batch_size}: heads are trained on all rows here; remove it."
        )
    names = ("method", "num_directions", "smoothing", "clip_norm")
    accuracies = []
    for seed in range(runs):
        run = Run(
            contender={name: getattr(args, name) for name in names},
            steps=args.max_steps,
            batch=None,
            learning_rate=args.learning_rate,
            epsilon=args.target_epsilon,
            delta=args.target_delta,
            seed=seed,
        )
        accuracies.append(measure_accuracy(run.train(rows.train, len(recipe.labels)), rows.test))
    return accuracies


def fit_without_privacy(rows: TaskRows, classes: int) -> float:
    """Return the accuracy of a logistic regression without privacy: what a head on these features may reach."""
    head = torch.nn.Linear(rows.train.features.shape[1], classes)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=60)

    def compute_loss() -> torch.Tensor:
        optimizer.zero_grad()
        scores = head(FEATURE_NORM * rows.train.features)
        loss = F.cross_entropy(scores, rows.train.labels) + PENALTY * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(compute_loss)
    found = head(FEATURE_NORM * rows.test.features).argmax(dim=1)
    return (found == rows.test.labels).double().mean().item()


def name_features(path: Path, flags: Sequence[str]) -> Path:
    """Return the file of the features of a recipe.

    >>> str(name_features(Path("recipes/encoder.yaml"), ["--data", "a/sst2/b.csv", "--position=last"]))
    'out/study/encoder_data_sst2-b.csv_position_last.safetensors'
    """
    words = ["-".join(Path(word).parts[-2:]).removeprefix("--") for flag in flags for word in flag.split("=")]
    return FOLDER / f"{'_'.join([path.stem, *words])}.safetensors"


def main() -> None:
    """Read, train, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--epsilons", type=float, nargs="+", default=[0.5, 2, 8])
    options, flags = parser.parse_known_args()
    file = name_features(options.recipe, flags)
    if not file.exists():
        fields = yaml.safe_load(options.recipe.read_text(encoding="utf-8"))
        read_task({**fields, **ALL_ROWS}, {}, file, flags)
    rows, lines = load_task(file, tuning_rows=0), []
    torch.set_num_threads(1)
    for epsilon in options.epsilons:
        found = repeat(rows, options.recipe, [*flags, f"--target_epsilon={epsilon}"], options.runs)
        shown = (statistics.mean(found), statistics.stdev(found), min(found), max(found))
        lines.append((f"{epsilon:g}", str(len(rows.train)), *(f"{value:.4f}" for value in shown)))
    classes = int(rows.train.labels.max()) + 1
    lines.append(("none", str(len(rows.train)), f"{fit_without_privacy(rows, classes):.4f}", "", "", ""))
    header = ("epsilon", "rows", "mean accuracy", "standard deviation", "least", "most")
    sys.stdout.write("\n".join([*shared.table(header, lines), ""]))


if __name__ == "__main__":
    main()
