"""What several measurements share: the model and the rows of lora.yaml, and tables in Markdown."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hf_dpzo import ZOTrainingArguments
from hf_dpzo.losses.per_example import PerExampleLoss
from hf_dpzo.recipe.loading import load_model, load_rows, load_tokenizer
from hf_dpzo.recipe.recipe import Recipe, read_recipe


LORA_RECIPE = Path(__file__).parent / "lora.yaml"


@dataclass(frozen=True, kw_only=True)
class LoraRun:
    """The recipe lora.yaml, and what it names.

    Args:
        recipe: the model, the adapter and the prompt.
        args: the training arguments.
        tokenizer: the model's tokenizer.
        train: the encoded training rows.
        evaluation: the encoded rows that are held out.
    """

    recipe: Recipe
    args: ZOTrainingArguments
    tokenizer: PreTrainedTokenizerBase
    train: Dataset
    evaluation: Dataset

    @classmethod
    def load(cls, *flags: str) -> "LoraRun":
        """Read the recipe, in which `flags` such as `--max_length 32` replace values, and encode its rows."""
        recipe, args = read_recipe(LORA_RECIPE, flags)
        tokenizer = load_tokenizer(recipe)
        train, evaluation = load_rows(recipe, tokenizer)
        return cls(recipe=recipe, args=args, tokenizer=tokenizer, train=train, evaluation=evaluation)

    def model(self) -> torch.nn.Module:
        """Load the model anew, in evaluation mode."""
        return load_model(self.recipe, self.tokenizer, seed=self.args.seed).eval()

    def loss(self, model: torch.nn.Module) -> PerExampleLoss:
        """Return the loss of label words after the recipe's prompt."""
        return self.recipe.prompt.loss(model, self.tokenizer)


def row(cells: Iterable[str]) -> str:
    """Return one line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def table(titles: Sequence[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [row(titles), "|---" * len(titles) + "|", *map(row, rows)]


def show_mean(values: Sequence[float], digits: int = 3) -> str:
    """Return the mean, and beside it the standard deviation of several values."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"
