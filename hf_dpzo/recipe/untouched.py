"""How well the untouched model does by label words, where training begins with a head that knows nothing."""

import copy
from collections.abc import Mapping
from typing import Any

import datasets
import torch
from transformers import EvalPrediction, PreTrainedTokenizerBase

from hf_dpzo.models.unwrap import drop_labels
from hf_dpzo.recipe.loading import load_language_model
from hf_dpzo.recipe.recipe import Recipe


def measure_untouched(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, rows: datasets.Dataset, *, batch_size: int
) -> dict[str, float]:
    """Return the metrics of the model that `recipe` names on `rows`, when it continues the template by label words.

    Nothing is trained, and no head is made: this is what a trained head has to beat.

    Args:
        recipe: a recipe with a word for each class.
        tokenizer: the model's tokenizer.
        rows: encoded evaluation rows with labels.
        batch_size: the number of rows that are evaluated at once.

    Raises:
        ValueError: the model has no head that predicts words.
    """
    model = load_language_model(recipe, tokenizer).eval()
    padded_left = copy.deepcopy(tokenizer)
    padded_left.padding_side = "left"
    loss = recipe.prompt.loss(model, padded_left)
    collate = recipe.kind.build_collator(padded_left, model)
    scores, labels = [], []
    with torch.no_grad():
        for batch in rows.with_format(None).iter(batch_size):
            inputs = collate(_list_rows(batch))
            scores.append(loss.scores(model, drop_labels(inputs)).cpu())
            labels.append(inputs["labels"])
    prediction = EvalPrediction(predictions=torch.cat(scores).numpy(), label_ids=torch.cat(labels).numpy())
    return recipe.kind.compute_metrics(prediction)


def _list_rows(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
