"""Trains every contender of study.yaml, and draws accuracy against epsilon.

    pip install --no-deps -r benchmarks/study/requirements.txt && pip install matplotlib
    python benchmarks/study/study.py run       # as often as it takes: a run that has ended is not repeated
    python benchmarks/study/study.py report    # results.csv, accuracy.png and a table

`run --part 0/2` and `run --part 1/2` share the work between two processes.
"""

import argparse
import copy
import csv
import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from frozen_prefix import collate, outputs_of_layers, without_layers

from hf_dpzo import ZOTrainer
from hf_dpzo.arguments.training_args import ZOTrainingArguments
from hf_dpzo.privacy.accounting import account
from hf_dpzo.privacy.calibration import calibrate_query
from hf_dpzo.privacy.queries import GaussianQuery
from hf_dpzo.recipe.loading import add_adapter, load_model, load_rows, load_tokenizer
from hf_dpzo.recipe.recipe import parse_recipe
from hf_dpzo.zo.spsa import DIFFERENCES


HERE = Path(__file__).parent
RUNS, TABLE, PICTURE = HERE / "runs", HERE / "results.csv", HERE / "accuracy.png"
FIRST_ORDER = "dp-adamw"
# Held-out rows, on which the trainer looks at whether rows move each other: outputs of layers can not be made up.
PROBED = 8
COLUMNS = ("contender", "epsilon", "stated_epsilon", "pure_epsilon", "seed", "steps", "accuracy", "seconds")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One contender at one epsilon (`None`: without privacy) with one seed."""

    contender: str
    settings: dict[str, Any]
    epsilon: float | None
    seed: int

    @property
    def file(self) -> Path:
        """Where its result is kept."""
        return RUNS / f"{self.contender}_{self.epsilon}_{self.seed}.json"


class Study:
    """The model, the rows and the plan; loaded once, for all runs."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.values = yaml.safe_load((HERE / plan["recipe"]).read_text(encoding="utf-8"))
        first, *_ = plan["lora_layers"]
        layers = [layer - first for layer in plan["lora_layers"]]
        self.values |= {"eval_rows": plan["eval_rows"], "split_seed": plan["split_seed"], "lora_layers": layers}
        self.recipe, _ = parse_recipe(self.values)
        self.tokenizer = load_tokenizer(self.recipe)
        train, evaluation = load_rows(self.recipe, self.tokenizer)
        bare = copy.copy(self.recipe)
        bare.adapter = "none"
        model = load_model(bare, self.tokenizer, seed=0).eval()
        self.train = outputs_of_layers(model, train.select(range(plan["train_rows"])), first)
        self.evaluation = outputs_of_layers(model, evaluation, first)
        self.base = without_layers(model, first)
        self.collate = functools.partial(collate, tokenizer=self.tokenizer)

    def runs(self) -> Iterator[Run]:
        """All runs, one seed after the other, so that an unfinished study has whole seeds."""
        for seed in self.plan["seeds"]:
            for epsilon in self.plan["epsilons"]:
                for name, settings in self.plan["contenders"].items():
                    yield Run(contender=name, settings=settings, epsilon=epsilon, seed=seed)
            for name, settings in self.plan["baselines"].items():
                yield Run(contender=name, settings=settings, epsilon=None, seed=seed)
        yield Run(contender="untouched", settings={}, epsilon=None, seed=0)

    def result(self, run: Run) -> dict[str, Any]:
        """Train what `run` says, and measure its accuracy on the held-out rows."""
        model = add_adapter(copy.deepcopy(self.base), self.recipe, self.tokenizer, seed=run.seed)
        loss = self.recipe.prompt.loss(model, self.tokenizer)
        started = time.perf_counter()
        if run.contender == "untouched":
            facts = {"steps": 0, "stated_epsilon": None, "pure_epsilon": None}
        elif run.contender == FIRST_ORDER:
            facts = self._first_order(run, model, loss)
        else:
            facts = self._zeroth_order(run, model, loss)
        seconds = round(time.perf_counter() - started, 1)
        identity = {"contender": run.contender, "epsilon": run.epsilon, "seed": run.seed}
        return {**identity, **facts, "accuracy": self.accuracy(model, loss), "seconds": seconds}

    def _zeroth_order(self, run: Run, model: torch.nn.Module, loss: Any) -> dict[str, Any]:
        folder = tempfile.TemporaryDirectory()  # A run keeps its log there.
        args = self._arguments(
            run, max_steps=self.plan["forward_passes"] // self._passes_of_a_step(run), output_dir=folder.name
        )
        trainer = ZOTrainer(
            model=model,
            args=args,
            train_dataset=self.train,
            data_collator=self.collate,
            processing_class=self.tokenizer,
            per_example_loss=loss,
            probe_rows=self.evaluation[:PROBED],
        )
        trainer.train()
        folder.cleanup()
        stated = trainer.budget.guarantee() if trainer.budget.private else None
        return {
            "steps": args.max_steps,
            "stated_epsilon": stated and stated.epsilon,
            "pure_epsilon": stated and stated.pure,
        }

    def _passes_of_a_step(self, run: Run) -> int:
        settings = {"num_directions": 1, "difference": "central", **run.settings}
        estimator = DIFFERENCES[settings["difference"]](smoothing=1.0, num_directions=settings["num_directions"])
        return estimator.forward_passes

    def _arguments(self, run: Run, max_steps: int, output_dir: str) -> ZOTrainingArguments:
        values = {
            **self.values,
            "target_epsilon": run.epsilon,
            "target_delta": self.plan["target_delta"],
            "expected_batch_size": self.plan["expected_batch_size"],
            "seed": run.seed,
            "max_steps": max_steps,
            "output_dir": output_dir,
            "logging_steps": 1000,
            "disable_tqdm": True,
            **run.settings,
        }
        if run.epsilon is None:
            values |= dict.fromkeys(("target_epsilon", "target_delta", "clip_norm"))
        return parse_recipe(values)[1]

    def _first_order(self, run: Run, model: torch.nn.Module, loss: Any) -> dict[str, Any]:
        from dp_adamw import DPAdamW

        batch, steps = self.plan["expected_batch_size"], self.plan["forward_passes"]
        query = calibrate_query(
            GaussianQuery(noise_multiplier=1.0, sampling_rate=batch / len(self.train)),
            steps=steps,
            target_epsilon=run.epsilon,
            target_delta=self.plan["target_delta"],
        )
        method = DPAdamW(
            **run.settings, noise_multiplier=query.noise_multiplier, expected_batch_size=batch, steps=steps
        )
        method.train(model, self.train, self.collate, loss)
        stated = account(((query, steps),), delta=self.plan["target_delta"])
        return {"steps": steps, "stated_epsilon": stated.epsilon, "pure_epsilon": None}

    @torch.no_grad()
    def accuracy(self, model: torch.nn.Module, loss: Any) -> float:
        """The share of held-out rows whose highest score is that of their class."""
        model.eval()
        right = 0
        for start in range(0, len(self.evaluation), 16):
            inputs = self.collate([self.evaluation[i] for i in range(start, min(start + 16, len(self.evaluation)))])
            right += int((loss.scores(model, inputs).argmax(dim=1) == inputs["labels"]).sum())
        return right / len(self.evaluation)


def run_all(plan: dict[str, Any], part: int, parts: int) -> None:
    """Do the runs of one part that have no result yet."""
    RUNS.mkdir(exist_ok=True)
    study = Study(plan)
    for number, run in enumerate(study.runs()):
        if number % parts == part and not run.file.exists():
            result = study.result(run)
            run.file.write_text(json.dumps(result) + "\n", encoding="utf-8")
            sys.stdout.write(f"{result}\n")
            sys.stdout.flush()


def report(plan: dict[str, Any]) -> str:
    """Write the table and the picture, and return means over seeds as a Markdown table."""
    rows = sorted((json.loads(path.read_text()) for path in RUNS.glob("*.json")), key=lambda row: str(row))
    if not rows:
        raise SystemExit("runs: there are none yet; python benchmarks/study/study.py run makes them.")
    with TABLE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    _draw(plan, rows)
    lines = ["| contender | " + " | ".join(f"ε = {epsilon}" for epsilon in plan["epsilons"]) + " |"]
    lines.append("|---" * (len(plan["epsilons"]) + 1) + "|")
    for name in plan["contenders"]:
        lines.append("| " + " | ".join([name, *(_cell(rows, name, epsilon) for epsilon in plan["epsilons"])]) + " |")
    lines += [f"\nWithout privacy: {name} {_cell(rows, name, None)}." for name in (*plan["baselines"], "untouched")]
    return "\n".join(lines) + "\n"


def _accuracies(rows: list[dict[str, Any]], name: str, epsilon: float | None) -> list[float]:
    return [row["accuracy"] for row in rows if row["contender"] == name and row["epsilon"] == epsilon]


def _cell(rows: list[dict[str, Any]], name: str, epsilon: float | None) -> str:
    values = _accuracies(rows, name, epsilon)
    if not values:
        return "-"
    return f"{statistics.mean(values):.3f} ({', '.join(f'{value:.3f}' for value in sorted(values))})"


def _draw(plan: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for number, name in enumerate(plan["contenders"]):
        found = {e: values for e in plan["epsilons"] if (values := _accuracies(rows, name, e))}
        shift = 1.03 ** (number - len(plan["contenders"]) / 2)  # So that the bars stand side by side.
        means = [statistics.mean(values) for values in found.values()]
        low, high = ([abs(mean - end(v)) for mean, v in zip(means, found.values(), strict=True)] for end in (min, max))
        style = {"marker": "o", "capsize": 2, "linewidth": 1, "markersize": 4}
        style["linestyle"] = "--" if name == FIRST_ORDER else "-"
        axes.errorbar([e * shift for e in found], means, yerr=[low, high], label=name, **style)
    for name, style in (*((name, "-.") for name in plan["baselines"]), ("untouched", ":")):
        if values := _accuracies(rows, name, None):
            axes.axhline(statistics.mean(values), color="black", linestyle=style, linewidth=1, label=name)
    axes.set(xscale="log", xlabel="epsilon", ylabel=f"accuracy on {plan['eval_rows']} held-out rows")
    axes.set_xticks(plan["epsilons"], [str(epsilon) for epsilon in plan["epsilons"]])
    axes.minorticks_off()
    figure.legend(fontsize=8, loc="outside right center")
    figure.savefig(PICTURE, dpi=150)


def main() -> None:
    """Run, or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--part", default="0/1", help="which part of the runs, such as 0/2")
    arguments = parser.parse_args()
    plan = yaml.safe_load((HERE / "study.yaml").read_text(encoding="utf-8"))
    if arguments.command == "run":
        run_all(plan, *(int(number) for number in arguments.part.split("/")))
    else:
        sys.stdout.write(report(plan))


if __name__ == "__main__":
    main()
