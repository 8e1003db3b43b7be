"""The answer to a question as a part of a text."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from peft import TaskType
from transformers import (
    AutoModelForQuestionAnswering,
    BatchEncoding,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
)

from hf_dpzo.data.cells import to_number, to_text
from hf_dpzo.losses.template import Template
from hf_dpzo.recipe.tasks.task import Need, Row, Task, refuse_short, refuse_slow


if TYPE_CHECKING:
    from hf_dpzo.recipe.recipe import Recipe


class QuestionAnswering(Task):
    """The columns of SQuAD: `question`, `context`, and `answers` with the lists `text` and `answer_start`.

    The first answer is learned. Without one, or where it does not fit, it is the first token, as in SQuAD 2. A question
    that takes more than half of a row that is too long loses its end, and then the context does.
    """

    lora_type = TaskType.QUESTION_ANS
    roles = ("question", "context", "answers")

    def check(self, recipe: "Recipe") -> None:
        """Accept any recipe, of which neither template nor classes are read."""

    def check_tokenizer(self, recipe: "Recipe", tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise `ValueError` for a tokenizer that does not say which token comes from where, or without room."""
        refuse_slow(recipe.task, tokenizer)
        refuse_short(recipe.max_length, tokenizer, texts=2)

    def auto_class(self, recipe: "Recipe") -> type:
        """Return the class of models with a head for spans."""
        return AutoModelForQuestionAnswering

    def needs(self, recipe: "Recipe") -> list[Need]:
        """Return the three columns."""
        return [(self.role(name, recipe),) for name in self.roles]

    def encode(self, row: Row, recipe: "Recipe", tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return the tokens of question and context, and the first and the last token of the answer."""
        _, context, answers = (self.role(name, recipe) for name in self.roles)
        text, start = _read_answer(row[answers], to_text(row[context], context), answers)
        encoded = self.tokenize(row, recipe, tokenizer)
        first, last = encoded.char_to_token(start, sequence_index=1), None
        if text and first is not None:
            last = encoded.char_to_token(start + len(text) - 1, sequence_index=1)
        found = (first, last) if last is not None else (0, 0)
        tokens = {name: values for name, values in encoded.items() if name != "offset_mapping"}
        return {**tokens, "start_positions": found[0], "end_positions": found[1]}

    def tokenize(self, row: Row, recipe: "Recipe", tokenizer: PreTrainedTokenizerBase) -> BatchEncoding:
        """Return question and context as tokens, with the characters of these that each token stands for."""
        question, context, _ = (self.role(name, recipe) for name in self.roles)
        asked, read = to_text(row[question], question), to_text(row[context], context)
        return tokenizer(
            _cut_question(asked, read, tokenizer, recipe.max_length),
            read,
            truncation="only_second",
            max_length=recipe.max_length,
            return_offsets_mapping=True,
        )

    def input_columns(self, recipe: "Recipe") -> list[str]:
        """Return the columns of question and context."""
        return [self.role(name, recipe) for name in self.roles[:2]]

    def encode_input(self, row: Row, recipe: "Recipe", tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return the tokens of question and context."""
        encoded = self.tokenize(row, recipe, tokenizer)
        return {name: values for name, values in encoded.items() if name != "offset_mapping"}

    def build_collator(self, tokenizer: PreTrainedTokenizerBase, model: torch.nn.Module) -> Callable:
        """Return a collator that pads."""
        return DataCollatorWithPadding(tokenizer)


def _cut_question(question: str, context: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> str:
    """Return the question, or what half of the room holds of it if it would take more of a row that is too long."""
    if len(tokenizer(question, context)["input_ids"]) <= max_length:
        return question
    room = max(1, (max_length - tokenizer.num_special_tokens_to_add(pair=True)) // 2)
    while (excess := len(tokenizer(question, add_special_tokens=False)["input_ids"]) - room) > 0:
        # It takes off one token more than it is told.
        question = Template.shorten({"question": question}, tokenizer, excess - 1)["question"]
    return question


def _read_answer(cell: Any, context: str, column: str) -> tuple[str, int]:
    """Return the text of the first answer and where it begins in the context; no text if there is no answer."""
    if not isinstance(cell, dict) or not {"text", "answer_start"} <= {*cell}:
        raise ValueError(f"column={column}: it holds no answers; give it a dictionary of text and answer_start.")
    texts, starts = (cell[name] if isinstance(cell[name], list) else [cell[name]] for name in ("text", "answer_start"))
    text = to_text(texts[0], column) if texts else ""
    if not text:
        return "", 0
    start = to_number(to_text(starts[0], column)) if starts else None
    if start is None or not 0 <= start < len(context) or start % 1 or not context.startswith(text, int(start)):
        raise ValueError(
            f"column={column}: a row has an answer that does not begin at its answer_start; count the characters of "
            "the context from 0, or leave the answer out."
        )
    return text, int(start)
