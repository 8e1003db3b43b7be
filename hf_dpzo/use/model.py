"""A trained model that answers rows, as its recipe says."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from hf_dpzo.data.cells import is_missing
from hf_dpzo.losses.calibration import Calibration
from hf_dpzo.losses.generation import Generation
from hf_dpzo.losses.heads import build_head_loss
from hf_dpzo.losses.per_example import PerExampleLoss
from hf_dpzo.models.unwrap import drop_labels
from hf_dpzo.recipe.recipe import Recipe
from hf_dpzo.use.answers import Answer, AskedBatch, read_answers
from hf_dpzo.use.evaluation import evaluate_rows


Row = str | Mapping[str, Any]
Rows = Row | Iterable[Row] | pd.DataFrame


DEFAULT_BATCH_SIZE = 16


DEFAULT_NEW_TOKENS = 64


class TrainedModel:
    """A trained model with what it needs to answer. `hf_dpzo.load` returns one.

    The same row gives the same answer as in the run's own evaluation: template, label words, offsets, truncation and
    padding are those of its recipe.

    Args:
        model: the model, with its adapter if it has one.
        tokenizer: its tokenizer.
        recipe: the recipe of its run; `None` if none was kept, in which case it answers nothing by itself.
        calibration: what its log says is taken off the scores of label words; `None` for nothing.
        name: the folder or the repository, for messages.
    """

    def __init__(
        self,
        *,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        recipe: Recipe | None,
        calibration: Mapping[str, Any] | None = None,
        name: str = "model",
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.recipe = recipe
        self._calibration = calibration
        self._name = name

    @torch.no_grad()
    def predict(self, rows: Rows, *, batch_size: int = DEFAULT_BATCH_SIZE) -> Any:
        """Return the answer to each row, in their order, or the answer to a single row.

        Args:
            rows: rows, as mappings from columns to values, a `datasets.Dataset` or a data frame; or texts, if the model
                reads one column.
            batch_size: the number of rows that are computed at once.

        Returns:
            a dictionary for each row. One class has `label`, as the data write it, `score` and `scores`, which are
            probabilities. Several have `labels` and `scores`. Words have `labels` and `scores`, one for each word. A
            number is `number`, several are `numbers` by column. An answer in a text has `text` and `score`, and what is
            written has `text`. A row without text has `None`.

        Raises:
            ValueError: the model has no recipe, or a row has not the columns that it reads.
        """
        recipe = self._require_recipe()
        if isinstance(rows, str | Mapping):
            return self.predict([rows], batch_size=batch_size)[0]
        if recipe.kind.writes:
            return [
                None if text is None else {"text": text}
                for text in self.generate(rows, max_new_tokens=self._default_tokens, batch_size=batch_size)
            ]
        loss, read = self._build_loss(recipe), [self._read_row(row) for row in list_rows(rows)]
        answers: list[Answer | None] = [None] * len(read)
        for places, inputs in self._batch(read, batch_size):
            scores = loss.scores(self.model, drop_labels(inputs))
            asked = [read[place] for place in places]
            batch = AskedBatch(rows=asked, inputs=inputs, recipe=recipe, tokenizer=self.tokenizer)
            for place, answer in zip(places, read_answers(scores, batch), strict=True):
                answers[place] = answer
        return answers

    @torch.no_grad()
    def generate(
        self,
        rows: Rows,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
    ) -> Any:
        """Return what the model writes after each row, or after a single row, as texts.

        Args:
            rows: rows, or texts, as for `predict`. A text is one user's message for a model that was trained on chats.
            max_new_tokens: the most tokens that are written; by default those of the recipe, or 64.
            temperature: the temperature to sample at; by default the most probable token is taken.
            batch_size: the number of rows that are computed at once.

        Raises:
            ValueError: the model has no recipe or writes nothing, or a row has not the columns that it reads.
        """
        recipe = self._require_recipe()
        if isinstance(rows, str | Mapping):
            options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "batch_size": batch_size}
            return self.generate([rows], **options)[0]
        if not recipe.kind.writes:
            raise ValueError(f"task={recipe.task}: {self._name} classifies, and writes no text; use predict.")
        generation = Generation(
            tokenizer=self.tokenizer,
            max_new_tokens=max_new_tokens or self._default_tokens,
            stop_strings=tuple(recipe.stop_strings or ()),
            ends_early=True,
            temperature=temperature,
        )
        read = [self._read_row(row) for row in list_rows(rows)]
        texts: list[str | None] = [None] * len(read)
        for places, inputs in self._batch(read, batch_size):
            tokens = generation.generate(self.model, inputs)
            for place, completion in zip(places, generation.split_completions(self.model, tokens), strict=True):
                texts[place] = generation.decode(completion)
        return texts

    def evaluate(self, rows: Any, *, batch_size: int = DEFAULT_BATCH_SIZE) -> dict[str, float]:
        """Return the metrics of labelled rows, as the run itself computes them.

        They are computed without noise, and what is done with them is not covered by the model's guarantee.

        Args:
            rows: the path of a file of rows, a `datasets.Dataset`, or rows as mappings, with their labels.
            batch_size: the number of rows that are computed at once.

        Returns:
            the metrics of the task, the mean `loss`, and the number of `rows` that count.

        Raises:
            ValueError: the model has no recipe, or the rows can not be read.
        """
        return evaluate_rows(
            rows,
            model=self.model,
            tokenizer=self.tokenizer,
            recipe=self._require_recipe(),
            loss=self._build_loss(self.recipe),
            batch_size=batch_size,
        )

    @property
    def _default_tokens(self) -> int:
        return self.recipe.max_new_tokens if self.recipe.task == "generation" else DEFAULT_NEW_TOKENS

    def _require_recipe(self) -> Recipe:
        if self.recipe is None:
            raise build_missing_recipe(self._name)
        return self.recipe

    def _build_loss(self, recipe: Recipe) -> PerExampleLoss:
        """Return the loss that was trained, whose scores are the answers."""
        loss = recipe.kind.build_loss(recipe, self.model, self.tokenizer) or build_head_loss(self.model)
        if self._calibration is not None:
            loss.calibration = Calibration.from_description(self._calibration)
        return loss

    def _read_row(self, row: Row) -> Mapping[str, Any] | None:
        """Return a row with the columns that the model reads; `None` for one in which nothing is asked."""
        recipe, columns = self.recipe, self.recipe.kind.input_columns(self.recipe)
        if isinstance(row, str):
            if len(columns) != 1:
                raise ValueError(f"rows: the model reads {', '.join(columns)}; pass mappings of these, not texts.")
            row = {columns[0]: row}
        missing = next((name for name in columns if name not in row), None)
        if missing is not None:
            raise ValueError(
                f"column={missing}: a row has no such column; the model reads {', '.join(columns)}, so pass rows with "
                "that."
            )
        needs = [need for need in recipe.kind.needs(recipe) if {*need} <= {*columns}]
        if not all(any(not is_missing(row[name]) and row[name] not in ("", []) for name in need) for need in needs):
            return None
        return recipe.kind.ask(row, recipe)

    def _batch(
        self, rows: Sequence[Mapping[str, Any] | None], batch_size: int
    ) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """Yield batches of rows of about one length: their places among `rows`, and the inputs of the model."""
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: a batch needs a row; raise it.")
        kind, device = self.recipe.kind, next(self.model.parameters()).device
        encoded = {
            place: kind.encode_input(row, self.recipe, self.tokenizer)
            for place, row in enumerate(rows)
            if row is not None
        }
        order = sorted(encoded, key=lambda place: len(encoded[place]["input_ids"]))
        collate = kind.build_collator(self.tokenizer, self.model)
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            inputs = collate([encoded[place] for place in places])
            # A collator of responses has no labels to give.
            yield places, {name: value.to(device) for name, value in inputs.items() if value is not None}


def build_missing_recipe(name: str) -> ValueError:
    """Return the error of a model, a folder or a repository, that keeps no recipe."""
    return ValueError(
        f"recipe: {name} keeps none, because Python code or an earlier version trained it; pass the YAML file of the "
        "recipe that did, as recipe (--recipe), or call the model yourself."
    )


def list_rows(rows: Rows) -> list[Row]:
    """Return rows one by one; those of a data frame as mappings, since it lists the names of its columns itself.

    >>> list_rows(pd.DataFrame({"text": ["a", "b"]}))
    [{'text': 'a'}, {'text': 'b'}]
    """
    return rows.to_dict("records") if isinstance(rows, pd.DataFrame) else list(rows)
