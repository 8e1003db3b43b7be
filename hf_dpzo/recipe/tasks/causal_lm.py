"""A text, or a response to it, token by token."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from peft import TaskType
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from hf_dpzo.losses.template import Template
from hf_dpzo.recipe.tasks.responses import encode_response, refuse_full_prompt
from hf_dpzo.recipe.tasks.task import Need, Row, Task


if TYPE_CHECKING:
    from hf_dpzo.recipe.recipe import Recipe


class CausalLM(Task):
    """All tokens of the template are learned, or only those of the response if there is one."""

    lora_type = TaskType.CAUSAL_LM
    writes = True

    def check(self, recipe: "Recipe") -> None:
        """Raise `ValueError` for a template or a response that is none."""
        super().check(recipe)
        if recipe.response is not None:
            Template(template=recipe.response)

    def check_tokenizer(self, recipe: "Recipe", tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise `ValueError` if the template leaves no room for a response."""
        if recipe.response is not None:
            refuse_full_prompt(Template(template=recipe.template), tokenizer, max_length=recipe.max_length)
        else:
            super().check_tokenizer(recipe, tokenizer)

    def auto_class(self, recipe: "Recipe") -> type:
        """Return the class of causal language models."""
        return AutoModelForCausalLM

    def needs(self, recipe: "Recipe") -> list[Need]:
        """Return the columns of the template, and those of the response."""
        texts = filter(None, (recipe.template, recipe.response))
        return [Template(template=text).fields for text in texts]

    def encode(self, row: Row, recipe: "Recipe", tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return the tokens, and as labels those that are learned."""
        template = Template(template=recipe.template)
        if recipe.response is not None:
            response = Template(template=recipe.response)
            return encode_response(template, response, row, tokenizer, max_length=recipe.max_length)
        encoded = template.encode(row, tokenizer, recipe.max_length)
        return {**encoded, "labels": encoded["input_ids"]}

    def input_columns(self, recipe: "Recipe") -> list[str]:
        """Return the columns of the template."""
        return [*Template(template=recipe.template).fields]

    def encode_input(self, row: Row, recipe: "Recipe", tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return the tokens of the template, which is continued."""
        return Template(template=recipe.template).encode_open(row, tokenizer, recipe.max_length)

    def build_collator(self, tokenizer: PreTrainedTokenizerBase, model: torch.nn.Module) -> Callable:
        """Return a collator that pads tokens and labels."""
        return DataCollatorForSeq2Seq(tokenizer)
