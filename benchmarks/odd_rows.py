"""Rows that nobody should train on, and a model, a collator and a loss that meet them. See `attack.py`."""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset


VOCABULARY, WIDTH = 64, 16

# Tokens of rows whose losses are what no loss should be.
NAN, INFINITE, HUGE, NEGATIVE, FAILING = range(58, 63)


class FetchError(Exception):
    """A row cannot be fetched."""


class Unfetchable:
    """Stands in a data set for a row that cannot be fetched."""


class Rows(Dataset):
    """Rows in memory, some of which cannot be fetched."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        if isinstance(self.rows[index], Unfetchable):
            raise FetchError(f"row {index}, whose number must not be seen")
        return self.rows[index]


def draw_ordinary(drawing: random.Random) -> dict[str, Any]:
    """Draw a row of two to twelve tokens."""
    tokens = [drawing.randrange(4, 40) for _ in range(drawing.randrange(2, 13))]
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": drawing.randrange(2)}


def _with_token(token: int) -> Callable[[random.Random, dict], dict]:
    return lambda drawing, row: {**row, "input_ids": [token, *row["input_ids"][1:]]}


# Each takes a generator and an ordinary row, of which it may keep what it likes.
ODD: dict[str, Callable[[random.Random, dict[str, Any]], Any]] = {
    "ordinary": lambda drawing, row: row,
    "a loss of NaN": _with_token(NAN),
    "an infinite loss": _with_token(INFINITE),
    "a huge loss": _with_token(HUGE),
    "a huge negative loss": _with_token(NEGATIVE),
    "a loss that fails": _with_token(FAILING),
    "no labels": lambda drawing, row: {name: row[name] for name in row if name != "labels"},
    "no tokens": lambda drawing, row: {name: row[name] for name in row if name != "input_ids"},
    "no mask": lambda drawing, row: {name: row[name] for name in row if name != "attention_mask"},
    "labels of None": lambda drawing, row: {**row, "labels": None},
    "labels of NaN": lambda drawing, row: {**row, "labels": float("nan")},
    "labels of another type": lambda drawing, row: {**row, "labels": float(row["labels"])},
    "a truth value": lambda drawing, row: {**row, "labels": bool(row["labels"])},
    "an unknown class": lambda drawing, row: {**row, "labels": drawing.choice([9, -1, 10**30])},
    "a word for a class": lambda drawing, row: {**row, "labels": "positive"},
    "an unknown token": lambda drawing, row: {**row, "input_ids": [10**6, *row["input_ids"][1:]]},
    "a negative token": lambda drawing, row: {**row, "input_ids": [-3, *row["input_ids"][1:]]},
    "words for tokens": lambda drawing, row: {**row, "input_ids": ["a"] * len(row["input_ids"])},
    "nested tokens": lambda drawing, row: {**row, "input_ids": [row["input_ids"]]},
    "empty": lambda drawing, row: {"input_ids": [], "attention_mask": [], "labels": 1},
    "nothing masked in": lambda drawing, row: {**row, "attention_mask": [0] * len(row["input_ids"])},
    "a mask of another length": lambda drawing, row: {**row, "attention_mask": [1]},
    "too long": lambda drawing, row: {**row, "input_ids": [7] * 300, "attention_mask": [1] * 300},
    "tensors": lambda drawing, row: {name: torch.tensor(row[name]) for name in row},
    "arrays": lambda drawing, row: {name: np.array(row[name]) for name in row},
    "half numbers": lambda drawing, row: {**row, "attention_mask": torch.ones(len(row["input_ids"])).half()},
    "a field more": lambda drawing, row: {**row, "surprise": drawing.choice([None, 5, "text", {"deep": [1]}])},
    "another order of fields": lambda drawing, row: dict(reversed(row.items())),
    "repeated": lambda drawing, row: {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": 0},
    "an empty mapping": lambda drawing, row: {},
    "a list": lambda drawing, row: row["input_ids"],
    "a number": lambda drawing, row: drawing.choice([0, float("nan"), 10**400]),
    "None": lambda drawing, row: None,
    "not to be fetched": lambda drawing, row: Unfetchable(),
}

# Without a column of users these cannot be grouped, and are refused.
NO_MAPPINGS = {"a list", "a number", "None", "not to be fetched"}


def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
    """Pad rows to the longest of them, as stock collators do, with the failures that these have on odd rows."""
    width = max(len(row["input_ids"]) for row in rows)
    padding = [[0] * (width - len(row["input_ids"])) for row in rows]
    pairs = list(zip(rows, padding, strict=True))
    return {
        "input_ids": torch.tensor([[*map(int, row["input_ids"]), *pad] for row, pad in pairs]),
        "attention_mask": torch.tensor([[*row["attention_mask"], *pad] for row, pad in pairs]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


class Classifier(nn.Module):
    """A mean of frozen embeddings, and a trained layer on it, which is small enough to be restored from a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH).requires_grad_(False)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> tuple[torch.Tensor]:
        """Return the logits, `[batch, 2]`."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        kept = self.embed(input_ids) * mask.unsqueeze(-1)
        return (self.head(kept.sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)),)


@dataclass(frozen=True, kw_only=True)
class OddLoss:
    """A loss for each row, with what tokens ask for instead.

    Args:
        leak: how far a loss moves, one way or the other, with the rows of its micro-batch and the weights, as rounding
            does, but farther.
    """

    leak: float = 0.0

    def __call__(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return `[batch]`; fail if a row asks for it."""
        tokens = inputs["input_ids"]
        if (tokens == FAILING).any():
            raise RuntimeError(f"a loss failed on {tokens.tolist()}, which must not be seen")
        (logits,) = model(tokens, inputs["attention_mask"])
        own = nn.functional.cross_entropy(logits, inputs["labels"], reduction="none")
        losses = own + self.leak * _choose_side(model, tokens) if self.leak else own
        odd = {NAN: float("nan"), INFINITE: float("inf"), HUGE: 3e38, NEGATIVE: -3e38}
        for token, value in odd.items():
            losses = torch.where((tokens == token).any(dim=1), own * value, losses)
        return losses


def _choose_side(model: nn.Module, tokens: torch.Tensor) -> int:
    content = tokens.numpy().tobytes() + model.head.weight.detach().numpy().tobytes()
    return 1 if hashlib.blake2b(content, digest_size=1).digest()[0] & 1 else -1
