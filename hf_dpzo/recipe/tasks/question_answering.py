"""The answer to a question as a part of a text."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from peft import TaskType
from transformers import AutoModelForQuestionAnswering, DataCollatorWithPadding, PreTrainedTokenizerBase

from hf_dpzo.data.cells import to_number, to_text
from hf_dpzo.recipe.tasks.task import Need, Row, Task, refuse_slow


if TYPE_CHECKING:
    from hf_dpzo.recipe.recipe import Recipe


class QuestionAnswering(Task):
    """The columns of SQuAD: `question`, `context`, and `answers` with the lists `text` and `answer_start`.

    The first answer is learned. Without one, or where it does not fit, it is the first token, as in SQuAD 2.
    """

    lora_type = TaskType.QUESTION_ANS
    roles = ("question", "context", "answers")

    def check(self, recipe: "Recipe") -> None:
        """Accept any recipe, of which neither template nor classes are read."""

    def check_tokenizer(self, recipe: "Recipe", tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise `ValueError` for a tokenizer that does not say which token comes from where."""
        refuse_slow(recipe.task, tokenizer)

    def auto_class(self, recipe: "Recipe") -> type:
        """Return the class of models with a head for spans."""
        return AutoModelForQuestionAnswering

    def needs(self, recipe: "Recipe") -> list[Need]:
        """Return the three columns."""
        return [(self.role(name, recipe),) for name in self.roles]

    def encode(self, row: Row, recipe: "Recipe", tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return the tokens of question and context, and the first and the last token of the answer."""
        question, context, answers = (self.role(name, recipe) for name in self.roles)
        text, start = _read_answer(row[answers], answers)
        encoded = tokenizer(
            to_text(row[question], question),
            to_text(row[context], context),
            truncation="only_second",
            max_length=recipe.max_length,
            return_offsets_mapping=True,
        )
        first, last = encoded.char_to_token(start, sequence_index=1), None
        if text and first is not None:
            last = encoded.char_to_token(start + len(text) - 1, sequence_index=1)
        found = (first, last) if last is not None else (0, 0)
        tokens = {name: values for name, values in encoded.items() if name != "offset_mapping"}
        return {**tokens, "start_positions": found[0], "end_positions": found[1]}

    def build_collator(self, tokenizer: PreTrainedTokenizerBase, model: torch.nn.Module) -> Callable:
        """Return a collator that pads."""
        return DataCollatorWithPadding(tokenizer)


def _read_answer(cell: Any, column: str) -> tuple[str, int]:
    """Return the text of the first answer and where it begins in the context; no text if there is no answer."""
    if not isinstance(cell, dict) or not {"text", "answer_start"} <= {*cell}:
        raise ValueError(f"column={column}: it holds no answers; give it a dictionary of text and answer_start.")
    texts, starts = (cell[name] if isinstance(cell[name], list) else [cell[name]] for name in ("text", "answer_start"))
    if not texts or not starts:
        return "", 0
    return to_text(texts[0], column), int(to_number(to_text(starts[0], column)) or 0)
