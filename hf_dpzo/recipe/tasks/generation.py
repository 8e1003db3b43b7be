"""Texts that a model generates, scored by a metric that needs no gradient."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from peft import TaskType
from transformers import AutoModelForCausalLM, DataCollatorWithPadding, PreTrainedTokenizerBase

from hf_dpzo.losses.metric import METRICS, MetricLoss
from hf_dpzo.losses.per_example import PerExampleLoss
from hf_dpzo.losses.template import Template
from hf_dpzo.recipe.tasks.labels import find_class
from hf_dpzo.recipe.tasks.responses import refuse_full_prompt
from hf_dpzo.recipe.tasks.task import Need, Row, Task


if TYPE_CHECKING:
    from hf_dpzo.recipe.recipe import Recipe


# The column of encoded rows that holds the text to be met.
REFERENCE = "reference"


class GenerationTask(Task):
    """The template is continued greedily, and the new text is compared with the response, or with the class's word."""

    lora_type = TaskType.CAUSAL_LM
    metric, metric_name = "eval_reward", "reward"
    writes = True

    def check(self, recipe: "Recipe") -> None:
        """Raise `ValueError` unless there are a metric, and a response or words."""
        super().check(recipe)
        if recipe.reward not in METRICS:
            raise ValueError(f"reward={recipe.reward}: task generation needs one of {', '.join(METRICS)}.")
        if (recipe.response is None) == (not recipe.words):
            raise ValueError(
                "response: task generation compares what is generated with a response, such as {answer}, or with the "
                "word of a row's class; set either response or label_words."
            )
        if recipe.response is not None:
            Template(template=recipe.response)

    def check_tokenizer(self, recipe: "Recipe", tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise `ValueError` if the template leaves no room for a text."""
        refuse_full_prompt(Template(template=recipe.template), tokenizer, max_length=recipe.max_length)

    def auto_class(self, recipe: "Recipe") -> type:
        """Return the class of causal language models."""
        return AutoModelForCausalLM

    def padding_side(self, recipe: "Recipe") -> str:
        """Return the side away from what is generated."""
        return "left"

    def needs(self, recipe: "Recipe") -> list[Need]:
        """Return the columns of the template, and those of the response or of the class."""
        compared = (recipe.label_column,) if recipe.response is None else Template(template=recipe.response).fields
        return [Template(template=recipe.template).fields, compared]

    def encode(self, row: Row, recipe: "Recipe", tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return the prompt's tokens and the text to be met."""
        encoded = self.encode_input(row, recipe, tokenizer)
        if recipe.response is None:
            return {
                **encoded,
                REFERENCE: recipe.words[find_class(row[recipe.label_column], recipe, recipe.label_column)],
            }
        response = Template(template=recipe.response)
        return {**encoded, REFERENCE: response.render(response.read_columns(row))}

    def input_columns(self, recipe: "Recipe") -> list[str]:
        """Return the columns of the template."""
        return [*Template(template=recipe.template).fields]

    def encode_input(self, row: Row, recipe: "Recipe", tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return the prompt's tokens."""
        return Template(template=recipe.template).encode_open(row, tokenizer, recipe.max_length)

    def build_collator(self, tokenizer: PreTrainedTokenizerBase, model: torch.nn.Module) -> Callable:
        """Return a collator that pads."""
        return DataCollatorWithPadding(tokenizer)

    def build_loss(
        self, recipe: "Recipe", model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase
    ) -> PerExampleLoss | None:
        """Return the metric of generated text."""
        return MetricLoss(
            recipe.reward,
            max_new_tokens=recipe.max_new_tokens,
            reference=REFERENCE,
            stop_strings=recipe.stop_strings or (),
        )
