"""Compares rules that choose the learning rate of a head, so that nobody has to: on the tasks of the study.

    python benchmarks/study/rules.py run      # after study.py read; appends to rules.csv what it does not have
    python benchmarks/study/rules.py report   # means and standard errors

A rule sees public numbers alone: the noise, the number of steps and directions, and coefficients that were released.
"""

import argparse
import csv
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from head_runs import Run, measure_accuracy
from schedules import Constant, DistanceOverGradients
from study import Study

from hf_dpzo.zo.updates import Adam, NormalizedSGD


sys.path.append(str(Path(__file__).parents[1]))
import shared


HERE = Path(__file__).parent
TABLE = HERE / "rules.csv"
COLUMNS = ("task", "steps", "epsilon", "rule", "seed", "accuracy")
SEEDS, STEPS = range(1, 7), 60
CLIP = 0.05

# A fixed rate, and multiples of the rate at which noise carries a parameter as far as a probe point is away.
RULES: dict[str, dict[str, Any]] = {
    "20": {"learning_rate": 20.0},
    "1 walk": {},
    "4 walks": {"factor": 4.0},
    "16 walks": {"factor": 16.0},
    "8 walks, constant": {"factor": 8.0, "schedule": Constant},
    "16 walks, a tenth of the clip norm": {"factor": 16.0, "clip_norm": CLIP / 10},
    "16 walks, ten times the clip norm": {"factor": 16.0, "clip_norm": CLIP * 10},
    "16 walks, coefficients over their spread": {"factor": 16.0, "update": NormalizedSGD()},
    "4 walks, Adam": {"factor": 4.0, "update": Adam()},
    "distance over gradients": {"schedule": DistanceOverGradients},
}


def run_rule(study: Study, task: str, epsilon: float, rule: str, seed: int) -> float:
    """Return the accuracy on held-out rows of a head that was trained on 1,024 rows by `rule`."""
    rows, settings = study.rows(task), dict(RULES[rule])
    clip_norm = settings.pop("clip_norm", CLIP)
    run = Run(
        contender={"method": "aggzo", "num_directions": 64, "smoothing": 0.1, "clip_norm": clip_norm},
        steps=STEPS,
        batch=None,
        epsilon=epsilon,
        delta=study.plan["delta"],
        seed=seed,
        **{"learning_rate": None, **settings},
    )
    classes = int(rows.train.labels.max()) + 1
    return measure_accuracy(run.train(rows.train[:1024], classes), rows.test)


def read_results() -> dict[tuple[str, ...], float]:
    """Return the accuracy of each run that has ended."""
    if not TABLE.exists():
        return {}
    with TABLE.open(encoding="utf-8", newline="") as file:
        return {tuple(row[name] for name in COLUMNS[:-1]): float(row["accuracy"]) for row in csv.DictReader(file)}


def run_all(study: Study) -> None:
    """Run what has no result yet, and append its result."""
    done = read_results()
    with TABLE.open("a", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        if not done:
            writer.writerow(COLUMNS)
        for seed in SEEDS:
            for task in study.plan["tasks"]:
                for epsilon in (0.5, 2):
                    for rule in RULES:
                        key = (task, str(STEPS), str(epsilon), rule, str(seed))
                        if key not in done:
                            writer.writerow((*key, run_rule(study, task, epsilon, rule, seed)))
                            file.flush()


def report() -> list[str]:
    """Return a table of means and their standard errors in points, for each task and epsilon."""
    results = read_results()
    cells = list(dict.fromkeys((task, epsilon) for task, _, epsilon, _, _ in results))
    lines = []
    for rule in RULES:
        line = [rule]
        for task, epsilon in cells:
            found = [100 * value for key, value in results.items() if (key[0], key[2], key[3]) == (task, epsilon, rule)]
            error = statistics.stdev(found) / len(found) ** 0.5 if len(found) > 1 else float("nan")
            line.append(f"{statistics.mean(found):.1f} ({error:.1f})" if found else "")
        lines.append(tuple(line))
    return shared.table(("rule", *(f"{task}, {epsilon}" for task, epsilon in cells)), lines)


def main() -> None:
    """Run, or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "report"))
    torch.set_num_threads(1)
    if parser.parse_args().command == "run":
        run_all(Study(yaml.safe_load((HERE / "study.yaml").read_text(encoding="utf-8"))))
    else:
        sys.stdout.write("\n".join([*report(), ""]))


if __name__ == "__main__":
    main()
