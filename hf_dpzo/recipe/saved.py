"""What a model needs to be used, taken from its recipe, and the recipe that it gives back.

It is public: it names neither data nor a folder of this machine, and it holds no value of a row.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_dpzo.card.use import fingerprint_text
from hf_dpzo.recipe.recipe import Recipe


# Fields that are kept as they are written, if they are set.
_KEPT = ("response", "label_columns", "label_separator", "lora_invocation", "position")


# Tasks that read no template, and those that read no label of a row.
_WITHOUT_TEMPLATE = ("chat", "question-answering", "token-classification")
_WITHOUT_LABEL = ("chat", "question-answering", "causal-lm", "seq2seq-lm", "masked-lm")


# A width in a template by which a stranger could ask for any amount of memory.
_WIDE = re.compile(r"\{[^{}]*:[^{}]*\d{5,}[^{}]*\}")


# What stands for the training data, which no use of a model reads.
_NO_DATA = "none"


def describe_use(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what a user of the model has to know, in JSON types, as the header of a log takes it.

    Args:
        recipe: the recipe of the run, whose `max_length` is that of its rows.
        tokenizer: the tokenizer of its rows.
    """
    kept = {name: getattr(recipe, name) for name in _KEPT}
    kept["template"] = None if recipe.task in _WITHOUT_TEMPLATE else recipe.template
    kept["label_column"] = None if recipe.task in _WITHOUT_LABEL or recipe.label_columns else recipe.label_column
    kept["classes"], kept["label_words"] = list(recipe.labels), list(recipe.words)
    kept["columns"] = {
        str(name): [str(one) for one in theirs] if isinstance(theirs, list) else str(theirs)
        for name, theirs in recipe.column_names.items()
    }
    if recipe.task == "feature-classification":
        kept["layer"] = recipe.layer
    else:
        kept["adapter"] = recipe.adapter
    if recipe.task == "generation":
        for name in ("reward", "stop_strings", "max_new_tokens"):
            kept[name] = getattr(recipe, name)
    if recipe.task == "chat" and isinstance(tokenizer.chat_template, str):
        kept["chat_template"] = fingerprint_text(tokenizer.chat_template)
    written = {name: value for name, value in kept.items() if value not in (None, [], {})}
    return {"task": recipe.task, **written, "max_length": recipe.max_length}


def restore_recipe(used: Mapping[str, Any], base: str) -> Recipe:
    """Return the recipe that `describe_use` described, without its data.

    Args:
        used: what a log says of its use. A stranger may have written it.
        base: the place of the base model, which may be a GGUF file.

    Raises:
        ValueError: this version has no such task, or it cannot be done that way.
    """
    for name in ("template", "response"):
        if _WIDE.search(used.get(name, "")):
            raise ValueError(f"{name}: it writes a column with a width that no text has; use an unchanged log.")
    fields = {name: value for name, value in used.items() if name != "chat_template"}
    words = fields.pop("label_words", None)
    if words is not None:
        classes = fields.pop("classes", [])
        if len({*classes}) != len(classes) or len(classes) != len(words):
            raise ValueError(f"label_words={len(words)}: there are {len(classes)} classes; use an unchanged log.")
        fields["label_words"] = json.dumps(dict(zip(classes, words, strict=True)))
    if "columns" in fields:
        fields["columns"] = json.dumps(fields["columns"])
    place, gguf_file = base, None
    if base.endswith(".gguf"):
        place, _, gguf_file = base.rpartition("/")
    return Recipe(model_name_or_path=place or ".", gguf_file=gguf_file, data=_NO_DATA, **fields)
