"""Metrics of evaluations, from scores and labels."""

import numpy as np
from transformers import EvalPrediction

from hf_dpzo.losses.per_example import IGNORE_INDEX


def compute_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return the share of rows whose highest score is that of their class.

    >>> compute_accuracy(EvalPrediction(predictions=np.array([[0.1, 0.9], [0.8, 0.2]]), label_ids=np.array([1, 1])))
    {'accuracy': 0.5}
    """
    return {"accuracy": float((np.argmax(prediction.predictions, axis=-1) == prediction.label_ids).mean())}


def compute_token_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return the share of labelled tokens whose highest score is that of their class.

    >>> scores = np.array([[[0.1, 0.9], [0.8, 0.2], [0.5, 0.5]]])
    >>> compute_token_accuracy(EvalPrediction(predictions=scores, label_ids=np.array([[1, 1, -100]])))
    {'accuracy': 0.5}
    """
    labelled = prediction.label_ids != IGNORE_INDEX
    right = np.argmax(prediction.predictions, axis=-1) == prediction.label_ids
    return {"accuracy": float(right[labelled].mean())}


def compute_micro_f1(prediction: EvalPrediction) -> dict[str, float]:
    """Return F1 of all labels of all rows together; a positive score means that a row has the label.

    >>> compute_micro_f1(EvalPrediction(predictions=np.array([[2.0, -1.0]]), label_ids=np.array([[1.0, 1.0]])))
    {'f1': 0.6666666666666666}
    """
    said, true = prediction.predictions > 0, prediction.label_ids > 0.5
    hits = float((said & true).sum())
    return {"f1": 2 * hits / max(1.0, float(said.sum() + true.sum()))}
