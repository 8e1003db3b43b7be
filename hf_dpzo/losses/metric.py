"""A metric of each row as its loss, though a metric has no gradient."""

import collections
import math
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from hf_dpzo.losses.generation import Generation
from hf_dpzo.losses.heads import build_head_loss
from hf_dpzo.losses.objective import TextObjective
from hf_dpzo.losses.output_layer import IGNORE_INDEX
from hf_dpzo.losses.per_example import PerExampleLoss
from hf_dpzo.models.unwrap import Inputs, is_decoder, unwrap_model


RowMetric = Callable[[Any, Any], float]


def exact_match(prediction: Any, reference: Any) -> float:
    """Return 1 if `prediction` is `reference`, and 0 if not. Of texts, only the words count (Rajpurkar et al. 2016).

    Args:
        prediction: a text, a class, or a sequence of classes.
        reference: the same; of several texts, one must be met.

    >>> exact_match(" The cat.", "cat"), exact_match([1, 2], [1, 3]), exact_match("b", ["a", "b"])
    (1.0, 0.0, 1.0)
    """
    return max(float(_split_words(prediction) == _split_words(one)) for one in _list_references(prediction, reference))


def token_f1(prediction: Any, reference: Any) -> float:
    """Return the F1 of the words, or of the classes, that `prediction` and `reference` share (Rajpurkar et al. 2016).

    Args:
        prediction: a text, a class, or a sequence of classes.
        reference: the same; of several texts, the best one counts.

    >>> token_f1("a small cat", "the cat"), token_f1("dog", "the cat")
    (0.6666666666666666, 0.0)
    """
    return max(_f1(_split_words(prediction), _split_words(one)) for one in _list_references(prediction, reference))


def accuracy(prediction: Any, reference: Any) -> float:
    """Return the share of a row's classes that are right; of two texts, whether they are equal.

    Args:
        prediction: a class, or a sequence of classes.
        reference: the same.

    >>> accuracy([1, 2], [1, 3]), accuracy(4, 4)
    (0.5, 1.0)
    """
    if not isinstance(prediction, list) or not isinstance(reference, list):
        return float(prediction == reference)
    return sum(p == r for p, r in zip(prediction, reference, strict=True)) / max(len(reference), 1)


METRICS: Mapping[str, RowMetric] = {"accuracy": accuracy, "exact_match": exact_match, "token_f1": token_f1}


class MetricLoss(PerExampleLoss):
    """Trains on a metric of each row, of which more is better. The loss of a row is its negative metric.

    The prediction is the class with the highest score: of the row, or of each of its tokens that has a label; or each
    label whose score is positive, if there are several. A model of numbers predicts these, for a function to compare,
    and one of answers the places of an answer's tokens. With `max_new_tokens` it is the text that is generated after
    the prompt, and `MetricLoss` returns a `TextMetricLoss`.

    Args:
        metric: `accuracy`, `exact_match` or `token_f1`; a function `(prediction, reference) -> number` for one row; or
            a metric of `evaluate`, which computes one row at a time in memory.
        loss: the loss whose scores are predicted from; by default that of the model's head.
        max_new_tokens: the number of tokens to generate; `None` to predict from scores.
        reference: with `max_new_tokens`, the column with the reference, a text or several; by default the text of the
            labels.
        key: the entry of what a metric of `evaluate` returns; by default the only one.
        processing_class: with `max_new_tokens`, the model's tokenizer; by default the trainer's.
        max_prompt_length: see `GenerationReward`.
        stop_strings: see `GenerationReward`.

    Raises:
        ValueError: there is no such metric.

    Source: a metric as the objective of a zeroth-order method, as in Malladi et al. 2023 (MeZO).

    >>> class Scores(torch.nn.Module):
    ...     def forward(self, x):
    ...         return x
    >>> from hf_dpzo.losses import ScoreLoss
    >>> class Head(ScoreLoss):
    ...     def scores(self, model, inputs):
    ...         return model(inputs["x"])
    ...     def losses(self, scores, inputs):
    ...         return scores.sum(dim=1)
    >>> inputs = {"x": torch.tensor([[3.0, 1.0], [4.0, 2.0]]), "labels": torch.tensor([0, 1])}
    >>> MetricLoss("accuracy", loss=Head())(Scores(), inputs)
    tensor([-1., -0.])
    """

    is_piecewise_constant = True

    def __new__(cls, metric: Any, **options: Any) -> PerExampleLoss:
        """Return a loss of predicted classes or, with `max_new_tokens`, one of generated text."""
        if options.get("max_new_tokens") is None:
            return super().__new__(cls)
        options.pop("loss", None)
        return TextMetricLoss(metric, **options)

    def __init__(
        self,
        metric: str | RowMetric | Any,
        *,
        loss: PerExampleLoss | None = None,
        max_new_tokens: int | None = None,
        reference: str | None = None,
        key: str | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        max_prompt_length: int | None = None,
        stop_strings: Sequence[str] = (),
    ) -> None:
        self._compute = as_row_metric(metric, key)
        self._loss = loss

    def attach(self, model: torch.nn.Module, tokenizer: Any, progress: Callable[[], Any]) -> None:
        """Choose the head whose scores are predicted from, unless a loss was passed."""
        self._loss = self._loss or build_head_loss(model)
        if _predicts_numbers(model) and self._compute in METRICS.values():
            raise ValueError(
                f"metric={self._compute.__name__}: it compares classes, and this model predicts numbers; pass a "
                "function (prediction, reference) -> number, of which more is better."
            )

    def scores(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """Return the scores of the head, `[batch, ...]`."""
        self._loss = self._loss or build_head_loss(model)
        return self._loss.scores(model, inputs)

    def evaluate(self, model: torch.nn.Module, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the losses, float32 `[batch]`, and the scores of the head; NaN for a row without a label."""
        scores = self.scores(model, inputs)
        if isinstance(scores, tuple):
            return self._measure_answers(scores, inputs), scores
        if _predicts_numbers(model):
            compared = zip(scores.tolist(), inputs["labels"].float().reshape(scores.shape).tolist(), strict=True)
            losses = [-float(self._compute(*map(_unwrap_one, pair))) for pair in compared]
            return torch.tensor(losses, dtype=torch.float32, device=scores.device), scores
        shifts = is_decoder(unwrap_model(model)) and scores.ndim == 3 and inputs["labels"].shape == scores.shape[:2]
        predicted, labels = (scores[:, :-1], inputs["labels"][:, 1:]) if shifts else (scores, inputs["labels"])
        losses = [-self._measure(row, label) for row, label in zip(predicted, labels, strict=True)]
        return torch.tensor(losses, dtype=torch.float32, device=scores.device), scores

    def _measure_answers(self, scores: tuple[torch.Tensor, ...], inputs: Inputs) -> torch.Tensor:
        """Return the losses of answers, `[batch]`, by the places of the first and the last token of each."""
        mask = inputs.get("attention_mask")  # How much padding a row has depends on others.
        own = scores if mask is None else [one.masked_fill(mask == 0, -math.inf) for one in scores]
        starts, ends = (one.argmax(dim=1).tolist() for one in own)
        wanted = zip(inputs["start_positions"].tolist(), inputs["end_positions"].tolist(), strict=True)
        losses = [
            -float(self._compute(list(range(start, end + 1)), list(range(first, last + 1))))
            for start, end, (first, last) in zip(starts, ends, wanted, strict=True)
        ]
        return torch.tensor(losses, dtype=torch.float32, device=scores[0].device)

    def _measure(self, scores: torch.Tensor, label: torch.Tensor) -> float:
        if scores.shape == label.shape:
            return float(self._compute((scores > 0).int().tolist(), label.int().tolist()))
        predicted, is_target = scores.argmax(dim=-1), label != IGNORE_INDEX
        if not is_target.any():
            return math.nan
        if label.ndim == 0:
            return float(self._compute(int(predicted), int(label)))
        return float(self._compute(predicted[is_target].tolist(), label[is_target].tolist()))


def _predicts_numbers(model: torch.nn.Module) -> bool:
    config = getattr(unwrap_model(model), "config", None)
    return getattr(config, "problem_type", None) == "regression" or getattr(config, "num_labels", None) == 1


def _unwrap_one(value: Any) -> Any:
    return value[0] if isinstance(value, list) and len(value) == 1 else value


class TextMetricLoss(TextObjective):
    """Trains on a metric of generated text against a reference. `MetricLoss` with `max_new_tokens` builds one.

    Args:
        metric: see `MetricLoss`.
        max_new_tokens: the number of tokens to generate.
        reference: the column with the reference, a text or several; by default the text of the labels.
        key: the entry of what a metric of `evaluate` returns; by default the only one.
        processing_class: the model's tokenizer; by default the trainer's.
        max_prompt_length: see `GenerationReward`.
        stop_strings: see `GenerationReward`.
    """

    def __init__(
        self,
        metric: str | RowMetric | Any,
        *,
        max_new_tokens: int,
        reference: str | None = None,
        key: str | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        max_prompt_length: int | None = None,
        stop_strings: Sequence[str] = (),
    ) -> None:
        super().__init__(
            Generation(
                tokenizer=processing_class,
                max_new_tokens=max_new_tokens,
                max_prompt_length=max_prompt_length,
                stop_strings=tuple(stop_strings),
            )
        )
        self._compute = as_row_metric(metric, key)
        self._reference = reference

    def score(self, columns: Mapping[str, Any], prompt: Any, completion: Any, tokens: Sequence[int]) -> float:
        """Return the metric of a completion."""
        text = completion if isinstance(completion, str) else completion[0]["content"]
        return float(self._compute(text, self._find_reference(columns)))

    def _find_reference(self, columns: Mapping[str, Any]) -> Any:
        if self._reference is not None:
            return columns[self._reference]
        labels = [int(label) for label in columns["labels"]]
        kept = [label for label in labels if label != IGNORE_INDEX]
        return self._generation.tokenizer.decode(kept, skip_special_tokens=True)


def as_row_metric(metric: Any, key: str | None) -> RowMetric:
    """Return `metric` as a function of one row's prediction and reference.

    Args:
        metric: the name of a metric, a function, or a metric of `evaluate`.
        key: the entry of what a metric of `evaluate` returns; `None` for the only one.

    Raises:
        ValueError: there is no such metric.
    """
    if isinstance(metric, str) and metric in METRICS:
        return METRICS[metric]
    compute = getattr(metric, "compute", None)
    if callable(compute):
        metric.keep_in_memory = True  # Otherwise predictions and references would be written to a file.
        return lambda prediction, reference: _pick(
            compute(predictions=_as_batch(prediction), references=_as_batch(reference)), key
        )
    if not callable(metric):
        raise ValueError(
            f"metric={metric!r}: there is no such metric; choose one of {', '.join(METRICS)}, or pass a function "
            "(prediction, reference) -> number."
        )
    return metric


def _as_batch(value: Any) -> list[Any]:
    """Return the classes of a row's tokens as they are, and anything else as a list of one."""
    return value if isinstance(value, list) and all(isinstance(item, int) for item in value) else [value]


def _pick(result: Mapping[str, Any], key: str | None) -> float:
    if key is None and len(result) != 1:
        raise ValueError(f"key=None: the metric returns {', '.join(result)}; name one of them.")
    return float(result[key] if key is not None else next(iter(result.values())))


def _list_references(prediction: Any, reference: Any) -> list[Any]:
    """Return the references that a text may meet, or the one of a sequence of classes."""
    return list(reference) if isinstance(prediction, str) and not isinstance(reference, str) else [reference]


def _split_words(value: Any) -> list[Any]:
    """Return the words of a text, in lower case, without punctuation and articles; or the classes of a row."""
    if not isinstance(value, str):
        return value if isinstance(value, list) else [value]
    plain = "".join(character for character in value.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _f1(prediction: list[Any], reference: list[Any]) -> float:
    shared = sum((collections.Counter(prediction) & collections.Counter(reference)).values())
    if not prediction or not reference or not shared:
        return float(prediction == reference)
    return 2 * shared / (len(prediction) + len(reference))
