"""Measures what training on exact match gains, next to training on cross-entropy, and to no training.

    python benchmarks/exact_match.py --seeds 3

Each run is the recipe `exact_match.yaml` with another seed of directions and adapter; noise and batches are always new.
Runs on cross-entropy have the same rows, steps and epsilon, and learn the label words after the prompt. All are
measured by the exact match of generated text on the same held-out rows.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from shared import table

from hf_dpzo import ZOTrainer
from hf_dpzo.recipe.loading import load_rows, load_tokenizer
from hf_dpzo.recipe.recipe import read_recipe
from hf_dpzo.recipe.run import build_trainer


RECIPE = Path(__file__).parents[1] / "recipes" / "exact_match.yaml"


# What makes the recipe one of label words. With a space in front, a word is one token.
CROSS_ENTROPY = ["--task", "prompt-classification", "--label_words", '{"0": " negative", "1": " positive"}']


def main() -> None:
    """Train with each objective and seed, and show a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=300, help="held-out rows to measure with")
    parser.add_argument("--objectives", nargs="+", default=["exact_match", "cross_entropy"])
    options, flags = parser.parse_known_args()
    lines = []
    for objective in options.objectives:
        seeds = range(options.first_seed, options.first_seed + options.seeds)
        runs = [measure(objective, seed, options.rows, flags) for seed in seeds]
        before, after, seconds = (list(column) for column in zip(*runs, strict=True))
        lines.append([objective, _show(before), _show(after), _show(seconds, digits=0)])
    sys.stdout.write("\n".join([*table(["trained on", "exact match before", "after", "seconds"], lines), ""]))


def measure(objective: str, seed: int, rows: int, flags: list[str]) -> tuple[float, float, float]:
    """Return the exact match before and after a run, and the seconds that training took."""
    with tempfile.TemporaryDirectory() as folder:
        common = [*flags, "--seed", str(seed), "--output_dir", folder, "--disable_tqdm", "true"]
        trainer = build_trainer(
            *read_recipe(RECIPE, [*common, *(CROSS_ENTROPY if objective == "cross_entropy" else [])])
        )
        judge = _build_judge(trainer, common, rows)
        before = judge.evaluate()["eval_reward"]
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        after = judge.evaluate()["eval_reward"]
    sys.stderr.write(f"{objective}, seed {seed}: {before:.3f} to {after:.3f}, {seconds:.0f} s\n")
    return before, after, seconds


def _build_judge(trainer: ZOTrainer, flags: list[str], rows: int) -> ZOTrainer:
    """Return a trainer that measures the exact match of the model of `trainer`, and never trains."""
    recipe, args = read_recipe(RECIPE, [*flags, "--output_dir", str(Path(trainer.args.output_dir) / "judge")])
    tokenizer = load_tokenizer(recipe)
    _, evaluation = load_rows(recipe, tokenizer)
    return ZOTrainer(
        model=trainer.model,
        args=args,
        eval_dataset=evaluation.shuffle(seed=0).select(range(rows)),
        processing_class=tokenizer,
        per_example_loss=recipe.kind.build_loss(recipe, trainer.model, tokenizer),
    )


def _show(values: list[float], digits: int = 3) -> str:
    spread = f" (s {statistics.stdev(values):.{digits}f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


if __name__ == "__main__":
    main()
