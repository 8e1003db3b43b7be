"""Words that are hidden in a text."""

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoModelForMaskedLM, DataCollatorForTokenClassification, PreTrainedTokenizerBase

from hf_dpzo.losses.per_example import IGNORE_INDEX
from hf_dpzo.losses.template import Template
from hf_dpzo.recipe.tasks.task import Need, Row, Task


if TYPE_CHECKING:
    from hf_dpzo.recipe.recipe import Recipe


# The share of a row's tokens that are hidden (Devlin et al. 2019).
HIDDEN_SHARE = 0.15


class MaskedLM(Task):
    """Hides one token in seven of each text. Which ones follows from the row alone, and is the same in each epoch."""

    def check_tokenizer(self, recipe: "Recipe", tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise `ValueError` for a tokenizer without a mask."""
        if tokenizer.mask_token_id is None:
            raise ValueError("task=masked-lm: this tokenizer has no mask token; choose causal-lm.")
        super().check_tokenizer(recipe, tokenizer)

    def auto_class(self, recipe: "Recipe") -> type:
        """Return the class of masked language models."""
        return AutoModelForMaskedLM

    def needs(self, recipe: "Recipe") -> list[Need]:
        """Return the columns of the template."""
        return [Template(template=recipe.template).fields]

    def encode(self, row: Row, recipe: "Recipe", tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return the tokens with some hidden, and these as labels."""
        encoded = Template(template=recipe.template).encode(row, tokenizer, recipe.max_length)
        tokens = encoded["input_ids"]
        hidden = _choose_hidden(tokens, {*tokenizer.all_special_ids} - {tokenizer.unk_token_id})
        return {
            "input_ids": [tokenizer.mask_token_id if place in hidden else token for place, token in enumerate(tokens)],
            "attention_mask": encoded["attention_mask"],
            "labels": [token if place in hidden else IGNORE_INDEX for place, token in enumerate(tokens)],
        }

    def input_columns(self, recipe: "Recipe") -> list[str]:
        """Return the columns of the template."""
        return [*Template(template=recipe.template).fields]

    def encode_input(self, row: Row, recipe: "Recipe", tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return the tokens, of which the text hides those that it writes as the tokenizer's mask."""
        return Template(template=recipe.template).encode(row, tokenizer, recipe.max_length)

    def build_collator(self, tokenizer: PreTrainedTokenizerBase, model: torch.nn.Module) -> Callable:
        """Return a collator that pads tokens and labels."""
        return DataCollatorForTokenClassification(tokenizer)


def _choose_hidden(tokens: list[int], special: set[int]) -> set[int]:
    """Return the places of the tokens to hide, at least one if there is any but special ones."""
    places = [place for place, token in enumerate(tokens) if token not in special]
    if not places:
        return set()
    key = hashlib.sha256(np.asarray(tokens, dtype=np.int64).tobytes()).digest()
    draw = np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "big")))
    count = max(1, round(HIDDEN_SHARE * len(places)))
    return {int(place) for place in draw.permutation(places)[:count]}
