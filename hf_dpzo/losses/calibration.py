"""Scores of label words, less what public texts get: contextual calibration (Zhao et al. 2021).

A language model prefers some words whatever the text is. What it gives them after texts about anything says how much.
The median of each word's score lost less than the mean where the model prefers no word.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch


# More texts would not make the median better, and cost a forward pass each.
MAX_TEXTS = 512


# An offset is rounded to as many digits behind the point, so that other devices find the same one.
_DIGITS = 4


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The offsets that are taken off the scores of label words.

    Args:
        offsets: the offset of each label word, in class order.
        num_texts: the number of public texts that they are the median over.
        texts: the SHA-256 of these texts.

    >>> Calibration(offsets=(0.5, -0.25), num_texts=64, texts="0" * 64).describe()["num_texts"]
    64
    """

    offsets: tuple[float, ...]
    num_texts: int
    texts: str

    @classmethod
    def measure(cls, score: Callable[[Mapping[str, Any]], torch.Tensor], rows: Sequence[Mapping[str, Any]]) -> Self:
        """Return the median scores of public `rows`.

        Args:
            score: a function from the tokens of one row to its scores, `[labels]`.
            rows: the rows, as `input_ids` and what belongs to them.

        Raises:
            ValueError: there are no rows, or a score is not finite.
        """
        if not rows:
            raise ValueError("calibrate_on: it holds no text; name some that are public.")
        median = torch.stack([score(row).double() for row in rows]).median(dim=0).values
        if not median.isfinite().all():
            raise ValueError("calibrate_on: the model's scores of these texts are not finite; name others, or none.")
        tokens = repr([list(row["input_ids"]) for row in rows]).encode()
        offsets = tuple(round(offset, _DIGITS) for offset in median.sub(median.mean()).tolist())
        return cls(offsets=offsets, num_texts=len(rows), texts=hashlib.sha256(tokens).hexdigest())

    @classmethod
    def from_offsets(cls, offsets: Sequence[float]) -> Self:
        """Return the calibration by `offsets` that were measured before, which says of no text that they are of."""
        return cls(offsets=tuple(map(float, offsets)), num_texts=0, texts=hashlib.sha256().hexdigest())

    @classmethod
    def from_description(cls, described: Mapping[str, Any]) -> Self:
        """Return what `describe` described."""
        return cls(**{**described, "offsets": tuple(described["offsets"])})

    def describe(self) -> dict[str, Any]:
        """Return the calibration in JSON types."""
        return {**asdict(self), "offsets": list(self.offsets)}

    def center(self, scores: torch.Tensor) -> torch.Tensor:
        """Return `scores`, `[..., labels]`, less the offsets."""
        return scores - torch.tensor(self.offsets, dtype=scores.dtype, device=scores.device)


def spread_texts(texts: Iterable[str | Mapping[str, str]], columns: Sequence[str]) -> list[Mapping[str, str]]:
    """Return at most `MAX_TEXTS` rows of `columns`. A text stands in each of the columns.

    >>> spread_texts(["A text.", {"text": "Another."}], ["text"])
    [{'text': 'A text.'}, {'text': 'Another.'}]
    """
    rows = [text if isinstance(text, Mapping) else dict.fromkeys(columns, text) for text in texts]
    return rows[:MAX_TEXTS]
