"""What the losses of generated text are built from: rows whose columns reach the loss, and rows that fail alone."""

import inspect
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from hf_dpzo.data.sealed import is_sealed
from hf_dpzo.losses.generation import Generation
from hf_dpzo.losses.per_example import PerExampleLoss
from hf_dpzo.models.unwrap import Inputs, class_name, unwrap_model


# The columns of a row under this name in a micro-batch: a list with one mapping for each row.
COLUMNS = "columns"


# The tokens of each row's prompt, where `input_ids` may be the last of them: a list for each row.
PROMPTS = "prompt_tokens"


# What a model is not given while it generates: what it would compute a loss from, and what is computed anew.
_NOT_PROMPTS = frozenset(
    {"labels", "label", "label_ids", "position_ids", "decoder_input_ids", "decoder_attention_mask"}
)


class TextObjective(PerExampleLoss):
    """A loss of generated text: each row's prompt is continued greedily, and the completion is scored.

    The columns of a row reach the score as they are in the data set. A row of which the score fails has the loss NaN
    while private rows are evaluated, and so counts as zero; on public rows the error is raised. `attach` is called by
    the trainer.

    Args:
        generation: how prompts are continued.
    """

    is_piecewise_constant = True
    can_continue = True
    reads_end = True

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self.progress: Callable[[], Any] = lambda: None
        # Adds the tokens of its prompt to a row.
        self.encode = partial(generation.encode, is_encoder_decoder=False)

    @abstractmethod
    def score(self, columns: Mapping[str, Any], prompt: Any, completion: Any, tokens: Sequence[int]) -> float:
        """Return the score of one row, of which more is better; NaN if there is none.

        Args:
            columns: the row's columns.
            prompt: the prompt: a text, or a list of messages.
            completion: the completion: a text, or a list of one message if the prompt consists of messages.
            tokens: the completion's tokens.
        """

    def attach(self, model: torch.nn.Module, tokenizer: Any, progress: Callable[[], Any]) -> None:
        """Take the trainer's tokenizer unless the objective has one. See `PerExampleLoss.attach`.

        Raises:
            ValueError: the model cannot generate, or no tokenizer was passed.
        """
        base = unwrap_model(model)
        if not getattr(base, "can_generate", lambda: False)():
            raise ValueError(
                f"model={class_name(base)}: it generates no text; pass a causal language model, or an encoder with a "
                "decoder, or use MetricLoss without max_new_tokens."
            )
        if self._generation.tokenizer is None:
            self._generation = replace(self._generation, tokenizer=getattr(tokenizer, "tokenizer", tokenizer))
        if not isinstance(self._generation.tokenizer, PreTrainedTokenizerBase):
            raise ValueError("processing_class=None: generated text needs a tokenizer; pass it to the trainer.")
        self.progress = progress
        self.encode = partial(self._generation.encode, is_encoder_decoder=base.config.is_encoder_decoder)

    def scores(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """Return the tokens of each completion, `[batch, max_new_tokens]`, padded after the end token."""
        prompts = {name: value for name, value in inputs.items() if name not in (COLUMNS, PROMPTS)}
        # Behind a prefix, of which the caller takes care, there is no padding.
        is_whole = inputs["input_ids"].shape[1] >= max(map(len, _find_prompts(inputs)))
        return self._generation.generate(model, prompts, is_whole=is_whole)

    def evaluate(self, model: torch.nn.Module, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the losses, float32 `[batch]`, which are the negative scores, and the tokens of the completions."""
        tokens = self.scores(model, inputs)
        completions = self._generation.split_completions(model, tokens)
        rows = zip(inputs[COLUMNS], _find_prompts(inputs), completions, strict=True)
        losses = [-self._score_row(*row) for row in rows]
        return torch.tensor(losses, dtype=torch.float32, device=tokens.device), tokens

    def _score_row(self, columns: Mapping[str, Any], prompt_tokens: list[int], tokens: list[int]) -> float:
        try:
            return self._score_completion(columns, prompt_tokens, tokens)
        except Exception:
            if not is_sealed():
                raise
            return math.nan

    def _score_completion(self, columns: Mapping[str, Any], prompt_tokens: list[int], tokens: list[int]) -> float:
        text = self._generation.decode(tokens)
        if "prompt" in columns:
            prompt = columns["prompt"]
        else:
            prompt = self._generation.tokenizer.decode(prompt_tokens, skip_special_tokens=True)
        completion = text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        return float(self.score(columns, prompt, completion, tokens))


class EncodedRows(Dataset):
    """Rows with the tokens of their prompts, which are computed when a row is fetched.

    Args:
        rows: the rows.
        encode: a function from a row to the row with tokens.
    """

    def __init__(self, rows: Any, encode: Callable[[Mapping[str, Any]], dict[str, Any]]) -> None:
        self._rows = rows
        self._encode = encode

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._encode(self._rows[index])


class ColumnsCollator:
    """Collates the prompts of rows, and passes their columns on as they are, under `COLUMNS`.

    Args:
        encode: a function from a row to the row with the tokens of its prompt.
        model: the model, which says what it takes.
        collate: a collator of `input_ids` and `attention_mask`; `None` to pad them here.
    """

    def __init__(
        self,
        encode: Callable[[Mapping[str, Any]], dict[str, Any]],
        model: torch.nn.Module,
        collate: Callable[[list[Any]], Any] | None,
    ) -> None:
        self._encode = encode
        self._collate = collate or _pad
        # Not the model itself, which a worker process would receive a copy of.
        self._taken = frozenset(inspect.signature(unwrap_model(model).forward).parameters) - _NOT_PROMPTS

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the model's inputs and, under `COLUMNS`, a mapping for each row; under `PROMPTS`, its tokens."""
        encoded = [self._encode(row) for row in rows]
        taken = self._taken | {"input_ids", "attention_mask"}
        inputs = self._collate([{name: row[name] for name in row if name in taken} for row in encoded])
        columns = [{name: row[name] for name in row if name not in ("input_ids", "attention_mask")} for row in encoded]
        return {**inputs, COLUMNS: columns, PROMPTS: _find_prompts(inputs)}


def _find_prompts(inputs: Inputs) -> list[list[int]]:
    """Return the tokens of each row's prompt, without padding.

    >>> _find_prompts({"input_ids": torch.tensor([[0, 5], [6, 7]]), "attention_mask": torch.tensor([[0, 1], [1, 1]])})
    [[5], [6, 7]]
    """
    if PROMPTS in inputs:
        return inputs[PROMPTS]
    rows = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    return [tokens[mask.bool()].tolist() for tokens, mask in rows]


def _pad(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Return the rows' fields as tensors; those with an entry for each token are padded with zeros on the left.

    >>> _pad([{"input_ids": [5]}, {"input_ids": [6, 7]}])
    {'input_ids': tensor([[0, 5],
            [6, 7]])}
    """
    longest = max(len(row["input_ids"]) for row in rows)
    padded = {}
    for name in rows[0]:
        values = [torch.as_tensor(row[name]) for row in rows]
        is_per_token = all(v.ndim == 1 and len(v) == len(row["input_ids"]) for v, row in zip(values, rows, strict=True))
        fill = [longest - len(row["input_ids"]) if is_per_token else 0 for row in rows]
        values = [torch.nn.functional.pad(v, (n, 0)) if n else v for v, n in zip(values, fill, strict=True)]
        padded[name] = torch.stack(values)
    return padded
