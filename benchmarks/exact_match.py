"""Measures what private training on exact match gains: text that is generated, and no gradient anywhere.

    python benchmarks/exact_match.py --seeds 5
    python benchmarks/exact_match.py --seeds 3 --methods mezo
    python benchmarks/exact_match.py --seeds 3 --target_epsilon 0.5

Each run is the recipe `exact_match.yaml` with another seed of directions and adapter; noise and batches are always
new. With `mezo`, it is the same run, with as many rows and passes, but nothing is clipped and no noise is added. Flags
replace fields of the recipe. The texts are those that the model generates for the rows that the recipe holds out.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from shared import show_mean, table

from hf_dpzo import ZOTrainer
from hf_dpzo.losses.metric import exact_match
from hf_dpzo.recipe.recipe import Recipe, read_recipe
from hf_dpzo.recipe.run import build_trainer
from hf_dpzo.recipe.tasks.generation import REFERENCE


RECIPE = Path(__file__).parents[1] / "recipes" / "exact_match.yaml"


# What makes the recipe one of each method.
FLAGS = {"aggzo": [], "mezo": ["--method", "mezo", "--without", "clip_norm,target_epsilon,target_delta"]}


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a model generates for held-out rows.

    Args:
        right: the share of texts that are the word of the row's class.
        in_form: the share of texts that are the word of any class.
    """

    right: float
    in_form: float

    @property
    def right_in_form(self) -> float:
        """The share of right ones among the texts that are the word of a class."""
        return self.right / self.in_form if self.in_form else 0.0


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run.

    Args:
        method: the method.
        seed: the seed of directions and adapter.
        answers: what the trained model generates.
        seconds: the time that training took, with all checks before the first step.
        cpu_seconds: the same in time of the CPU, all threads together.
    """

    method: str
    seed: int
    answers: Answers
    seconds: float
    cpu_seconds: float


def main() -> None:
    """Train by each method with each seed, and show a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", default=["aggzo"], choices=[*FLAGS])
    options, flags = parser.parse_known_args()
    lines = [_line("untouched", [measure("untouched", options.first_seed, flags)])]
    for method in options.methods:
        seeds = range(options.first_seed, options.first_seed + options.seeds)
        lines.append(_line(method, [measure(method, seed, flags) for seed in seeds]))
    titles = ["", "exact match", "in the form of an answer", "right among these", "seconds", "seconds of CPU"]
    sys.stdout.write("\n".join([*table(titles, lines), ""]))


def measure(method: str, seed: int, flags: Sequence[str]) -> Run:
    """Train with `seed`, and return what the model then generates."""
    with tempfile.TemporaryDirectory() as folder:
        common = [*flags, "--seed", str(seed), "--output_dir", folder, "--disable_tqdm", "true", *FLAGS.get(method, [])]
        recipe, args = read_recipe(RECIPE, common)
        trainer = build_trainer(recipe, args)
        started = time.perf_counter(), time.process_time()
        if method != "untouched":
            trainer.train()
        ended = time.perf_counter(), time.process_time()
        seconds, cpu_seconds = (end - start for start, end in zip(started, ended, strict=True))
        answers = answer(trainer, recipe)
    run = Run(method=method, seed=seed, answers=answers, seconds=seconds, cpu_seconds=cpu_seconds)
    sys.stderr.write(f"{json.dumps(asdict(run))}\n")
    del trainer
    gc.collect()  # Of the rows that are kept in memory.
    return run


def answer(trainer: ZOTrainer, recipe: Recipe) -> Answers:
    """Return what the model of `trainer` generates for the rows that are held out."""
    tokens = trainer.predict(trainer.eval_dataset).predictions
    texts = trainer.processing_class.batch_decode(tokens, skip_special_tokens=True)
    matches = [
        (exact_match(text, reference), exact_match(text, recipe.words))
        for text, reference in zip(texts, trainer.eval_dataset[REFERENCE], strict=True)
    ]
    right, in_form = (statistics.mean(column) for column in zip(*matches, strict=True))
    return Answers(right=right, in_form=in_form)


def _line(name: str, runs: Sequence[Run]) -> list[str]:
    shares = [(run.answers.right, run.answers.in_form, run.answers.right_in_form) for run in runs]
    times = [(run.seconds, run.cpu_seconds) for run in runs]
    shown = [show_mean(column) for column in zip(*shares, strict=True)]
    return [name, *shown, *(show_mean(column, 0) for column in zip(*times, strict=True))]


if __name__ == "__main__":
    main()
