"""The fields of a recipe, and how they are read from YAML and from the command line.

All values go through the same command-line parser. It turns `1e-6`, which YAML reads as text, into a number, and lets a
flag replace any field of the recipe.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hf_dpzo.arguments.training_args import ZOTrainingArguments
from hf_dpzo.losses.prompting import Prompt
from hf_dpzo.models.precision import QUANTIZATIONS
from hf_dpzo.recipe.flags import (
    FieldParser,
    name_flag,
    parse_json_object,
    refuse_other_kinds,
    refuse_unknown_flags,
    spell_field,
)
from hf_dpzo.recipe.invocation import ACTIVATED, check_activation
from hf_dpzo.recipe.places import PATH_FIELDS, locate_paths
from hf_dpzo.recipe.shipped import locate_recipe
from hf_dpzo.recipe.spelling import UnreadableYAMLError, read_yaml, restore_hyphens
from hf_dpzo.recipe.tasks import TASKS, Task, refuse_uncalibrated, refuse_unread_fields


ADAPTERS = ("lora", ACTIVATED, "none")


DTYPES = ("float32", "bfloat16")


MISSING = ("empty", "skip", "refuse")


# Fields whose names and values are those of columns and cells.
AS_WRITTEN = (
    "where",
    "classes",
    "label_words",
    "columns",
    "label_column",
    "label_columns",
    "missing_words",
    "separator",
    "stop_strings",
    "lora_invocation",
)


@dataclass(kw_only=True)
class Recipe:
    """Describes the model, its adapter, the data, and how a row becomes a text.

    Paths may begin with `package://`, which stands for the folder of an installed Python package.
    """

    model_name_or_path: str = field(metadata={"help": "A model on the Hub, a folder, or package://name."})
    model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the model on the Hub."}
    )
    gguf_file: str | None = field(default=None, metadata={"help": "A GGUF file in it, to be unpacked to dtype."})
    dtype: str = field(
        default="float32", metadata={"help": "Of the weights under an adapter, which is float32.", "choices": DTYPES}
    )
    quantization: str | None = field(
        default=None, metadata={"help": "Of these weights; int8: by torchao.", "choices": QUANTIZATIONS}
    )
    task: str = field(default="prompt-classification", metadata={"help": "What is learned.", "choices": [*TASKS]})
    adapter: str = field(
        default="lora", metadata={"help": "What is trained; none: all parameters.", "choices": ADAPTERS}
    )
    lora_r: int = field(default=8, metadata={"help": "Rank of LoRA."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of LoRA."})
    lora_target_modules: list[str] | None = field(default=None, metadata={"help": "Modules that LoRA adapts."})
    lora_layers: list[int] | None = field(default=None, metadata={"help": "Layers that LoRA adapts; default all."})
    lora_freeze_a: bool | None = field(
        default=None,
        metadata={
            "help": "Train the second matrix of LoRA alone; the first stays as it was drawn. Both together diverged at "
            "rates that suit the second. Default true, or what the run has that is resumed."
        },
    )
    lora_invocation: str | None = field(default=None, metadata={"help": "activated-lora: the text that activates it."})
    data: str = field(
        default="", metadata={"help": "A CSV, TSV, JSON (lines), Parquet or other file, a folder, or one on the Hub."}
    )
    encoding: str | None = field(default=None, metadata={"help": "Of text files; default UTF-8."})
    separator: str | None = field(default=None, metadata={"help": "Of cells; default the comma or tab of the suffix."})
    missing_words: list[str] | None = field(
        default=None, metadata={"help": "Words in text files that stand for a missing cell, such as NA; default none."}
    )
    if_missing: str = field(
        default="empty",
        metadata={
            "help": "What a missing cell is. empty: nothing in a text, and a row without text or without label is left "
            "out; skip: its row is left out; refuse: an error.",
            "choices": MISSING,
        },
    )
    data_config: str | None = field(default=None, metadata={"help": "Configuration of the data set on the Hub."})
    train_split: str = field(default="train", metadata={"help": "The split to train on."})
    eval_split: str | None = field(default=None, metadata={"help": "The split to evaluate on."})
    eval_data: str | None = field(default=None, metadata={"help": "A file to evaluate on."})
    eval_rows: int | None = field(default=None, metadata={"help": "Without either: rows to hold out for evaluation."})
    eval_share: float | None = field(default=None, metadata={"help": "In place of eval_rows: the share of rows."})
    train_share: float | None = field(
        default=None, metadata={"help": "The share of training rows to take, where fewer do; default all."}
    )
    split_seed: int = field(default=0, metadata={"help": "The key of the hash by which rows are held out."})
    where: str | None = field(default=None, metadata={"help": "Rows to keep, as JSON: {column: value}."})
    template: str = field(default="{text}", metadata={"help": "The text of a row, with columns in braces."})
    response: str | None = field(default=None, metadata={"help": "What follows the template and is learned."})
    label_column: str = field(default="label", metadata={"help": "The column that holds the class or the number."})
    label_columns: list[str] | None = field(
        default=None,
        metadata={"help": "Several: a number each for regression, or a yes or no each for labels."},
    )
    label_separator: str | None = field(
        default=None, metadata={"help": "Between several labels in one text; default: they are a list."}
    )
    classes: list[str] | None = field(default=None, metadata={"help": "The classes as in the data, in class order."})
    columns: str | None = field(
        default=None, metadata={"help": "As JSON, where the data call a task's columns otherwise: {its name: theirs}."}
    )
    reward: str | None = field(
        default=None, metadata={"help": "Generation: the metric that is learned, exact_match, token_f1 or accuracy."}
    )
    max_new_tokens: int = field(default=8, metadata={"help": "Generation: the tokens that every row decodes."})
    stop_strings: list[str] | None = field(
        default=None, metadata={"help": "Generation: texts before which what is generated ends."}
    )
    label_words: str | None = field(default=None, metadata={"help": "As JSON: {class: word}, in class order."})
    calibrate_on: str | None = field(
        default=None,
        metadata={
            "help": "Label words: take off what the untouched model gives them after public texts: builtin, or a file. "
            "It helps where the model prefers a word whatever the text is; compare."
        },
    )
    layer: int | None = field(default=None, metadata={"help": "Features: of this layer, from 1; default 3/4 up."})
    position: str | None = field(default=None, metadata={"help": "Features: last token, or mean, as of encoders."})
    untouched_template: str | None = field(
        default=None, metadata={"help": "Features: the template that suits label_words best, without training."}
    )
    max_length: int = field(default=128, metadata={"help": "Tokens of a row, at most."})

    @property
    def movable_flags(self) -> tuple[str, ...]:
        """All fields as the command line spells them, from which `parse_recipe` builds the recipe in any folder."""
        paths = {name: getattr(self, name) for name in PATH_FIELDS}
        there = ((name, Path(path).resolve()) for name, path in paths.items() if path and Path(path).exists())
        return (*self.flags, *(f"--{name}={path}" for name, path in there))

    def __post_init__(self) -> None:
        for name in ("missing_words", "stop_strings", "classes", "label_columns"):
            if getattr(self, name) is not None:
                setattr(self, name, restore_hyphens(getattr(self, name)))
        self.where_values = parse_json_object("where", self.where)
        self.column_names = parse_json_object("columns", self.columns)
        words = parse_json_object("label_words", self.label_words)
        self.labels = tuple(str(label) for label in words) or tuple(self.classes or ())
        self.words = tuple(str(word) for word in words.values())
        # As the command line spells them, so that `parse_recipe` makes the same recipe again.
        self.flags: tuple[str, ...] = ()
        self.chosen: dict[str, Any] = {}  # The training arguments that the task chose.
        allowed = {"task": TASKS, "adapter": ADAPTERS, "dtype": DTYPES, "if_missing": MISSING}
        for name, values in (allowed | {"quantization": (*QUANTIZATIONS, None)}).items():
            if getattr(self, name) not in values:
                choices = ", ".join(filter(None, values))
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {choices}.")
        self._refuse_precision()
        if not self.data:
            raise ValueError("data: missing; name a data set on the Hub, or a CSV, JSON or Parquet file.")
        if self.eval_rows is not None and self.eval_share is not None:
            raise ValueError(f"eval_share={self.eval_share}: eval_rows={self.eval_rows} is set too; remove one.")
        self._refuse_numbers()
        refuse_unread_fields(self)
        refuse_uncalibrated(self)
        self.kind.check(self)
        check_activation(self)

    def _refuse_numbers(self) -> None:
        if self.max_length < 1:
            raise ValueError(f"max_length={self.max_length}: a row needs a token; raise it.")
        for name in ("eval_share", "train_share"):
            share = getattr(self, name)
            if share is not None and not 0 < share < 1:
                raise ValueError(f"{name}={share}: it is a share of the rows, between 0 and 1.")
        self.separator = "\t" if self.separator == r"\t" else self.separator
        if self.separator is not None and (len(self.separator) != 1 or self.separator in '"\r\n'):
            raise ValueError(f"separator={self.separator!r}: it must be one character; write the file anew with one.")

    def _refuse_precision(self) -> None:
        if self.adapter == "none" and (self.dtype != "float32" or self.quantization is not None):
            raise ValueError(
                f"adapter=none: with dtype={self.dtype}, quantization={self.quantization} nothing can be trained in "
                "float32; choose lora, or leave them out."
            )
        if self.gguf_file is not None and self.quantization is not None:
            raise ValueError(
                f"quantization={self.quantization}: a GGUF file is unpacked as it is loaded, and not quantized again "
                "then; name a model in safetensors, or set dtype=bfloat16."
            )

    @property
    def kind(self) -> Task:
        """How the task makes rows, a model and a loss."""
        return TASKS[self.task]

    @property
    def used_columns(self) -> list[str]:
        """The columns that are read, without the one of the units of privacy."""
        return [*dict.fromkeys(name for need in self.kind.needs(self) for name in need)]

    @property
    def prompt(self) -> Prompt:
        """The template with its label words."""
        return Prompt(template=self.template, label_words=self.words)

    @property
    def uses_prompt(self) -> bool:
        """Whether classes are predicted by label words after or within a prompt."""
        return self.task == "prompt-classification"

    @property
    def fills_mask(self) -> bool:
        """Whether a label word fills the mask of a masked language model."""
        return self.uses_prompt and self.prompt.has_mask


def read_recipe(path: str | Path, flags: Sequence[str] = ()) -> tuple[Recipe, ZOTrainingArguments]:
    """Return the recipe at `path` and its training arguments; `flags` such as `--max_steps 10` replace its fields.

    A word that is no file is the name of a recipe that comes with the library, such as quickstart.

    Raises:
        ValueError: the file is not a recipe, or a field is unknown or has a wrong value; the message names it.
    """
    path = locate_recipe(path)
    try:
        values = read_yaml(path.read_text(encoding="utf-8"), as_written=AS_WRITTEN)
    except UnicodeDecodeError:
        raise ValueError(f"recipe={path}: it is not text in UTF-8; save it as such.") from None
    except UnreadableYAMLError as error:
        raise ValueError(f"recipe={path}: {error}; correct it there, or name another file.") from None
    _refuse_other_text(path, values)
    return parse_recipe(values, flags, folder=path.parent)


def _refuse_other_text(path: Path, values: Any) -> None:
    """Raise `ValueError` for what is YAML by chance, such as a private text with a colon. None of it is shown."""
    if not isinstance(values, dict):
        raise ValueError(f"recipe={path}: it must be a mapping of fields to values; name the YAML file of a recipe.")
    known = {entry.name for kind in (Recipe, ZOTrainingArguments) for entry in fields(kind) if entry.init}
    names = [str(name) for name in values]
    if values and (not known & {*names} or not all(re.fullmatch(r"\w[\w-]*", name, re.ASCII) for name in names)):
        raise ValueError(
            f"recipe={path}: what it has are not fields of a recipe, such as data and output_dir; name the YAML file "
            "of a recipe."
        )


def parse_recipe(
    values: Mapping[str, Any], flags: Sequence[str] = (), *, is_complete: bool = False, folder: Path = Path()
) -> tuple[Recipe, ZOTrainingArguments]:
    """Return the recipe that consists of `values`, and its training arguments.

    Among `flags`, `--without a,b` leaves out the fields `a` and `b`, and the others replace values. A value of `None`
    is left out, too. If the recipe `is_complete`, such as one that was kept, its task chooses nothing. What relative
    paths among the `values` mean follows from the `folder` of their file; see `locate_paths`.
    """
    without_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    without_parser.add_argument("--without", default="")
    options, flags = without_parser.parse_known_args(flags)
    for name in filter(None, options.without.split(",")):
        if name not in values:
            raise ValueError(f"without={name}: the recipe has no such field; it has {', '.join(values)}.")
    values = {name: value for name, value in values.items() if name not in options.without.split(",")}
    given = {name_flag(argument) for argument in flags}
    values |= locate_paths(folder, {name: value for name, value in values.items() if name not in given})
    parser = FieldParser((Recipe, ZOTrainingArguments), allow_abbrev=False)
    refuse_other_kinds(values, parser)
    argv = [argument for name, value in values.items() for argument in spell_field(str(name), value)]
    refuse_unknown_flags([*argv, *flags], (Recipe, ZOTrainingArguments))
    argv += flags
    written = parser.parse_args(argv)
    recipe = Recipe(**{entry.name: getattr(written, entry.name) for entry in fields(Recipe)})
    given = {name_flag(argument) for argument in argv}
    chosen = {} if is_complete else recipe.kind.defaults(recipe).choose(written, given)
    argv += [argument for name, value in chosen.items() for argument in spell_field(name, value)]
    recipe, args = parser.parse_args_into_dataclasses(args=argv)
    recipe.flags, recipe.chosen = tuple(argv), chosen
    return recipe, args
