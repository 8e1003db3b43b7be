"""How well the untouched model does by label words, where training begins with a head that knows nothing."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import EvalPrediction, PreTrainedTokenizerBase

from hf_dpzo.models.unwrap import drop_labels
from hf_dpzo.recipe.loading import load_held_out_rows, load_language_model
from hf_dpzo.recipe.recipe import Recipe


def measure_untouched(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, batch_size: int, unit_column: str | None = None
) -> dict[str, float]:
    """Return the metrics of the model that `recipe` names on the evaluation rows, when it continues by label words.

    Nothing is trained, and no head is made: this is what a trained head has to beat.

    Args:
        recipe: a recipe with a word for each class, and evaluation rows.
        tokenizer: the model's tokenizer.
        batch_size: the number of rows that are evaluated at once.
        unit_column: the column of the units of privacy; `None` for rows.

    Raises:
        ValueError: the model has no head that predicts words.
    """
    model = load_language_model(recipe, tokenizer).eval()
    prompted, padded_left = copy.copy(recipe), copy.deepcopy(tokenizer)
    prompted.task, prompted.template = "prompt-classification", recipe.untouched_template or recipe.template
    padded_left.padding_side = "left"
    loss = prompted.prompt.loss(model, padded_left)
    # Those of the recipe itself: other columns, or rows in the place of units, would hold out others.
    rows = load_held_out_rows(recipe, padded_left, encoded_as=prompted, unit_column=unit_column)
    collate = recipe.kind.build_collator(padded_left, model)
    scores, labels = [], []
    with torch.no_grad():
        for batch in rows.iter(batch_size):
            inputs = collate(_list_rows(batch))
            scores.append(loss.scores(model, drop_labels(inputs)).cpu())
            labels.append(inputs["labels"])
    prediction = EvalPrediction(predictions=torch.cat(scores).numpy(), label_ids=torch.cat(labels).numpy())
    return recipe.kind.compute_metrics(prediction)


def _list_rows(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
