"""A response to a text, by an encoder and a decoder."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from peft import TaskType
from transformers import AutoModelForSeq2SeqLM, DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from hf_dpzo.losses.template import Template
from hf_dpzo.recipe.tasks.task import Need, Row, Task


if TYPE_CHECKING:
    from hf_dpzo.recipe.recipe import Recipe


class Seq2SeqLM(Task):
    """The template is read, and the response is learned, each of at most `max_length` tokens."""

    lora_type = TaskType.SEQ_2_SEQ_LM
    writes = True

    def check(self, recipe: "Recipe") -> None:
        """Raise `ValueError` unless there is a response."""
        super().check(recipe)
        if recipe.response is None:
            raise ValueError("response: missing; seq2seq-lm learns one, such as {summary}.")
        Template(template=recipe.response)

    def auto_class(self, recipe: "Recipe") -> type:
        """Return the class of models with encoder and decoder."""
        return AutoModelForSeq2SeqLM

    def needs(self, recipe: "Recipe") -> list[Need]:
        """Return the columns of the template, and those of the response."""
        return [Template(template=text).fields for text in (recipe.template, recipe.response)]

    def encode(self, row: Row, recipe: "Recipe", tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return the tokens of the text, and those of the response as labels."""
        encoded = self.encode_input(row, recipe, tokenizer)
        response = Template(template=recipe.response)
        text = response.render(response.read_columns(row))
        labels = tokenizer(text_target=text, truncation=True, max_length=recipe.max_length)["input_ids"]
        return {**encoded, "labels": labels}

    def input_columns(self, recipe: "Recipe") -> list[str]:
        """Return the columns of the template."""
        return [*Template(template=recipe.template).fields]

    def encode_input(self, row: Row, recipe: "Recipe", tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return the tokens of the text."""
        return Template(template=recipe.template).encode(row, tokenizer, recipe.max_length)

    def build_collator(self, tokenizer: PreTrainedTokenizerBase, model: torch.nn.Module) -> Callable:
        """Return a collator that pads text and response, and shifts the response for the decoder."""
        return DataCollatorForSeq2Seq(tokenizer, model=model)
