"""A task: which model a recipe loads, what its rows become, and what measures it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft import TaskType
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

from hf_dpzo.losses.per_example import PerExampleLoss
from hf_dpzo.losses.template import Template
from hf_dpzo.recipe.defaults import TrainingDefaults


if TYPE_CHECKING:
    from hf_dpzo.recipe.recipe import Recipe


Row = Mapping[str, Any]


# Names of columns; a row is left out unless one of them holds a value.
Need = tuple[str, ...]


class Task(ABC):
    """What a recipe's `task` decides. Its parts depend on the recipe and on one row, never on other rows."""

    # The kind of model that PEFT wraps, and modules that it trains whole; `None` for none of its kinds.
    lora_type: TaskType | None = None
    trained_modules: Sequence[str] | None = None
    # The metric that a run ends with, and its name in the report.
    metric: str = "eval_loss"
    metric_name: str = "evaluation loss"
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None
    # Whether training begins with a head that knows nothing.
    has_new_head: bool = False
    # Whether an answer is a text that the model writes.
    writes = False
    # The columns that the task reads next to those of the template and the label; `columns` may call them otherwise.
    roles: tuple[str, ...] = ()

    def check(self, recipe: "Recipe") -> None:
        """Raise `ValueError` for a recipe that this task can not follow; raised before data are read."""
        Template(template=recipe.template)

    def check_tokenizer(self, recipe: "Recipe", tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise `ValueError` for a tokenizer that can not do what this task needs; raised before rows are encoded.

        By default, the template must leave room for a text.
        """
        template = Template(template=recipe.template)
        template.encode(dict.fromkeys(template.fields, ""), tokenizer, recipe.max_length - 1)

    def defaults(self, recipe: "Recipe") -> TrainingDefaults:
        """Return the training arguments for what neither the recipe nor a flag sets; by default, stock's."""
        return TrainingDefaults()

    @abstractmethod
    def auto_class(self, recipe: "Recipe") -> type:
        """Return the class of `transformers` that loads the model."""

    def model_options(self, recipe: "Recipe") -> dict[str, Any]:
        """Return what the model's configuration is to hold, such as the names of the classes."""
        return {}

    def peft_type(self, recipe: "Recipe") -> TaskType | None:
        """Return the kind of model that PEFT is to make of the model."""
        return self.lora_type

    def padding_side(self, recipe: "Recipe") -> str:
        """Return the side on which rows are padded."""
        return "right"

    @abstractmethod
    def needs(self, recipe: "Recipe") -> list[Need]:
        """Return the groups of columns of which each row needs one value at least. All of them are read."""

    @abstractmethod
    def encode(self, row: Row, recipe: "Recipe", tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return the columns that the model takes, `labels` among them, for one row.

        Raises:
            ValueError: a label is of no class, or a value is of the wrong type.
        """

    def explain_nothing_learned(self, rows: Iterable[Row], recipe: "Recipe") -> str:
        """Return why none of the `rows` has a token that is learned, and what to do about it."""
        return f"with max_length={recipe.max_length} no row has a token that is learned; raise it, or correct the rows"

    @abstractmethod
    def input_columns(self, recipe: "Recipe") -> list[str]:
        """Return the columns that a row needs to be answered, without those of its label."""

    def ask(self, row: Row, recipe: "Recipe") -> Row | None:
        """Return a row as it is asked, without an answer that its columns hold; `None` where nothing is asked."""
        return row

    @abstractmethod
    def encode_input(self, row: Row, recipe: "Recipe", tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return the tokens of a row whose answer is not known: those that `encode` gives a row with the same columns.

        Where the model writes the answer, they end where it begins.
        """

    @abstractmethod
    def build_collator(self, tokenizer: PreTrainedTokenizerBase, model: torch.nn.Module) -> Callable:
        """Return what joins encoded rows to a batch."""

    def build_loss(
        self, recipe: "Recipe", model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase
    ) -> PerExampleLoss | None:
        """Return the loss of each row; `None` for that of the model's head."""
        return None

    def build_head(
        self, model: PreTrainedModel, recipe: "Recipe", tokenizer: PreTrainedTokenizerBase
    ) -> PreTrainedModel | None:
        """Return a model with a new head on `model`, which is trained in place of an adapter; `None` for an adapter."""
        return None

    def name_trained(self, recipe: "Recipe") -> str:
        """Return what is trained and saved, in a word."""
        return "model" if recipe.adapter == "none" else "adapter"

    def role(self, name: str, recipe: "Recipe") -> str:
        """Return what the data call the column `name` of this task."""
        return str(recipe.column_names.get(name, name))


def refuse_slow(task: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` for a tokenizer that does not say which token comes from which part of a text."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"task={task}: {type(tokenizer).__name__} does not say which token comes from where; save its fast version "
            "beside the model."
        )


def refuse_short(max_length: int, tokenizer: PreTrainedTokenizerBase, *, texts: int) -> None:
    """Raise `ValueError` unless rows of `texts` texts, one or two, have room for a token of each."""
    needed = tokenizer.num_special_tokens_to_add(pair=texts > 1) + texts
    if max_length < needed:
        raise ValueError(f"max_length={max_length}: it leaves no room for a text; set {needed} at least.")
