"""Recipes of which only the data are read, and tokenizers that a real model would not be needed for."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_dpzo.recipe.loading import load_rows
from hf_dpzo.recipe.recipe import Recipe, parse_recipe


def data_recipe(path: Path | str, **changes: Any) -> Recipe:
    """Return a recipe for the rows in `path`, without a model."""
    fields = {
        "model_name_or_path": "none",
        "data": str(path),
        "label_words": {"0": " bad", "1": " good"},
        "method": "mezo",
        "expected_batch_size": 2,
        "max_steps": 1,
        "output_dir": "out",
        "use_cpu": True,
    }
    return parse_recipe({**fields, **changes})[0]


def letter_tokenizer(*, begins: bool = False, ends: bool = False) -> PreTrainedTokenizerFast:
    """Return a tokenizer of single characters, which may begin each text with BOS and end it with EOS."""
    special = {"[UNK]": 0, "<s>": 1, "</s>": 2, "[MASK]": 3}
    raw = Tokenizer(models.WordLevel({**special, **{chr(code): code for code in range(32, 127)}}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    form = f"{'<s> ' if begins else ''}$A{' </s>' if ends else ''}"
    raw.post_processor = processors.TemplateProcessing(single=form, special_tokens=[("<s>", 1), ("</s>", 2)])
    named = {"bos_token": "<s>", "eos_token": "</s>", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", pad_token="[UNK]", **named)


def spell(tokens: list[int]) -> str:
    """Return the text of such tokens, with ^ for BOS, $ for EOS, and * for a mask."""
    return "".join({1: "^", 2: "$", 3: "*"}.get(token, chr(token)) for token in tokens)


def encode_first_row(
    folder: Path, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast | None = None, **changes: Any
) -> dict[str, Any]:
    """Write a file with `row` alone into `folder`, and return what it becomes by a recipe."""
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    return load_rows(data_recipe(path, **changes), tokenizer or letter_tokenizer())[0][0]


def spell_learned(row: Mapping[str, Any]) -> str:
    """Return the text of the tokens of `row` that are learned."""
    return spell([label for label in row["labels"] if label != -100])
