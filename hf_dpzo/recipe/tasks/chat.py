"""Conversations, of which the assistant's turns are learned."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from peft import TaskType
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from hf_dpzo.recipe.defaults import TrainingDefaults
from hf_dpzo.recipe.tasks.conversations import encode_conversation, encode_question, read_messages, refuse_template
from hf_dpzo.recipe.tasks.exchanges import answers, drop_answer
from hf_dpzo.recipe.tasks.task import Need, Row, Task


if TYPE_CHECKING:
    from hf_dpzo.recipe.recipe import Recipe


# Measured on answers of a dozen tokens with a pretrained model of 135 million parameters. Rows agree about how an
# assistant writes, so that many directions of few rows learn more in a time than few directions of many rows, and noise
# may go farther. Differences are central: as answers become probable, losses bend, and forward ones turn away.
ACTIVATED_DEFAULTS = TrainingDefaults(
    method="aggzo",
    expected_batch_size=8,
    num_directions=32,
    clip=0.3,
    smoothing=6e-2,
    learning_rate=4.0,
    most_noise=16,
    max_steps=80,
)


class Chat(Task):
    """The column `messages` is written by the tokenizer's chat template, and the assistant's turns are learned."""

    lora_type = TaskType.CAUSAL_LM
    writes = True
    roles = ("messages",)

    def check(self, recipe: "Recipe") -> None:
        """Accept any recipe, of which neither template nor classes are read."""

    def defaults(self, recipe: "Recipe") -> TrainingDefaults:
        """Return what suits an adapter that the assistant's turn activates."""
        return ACTIVATED_DEFAULTS if recipe.adapter == "activated-lora" else TrainingDefaults()

    def check_tokenizer(self, recipe: "Recipe", tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise `ValueError` for a tokenizer without a chat template that shows what is learned."""
        refuse_template(tokenizer)

    def auto_class(self, recipe: "Recipe") -> type:
        """Return the class of causal language models."""
        return AutoModelForCausalLM

    def needs(self, recipe: "Recipe") -> list[Need]:
        """Return the column of messages."""
        return [(self.role("messages", recipe),)]

    def encode(self, row: Row, recipe: "Recipe", tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return the tokens, and as labels those of the assistant's turns."""
        column = self.role("messages", recipe)
        return encode_conversation(read_messages(row[column], column), tokenizer, max_length=recipe.max_length)

    def explain_nothing_learned(self, rows: Iterable[Row], recipe: "Recipe") -> str:
        """Return why nothing of the conversations is learned: none has a turn of the assistant, or none has room."""
        column = self.role("messages", recipe)
        if any(answers(read_messages(row[column], column)) for row in rows):
            return super().explain_nothing_learned(rows, recipe)
        return (
            "no conversation has a turn of the assistant that says anything, which alone is learned; give these the "
            "role assistant, or gpt as in ShareGPT's files, or set task: causal-lm, which learns whole texts"
        )

    def input_columns(self, recipe: "Recipe") -> list[str]:
        """Return the column of messages."""
        return [self.role("messages", recipe)]

    def ask(self, row: Row, recipe: "Recipe") -> Row | None:
        """Return the conversation up to what the assistant is asked last; a text is one turn of the user."""
        column = self.role("messages", recipe)
        cell = row[column]
        messages = [{"role": "user", "content": cell}] if isinstance(cell, str) else read_messages(cell, column)
        asked = drop_answer(messages)
        return {column: asked} if asked else None

    def encode_input(self, row: Row, recipe: "Recipe", tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return the tokens of the conversation up to where the assistant answers next."""
        column = self.role("messages", recipe)
        return encode_question(read_messages(row[column], column), tokenizer)

    def build_collator(self, tokenizer: PreTrainedTokenizerBase, model: torch.nn.Module) -> Callable:
        """Return a collator that pads tokens and labels."""
        return DataCollatorForSeq2Seq(tokenizer)
