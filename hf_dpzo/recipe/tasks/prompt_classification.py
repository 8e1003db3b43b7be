"""Classes that are predicted by label words after or within a prompt."""

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import TaskType
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, DataCollatorWithPadding, PreTrainedTokenizerBase

from hf_dpzo.data.cells import to_text
from hf_dpzo.losses.calibration import MAX_TEXTS
from hf_dpzo.losses.per_example import PerExampleLoss
from hf_dpzo.models.location import resolve_path
from hf_dpzo.models.public_texts import PUBLIC_TEXTS
from hf_dpzo.recipe.defaults import MOST_NOISE_OF_ADAPTERS, TrainingDefaults
from hf_dpzo.recipe.tasks.labels import find_class, require_classes
from hf_dpzo.recipe.tasks.metrics import compute_accuracy
from hf_dpzo.recipe.tasks.task import Need, Row, Task
from hf_dpzo.recipe.written import TEXT_SUFFIXES, TextFile, UnreadableFileError, find_suffix


if TYPE_CHECKING:
    from hf_dpzo.recipe.recipe import Recipe


# Measured on sentences of reviews with a pretrained causal model of 135 million parameters.
ADAPTER_DEFAULTS = {
    "lora": TrainingDefaults(
        expected_batch_size=16,
        clip=2.0,
        smoothing=1e-2,
        learning_rate=1e-2,
        most_noise=MOST_NOISE_OF_ADAPTERS,
        max_steps=150,
    ),
    # Its points are cheap, so that few rows along several directions learn most in a time. Most rows are clipped, so
    # that steps hardly depend on how steep a model's loss is.
    "activated-lora": TrainingDefaults(
        method="aggzo",
        expected_batch_size=32,
        num_directions=32,
        clip=0.09,
        smoothing=3e-2,
        learning_rate=3.0,
        most_noise=MOST_NOISE_OF_ADAPTERS,
        max_steps=40,
    ),
}


# The name of this package's own texts.
BUILTIN = "builtin"


class PromptClassification(Task):
    """Scores each class by its word: at the mask of a masked language model, or after a causal one's prompt."""

    metric, metric_name = "eval_accuracy", "accuracy"
    compute_metrics = staticmethod(compute_accuracy)

    def check(self, recipe: "Recipe") -> None:
        """Raise `ValueError` unless there is a word for each of two classes or more."""
        require_classes(recipe)
        if len(recipe.words) != len(recipe.labels):
            raise ValueError("label_words: missing; prompt-classification needs a word for each class, {class: word}.")
        _ = recipe.prompt  # It checks itself.

    def defaults(self, recipe: "Recipe") -> TrainingDefaults:
        """Return what suits an adapter; stock's for all parameters."""
        return ADAPTER_DEFAULTS.get(recipe.adapter, TrainingDefaults())

    def auto_class(self, recipe: "Recipe") -> type:
        """Return the class for the kind of prompt."""
        return AutoModelForMaskedLM if recipe.fills_mask else AutoModelForCausalLM

    def peft_type(self, recipe: "Recipe") -> TaskType | None:
        """Return the kind of a causal language model, or none."""
        return None if recipe.fills_mask else TaskType.CAUSAL_LM

    def padding_side(self, recipe: "Recipe") -> str:
        """Return the side away from the label word."""
        return "right" if recipe.fills_mask else "left"

    def needs(self, recipe: "Recipe") -> list[Need]:
        """Return the columns of the template, and that of the class."""
        return [recipe.prompt.fields, (recipe.label_column,)]

    def encode(self, row: Row, recipe: "Recipe", tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return the prompt's tokens and the class."""
        label = find_class(row[recipe.label_column], recipe, recipe.label_column)
        return {**self.encode_input(row, recipe, tokenizer), "labels": label}

    def input_columns(self, recipe: "Recipe") -> list[str]:
        """Return the columns of the template."""
        return [*recipe.prompt.fields]

    def encode_input(self, row: Row, recipe: "Recipe", tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return the prompt's tokens."""
        return recipe.prompt.encode(row, tokenizer, recipe.max_length)

    def build_collator(self, tokenizer: PreTrainedTokenizerBase, model: torch.nn.Module) -> Callable:
        """Return a collator that pads."""
        return DataCollatorWithPadding(tokenizer)

    def build_loss(
        self, recipe: "Recipe", model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase
    ) -> PerExampleLoss | None:
        """Return the loss that scores label words."""
        texts = None if recipe.calibrate_on is None else read_public_texts(recipe.calibrate_on, recipe.prompt.fields)
        return recipe.prompt.loss(model, tokenizer, calibrate_on=texts, max_length=recipe.max_length)


def read_public_texts(name: str, columns: Sequence[str]) -> Sequence[str | Mapping[str, str]]:
    """Return public texts: those of this package, or of a file, as rows of `columns` if it has these.

    Raises:
        ValueError: there is no such file, or it has neither these columns nor a single one.
    """
    if name == BUILTIN:
        return PUBLIC_TEXTS
    path = Path(resolve_path(name))
    if not path.is_file() or find_suffix(path) not in TEXT_SUFFIXES:
        raise ValueError(
            f"calibrate_on={name}: there is no such file; name {BUILTIN}, or texts ({', '.join(TEXT_SUFFIXES)})."
        )
    try:
        file = TextFile(path=path)
        rows, names = [*islice(file.rows(), MAX_TEXTS)], file.names()
    except UnreadableFileError as error:
        raise ValueError(str(error).replace("data=", "calibrate_on=", 1)) from None
    if {*columns} <= {*names}:
        return [{column: to_text(row.get(column) or "", column) for column in columns} for row in rows]
    text = "text" if "text" in names else names[0]
    if text != "text" and len(names) > 1:
        raise ValueError(
            f"calibrate_on={name}: it has the columns {', '.join(names)}; name those of the template, or one column "
            "text."
        )
    return [to_text(row[text], text) for row in rows if row.get(text)]


def refuse_uncalibrated(recipe: "Recipe") -> None:
    """Raise `ValueError` for a recipe that asks for calibrated label words and scores none."""
    if recipe.calibrate_on is not None and not isinstance(recipe.kind, PromptClassification):
        raise ValueError(
            f"calibrate_on={recipe.calibrate_on}: only prompt-classification scores words; set task, or remove it."
        )
