"""Loads the model and the rows of tokens that a recipe describes."""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import torch
from datasets import ClassLabel, Json, List
from peft import LoraConfig
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_dpzo.data.cells import to_text
from hf_dpzo.losses.per_example import IGNORE_INDEX
from hf_dpzo.models.base_place import refuse_base_place
from hf_dpzo.models.float32_residual import keep_residual_in_float32
from hf_dpzo.models.location import find_cached_commit, resolve_path
from hf_dpzo.models.precision import build_loading_options
from hf_dpzo.models.seeded import publicly_seeded, seeded_peft_model
from hf_dpzo.recipe.bars import advance, uncounted_bar
from hf_dpzo.recipe.invocation import find_invocation_tokens, ignore_base_tokens
from hf_dpzo.recipe.obstacles import refuse_missing_libraries
from hf_dpzo.recipe.recipe import Recipe
from hf_dpzo.recipe.tables import keep_rows, load_tables, select_rows
from hf_dpzo.recipe.tasks.labels import name_classes_field


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Load the tokenizer, with padding on the side that the task needs.

    Raises:
        ValueError: there is no such model, or what reads it is not installed; said before anything is loaded.
    """
    refuse_missing_libraries(recipe)
    place = {"revision": recipe.model_revision, "gguf_file": recipe.gguf_file}
    refuse_base_place(recipe.model_name_or_path, **place)
    tokenizer = AutoTokenizer.from_pretrained(resolve_path(recipe.model_name_or_path), **_build_source_options(recipe))
    choose_padding(tokenizer, recipe)
    return tokenizer


def choose_padding(tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> None:
    """Let `tokenizer` pad by EOS if it has no other token for it, and on the side that the task needs.

    Raises:
        ValueError: it has neither.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ValueError(
            f"model_name_or_path={recipe.model_name_or_path}: its tokenizer has no token to pad rows with, nor EOS; "
            "set its pad_token and save it beside the model."
        )
    tokenizer.padding_side = recipe.kind.padding_side(recipe)


def load_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> torch.nn.Module:
    """Load the model that the recipe names, with its float32 adapter. New parameters are initialized from `seed`."""
    options = {**_build_weight_options(recipe), **recipe.kind.model_options(recipe)}
    with publicly_seeded(seed):
        model = _load_weights(recipe, options)
    if recipe.model_revision is not None:
        model.config._commit_hash = find_cached_commit(recipe.model_name_or_path, recipe.model_revision)
    # Cards name the model by what the recipe says, not by its path on this machine.
    model.config.name_or_path = "/".join(filter(None, (recipe.model_name_or_path, recipe.gguf_file)))
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    with_head = recipe.kind.build_head(model, recipe, tokenizer)
    trained = add_adapter(model, recipe, tokenizer, seed=seed) if with_head is None else with_head
    keep_residual_in_float32(trained)
    return trained


def load_language_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Load the model that the recipe names as a causal language model, with nothing new.

    Raises:
        ValueError: it has no head that predicts the next word.
    """
    model, found = AutoModelForCausalLM.from_pretrained(
        resolve_path(recipe.model_name_or_path), output_loading_info=True, **_build_weight_options(recipe)
    )
    if found["missing_keys"]:
        raise ValueError(
            f"label_words={recipe.label_words}: {recipe.model_name_or_path} has no head that continues a text, by "
            "which the untouched model could be measured; name the classes in classes instead."
        )
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    keep_residual_in_float32(model)
    return model


def _load_weights(recipe: Recipe, options: Mapping[str, Any]) -> PreTrainedModel:
    if "id2label" in options:
        _refuse_renamed_outputs(recipe, list(options["id2label"].values()))
    try:
        return recipe.kind.auto_class(recipe).from_pretrained(resolve_path(recipe.model_name_or_path), **options)
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error) or "num_labels" not in options:
            raise
    raise ValueError(
        f"classes={', '.join(recipe.labels)}: the head of {recipe.model_name_or_path} has not {options['num_labels']} "
        "outputs; name as many classes as it has, or a model without a head."
    )


def _refuse_renamed_outputs(recipe: Recipe, names: Sequence[str]) -> None:
    """Raise `ValueError` if the model has the classes of the recipe in another order, so that they would be renamed."""
    config = AutoConfig.from_pretrained(resolve_path(recipe.model_name_or_path), **_build_source_options(recipe))
    present = [str(config.id2label[number]) for number in sorted(config.id2label)]
    ours, theirs = ([name.casefold() for name in listed] for listed in (names, present))
    if ours != theirs and sorted(ours) == sorted(theirs):
        raise ValueError(
            f"{name_classes_field(recipe)}={', '.join(names)}: the head of {recipe.model_name_or_path} has these "
            f"classes in the order {', '.join(present)}; name them so, in that order."
        )


def add_adapter(
    model: PreTrainedModel, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, seed: int
) -> torch.nn.Module:
    """Return `model` with the adapter that the recipe asks for, initialized from a public seed."""
    if recipe.adapter == "none":
        return model
    invocation = find_invocation_tokens(recipe, tokenizer)
    freeze_a = recipe.lora_freeze_a is not False
    return seeded_peft_model(model, _build_lora_config(recipe, invocation), seed=seed, freeze_a=freeze_a)


def load_rows(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, kept_column: str | None = None
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Return the encoded training rows, with the column `kept_column`, and the encoded evaluation rows.

    Rows of no token, and those of which no token is learned, are left out.

    Raises:
        ValueError: the rows can not be read, or can not become tokens, or nothing is left of them.
    """
    recipe.kind.check_tokenizer(recipe, tokenizer)
    find_invocation_tokens(recipe, tokenizer)  # It raises an error before data are read.
    train, evaluation = load_tables(recipe, unit_column=kept_column)
    train = _encode_rows(train, recipe, tokenizer, kept_column=kept_column)
    return train, None if evaluation is None else _sort_by_length(_encode_rows(evaluation, recipe, tokenizer))


def encode_table(rows: datasets.Dataset, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> datasets.Dataset:
    """Return `rows` of a table, encoded; those that the task can not use are left out, as in training.

    Raises:
        ValueError: they have not the columns that the recipe names, or can not become tokens, or nothing is left.
    """
    recipe.kind.check_tokenizer(recipe, tokenizer)
    return _encode_rows(select_rows(rows, recipe), recipe, tokenizer)


def load_held_out_rows(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, encoded_as: Recipe, unit_column: str | None
) -> datasets.Dataset:
    """Return the evaluation rows of `recipe`, encoded by another recipe, which has no say in which rows these are.

    Args:
        recipe: the recipe, which has evaluation rows.
        tokenizer: the tokenizer.
        encoded_as: the recipe that says how a row becomes tokens, by the same columns.
        unit_column: the column of the units of privacy, of which `eval_rows` holds out whole ones; `None` for rows.
    """
    _, evaluation = load_tables(recipe, unit_column=unit_column)
    return _sort_by_length(_encode_rows(evaluation, encoded_as, tokenizer))


def _build_weight_options(recipe: Recipe) -> dict[str, Any]:
    options = {**build_loading_options(recipe.dtype, recipe.quantization), **_build_source_options(recipe)}
    if recipe.gguf_file is not None:
        options["quantization_config"] = GgufConfig(dequantize=True)
    return options


def _build_source_options(recipe: Recipe) -> dict[str, Any]:
    options = {"revision": recipe.model_revision, "gguf_file": recipe.gguf_file}
    return {name: value for name, value in options.items() if value is not None}


def _build_lora_config(recipe: Recipe, invocation: list[int] | None) -> LoraConfig:
    trained = recipe.kind.trained_modules
    return LoraConfig(
        task_type=recipe.kind.peft_type(recipe),
        modules_to_save=None if trained is None else [*trained],
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        target_modules=recipe.lora_target_modules,
        layers_to_transform=recipe.lora_layers,
        alora_invocation_tokens=invocation,
    )


def _encode_rows(
    rows: datasets.Dataset, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, kept_column: str | None = None
) -> datasets.Dataset:
    options = {"recipe": recipe, "tokenizer": tokenizer, "names": _find_class_names(rows, recipe)}
    options["invocation"] = find_invocation_tokens(recipe, tokenizer)
    if kept_column is not None and kept_column in rows.column_names and rows.features[kept_column] == Json():
        rows = rows.map(_read_unit, input_columns=kept_column, fn_kwargs={"column": kept_column})
    removed = [name for name in rows.column_names if name != kept_column]
    first = next((place for place, row in enumerate(rows) if _is_learned(_encode_row(row, **options))), None)
    if first is None:
        raise ValueError(f"data={recipe.data}: {recipe.kind.explain_nothing_learned(rows, recipe)}.")
    settings = {"fn_kwargs": options, "remove_columns": removed}
    with uncounted_bar("Tokenizing", total=len(rows) + 1):
        # A row that is learned has the types of all. Those of empty rows in front of it would be taken for no type.
        features = rows.select([first]).map(_encode_row, **settings).features
        encoded = rows.map(_encode_row, features=features, **settings)
    decisive = [name for name in ("input_ids", "labels") if name in encoded.column_names]
    return keep_rows(encoded, decisive, _is_learned)


def _is_learned(row: Mapping[str, Any]) -> bool:
    """Return whether an encoded row has tokens, and labels of which one at least counts."""
    labels = row.get("labels")
    return bool(row.get("input_ids", True)) and not (
        isinstance(labels, list) and all(one == IGNORE_INDEX for one in labels)
    )


def _find_class_names(rows: datasets.Dataset, recipe: Recipe) -> dict[str, list[str]]:
    """Return by column the names of classes that data state, where the recipe calls its classes by these names."""
    named = {}
    for column in recipe.used_columns:
        feature = rows.features[column]
        feature = feature.feature if isinstance(feature, List) else feature
        if isinstance(feature, ClassLabel) and {*recipe.labels} <= {*feature.names}:
            named[column] = feature.names
    return named


def _encode_row(
    row: Mapping[str, Any],
    *,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    names: Mapping[str, list[str]],
    invocation: list[int] | None,
) -> dict[str, Any]:
    advance()
    named = {column: _name_classes(row[column], classes) for column, classes in names.items()}
    try:
        encoded = recipe.kind.encode({**row, **named}, recipe, tokenizer)
        return encoded if invocation is None else ignore_base_tokens(encoded, invocation)
    except Exception as error:
        # Those of this project hold no value of a row. What others say may.
        if isinstance(error, ValueError) and not isinstance(error, UnicodeError):
            raise
        reason = type(error).__name__
    raise ValueError(
        f"task={recipe.task}: a row can not become tokens ({reason}); check the values in "
        f"{', '.join(recipe.used_columns)}."
    )


def _name_classes(cell: Any, classes: list[str]) -> Any:
    if isinstance(cell, list):
        return [_name_classes(item, classes) for item in cell]
    # Rows without a class have -1 in many data sets.
    return classes[cell] if isinstance(cell, int) and 0 <= cell < len(classes) else cell


def _read_unit(cell: Any, *, column: str) -> dict[str, str]:
    return {column: to_text(cell, column)}


def _sort_by_length(rows: datasets.Dataset) -> datasets.Dataset:
    """Sort rows by length, so that batches need little padding. No metric depends on their order."""
    if "input_ids" not in rows.column_names:
        return rows
    lengths = [len(ids) for ids in rows["input_ids"]]
    return rows.select(sorted(range(len(rows)), key=lengths.__getitem__))
