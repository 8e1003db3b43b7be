"""Trains heads on the same features by every method of study.yaml, and shows which of them differ.

    python benchmarks/study/study.py read --data FOLDER   # features of each task's rows, once: minutes
    python benchmarks/study/study.py pace                 # how many steps of each contender take the same time
    python benchmarks/study/study.py run                  # as often as it takes: a run that has ended is not repeated
    python benchmarks/study/study.py report               # results.csv, pictures and tables

FOLDER holds `sst2/train.jsonl` and the other files that study.yaml names. `run --part 0/2` and `run --part 1/2` share
the work between two processes.
"""

import argparse
import csv
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from head_runs import Run, measure_accuracy
from study_pictures import draw_all
from study_results import Results, format_report
from task_rows import TaskRows, load_task, read_task

from hf_dpzo.methods import METHODS, PrivateMethod
from hf_dpzo.recipe.defaults import TrainingDefaults


HERE = Path(__file__).parent
OUT = Path("out") / "study"
TABLE = HERE / "results.csv"
COLUMNS = ("task", "setting", "contender", "epsilon", "seed", "steps", "learning_rate", "accuracy", "seconds")
FIRST_ORDER_CLIP = 0.5


class Study:
    """The plan, and what its runs need."""

    def __init__(self, plan: Mapping[str, Any]) -> None:
        self.plan = plan
        self._rows: dict[str, TaskRows] = {}

    def rows(self, task: str) -> TaskRows:
        """Return the rows of a task, which `read` kept."""
        if task not in self._rows:
            self._rows[task] = load_task(OUT / f"{task}.safetensors", tuning_rows=self.plan["tuning_rows"])
        return self._rows[task]

    def cells(self) -> Iterator[tuple[str, str, str]]:
        """Yield each task, setting and contender."""
        for setting, facts in self.plan["settings"].items():
            for task in facts["tasks"]:
                for contender in self.plan["contenders"]:
                    yield task, setting, contender

    def runs(self, setting: str, contender: str) -> Iterator[tuple[float, int]]:
        """Yield the epsilon and the seed of each run."""
        epsilons = [2] if contender == "mezo" else self.plan["settings"][setting]["epsilons"]
        for epsilon in epsilons:
            for seed in range(1, self.plan["seeds"] + 1):
                yield epsilon, seed

    def build(self, contender: str, setting: str, *, epsilon: float, rate: float, seed: int) -> Run:
        """Return one run."""
        fields = dict(self.plan["contenders"][contender])
        batch = fields.pop("batch", None)
        steps = self.plan["settings"][setting]["steps"] or self.plan["pace"][contender]
        return Run(
            contender={**fields, **self._complete(fields)},
            steps=steps,
            batch=batch,
            learning_rate=rate,
            epsilon=None if fields["method"] == "mezo" else epsilon,
            delta=self.plan["delta"],
            seed=seed,
        )

    def _complete(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return the clip norm that the library would choose for a method, and the smoothing."""
        method = METHODS.get(fields["method"])
        if method is None:
            return {"clip_norm": FIRST_ORDER_CLIP}
        values = argparse.Namespace(
            update="sgd",
            method=fields["method"],
            num_directions=fields.get("num_directions"),
            difference=fields.get("difference"),
        )
        defaults = TrainingDefaults(clip=self.plan["clip"], smoothing=self.plan["smoothing"])
        chosen = defaults.choose(values, given={"method", "num_directions"} & {*fields})
        chosen.pop("num_directions", None)
        return chosen if issubclass(method, PrivateMethod) else {"smoothing": self.plan["smoothing"]}

    def tune(self, task: str, setting: str, contender: str) -> float:
        """Return the learning rate that is best on the rows set aside for that, with epsilon 2."""
        file = OUT / "rates" / f"{task}_{setting}_{contender}.json"
        if not file.exists():
            means: dict[float, float] = {}
            for rate in self.plan["learning_rates"]:
                means[rate] = self._try(task, setting, contender, rate)
                if means[rate] < max(means.values()) - 0.1:  # Beyond the best one: larger rates are worse still.
                    break
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(max(means, key=means.get)))
        return json.loads(file.read_text())

    def _try(self, task: str, setting: str, contender: str, rate: float) -> float:
        """Return the mean accuracy with a learning rate on the rows set aside, by seeds that no other run has."""
        rows, found = self.rows(task), []
        for seed in range(self.plan["tuning_seeds"]):
            run = self.build(contender, setting, epsilon=2, rate=rate, seed=1000 + seed)
            head = run.train(rows.train[: self.plan["settings"][setting]["rows"]], _count(rows))
            found.append(measure_accuracy(head, rows.tuning))
        return statistics.mean(found)

    def do(self, task: str, setting: str, contender: str) -> list[dict[str, Any]]:
        """Return the results of one cell's runs."""
        rate, rows, done = self.tune(task, setting, contender), self.rows(task), []
        train = rows.train[: self.plan["settings"][setting]["rows"]]
        for epsilon, seed in self.runs(setting, contender):
            run = self.build(contender, setting, epsilon=epsilon, rate=rate, seed=seed)
            started = time.process_time()
            head = run.train(train, _count(rows))
            seconds = time.process_time() - started
            values = (task, setting, contender, run.epsilon, seed, run.steps, rate)
            accuracy = measure_accuracy(head, rows.test)
            done.append(dict(zip(COLUMNS, (*values, accuracy, round(seconds, 3)), strict=True)))
        return done


def _count(rows: TaskRows) -> int:
    return int(rows.train.labels.max()) + 1


def pace(study: Study) -> dict[str, int]:
    """Return how many steps of each contender take the time of 60 steps of aggzo-64."""
    rows = study.rows("reviews").train[:1024]
    seconds = {}
    for contender in study.plan["contenders"]:
        times = []
        for seed in range(5):
            run = study.build(contender, "equal-steps", epsilon=2, rate=1.0, seed=seed)
            started = time.process_time()
            run.train(rows, 2)
            times.append((time.process_time() - started) / run.steps)
        seconds[contender] = min(times[1:])  # The first one calibrates its noise.
    return {name: round(60 * seconds["aggzo-64"] / one) for name, one in seconds.items()}


def main() -> None:
    """Read, pace, run, or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("read", "pace", "run", "report"))
    parser.add_argument("--data", default="data", help="the folder of the files that study.yaml names")
    parser.add_argument("--part", default="0/1", help="which part of the runs, such as 0/2")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    plan = yaml.safe_load((HERE / "study.yaml").read_text(encoding="utf-8"))
    study = Study(plan)
    if arguments.command == "read":
        for name, task in plan["tasks"].items():
            filled = {key: _fill(value, arguments.data) for key, value in task.items()}
            read_task(filled, plan["shared"], OUT / f"{name}.safetensors")
    elif arguments.command == "pace":
        sys.stdout.write(f"pace: {pace(study)}\n")
    elif arguments.command == "run":
        _run_part(study, *(int(number) for number in arguments.part.split("/")))
    else:
        sys.stdout.write(_report(study))


def _fill(value: Any, folder: str) -> Any:
    return value.replace("{data}", folder) if isinstance(value, str) else value


def _run_part(study: Study, part: int, parts: int) -> None:
    (OUT / "runs").mkdir(parents=True, exist_ok=True)
    for number, cell in enumerate(study.cells()):
        file = OUT / "runs" / f"{'_'.join(cell)}.json"
        if number % parts == part and not file.exists():
            done = study.do(*cell)
            file.write_text(json.dumps(done))
            mean = statistics.mean(row["accuracy"] for row in done)
            sys.stdout.write(f"{cell} {len(done)} {mean:.3f} {sum(row['seconds'] for row in done):.0f} s\n")
            sys.stdout.flush()


def _report(study: Study) -> str:
    rows = [row for file in sorted((OUT / "runs").glob("*.json")) for row in json.loads(file.read_text())]
    if not rows:
        raise SystemExit("runs: there are none yet; python benchmarks/study/study.py run makes them.")
    with TABLE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    untouched = {task: study.rows(task).untouched for task in study.plan["tasks"]}
    results = Results(rows=rows, untouched=untouched)
    draw_all(results, study.plan, HERE)
    return format_report(results, study.plan)


if __name__ == "__main__":
    main()
