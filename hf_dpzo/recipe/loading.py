"""From a recipe to a model and to rows of tokens."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig, TaskType
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_dpzo.losses.prompting import Template
from hf_dpzo.models.location import find_cached_commit, resolve_path
from hf_dpzo.models.precision import build_loading_options
from hf_dpzo.models.seeded import publicly_seeded, seeded_peft_model
from hf_dpzo.recipe.recipe import Recipe


FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Load the tokenizer, with padding where the task wants it."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_path(recipe.model_name_or_path), **_build_source_options(recipe))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left" if recipe.uses_prompt and not recipe.fills_mask else "right"
    return tokenizer


def load_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> torch.nn.Module:
    """Load the model as the recipe asks, with its float32 adapter. What is new in it comes from `seed`."""
    options = {**build_loading_options(recipe.dtype, recipe.quantization), **_build_source_options(recipe)}
    if recipe.gguf_file is not None:
        options["quantization_config"] = GgufConfig(dequantize=True)
    if recipe.task == "sequence-classification":
        options["num_labels"] = len(recipe.labels)
    with publicly_seeded(seed):
        model = _choose_auto_class(recipe).from_pretrained(resolve_path(recipe.model_name_or_path), **options)
    if recipe.model_revision is not None:
        model.config._commit_hash = find_cached_commit(recipe.model_name_or_path, recipe.model_revision)
    # What a card calls the model: where the recipe found it, not where this machine keeps it.
    model.config.name_or_path = "/".join(filter(None, (recipe.model_name_or_path, recipe.gguf_file)))
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return add_adapter(model, recipe, seed=seed)


def add_adapter(model: PreTrainedModel, recipe: Recipe, *, seed: int) -> torch.nn.Module:
    """Return `model` with the adapter that the recipe asks for, initialized from a public seed."""
    return model if recipe.adapter == "none" else seeded_peft_model(model, _build_lora_config(recipe), seed=seed)


def load_tables(recipe: Recipe) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Return the training rows and the evaluation rows, as the data have them."""
    train = _load_split(recipe.data, recipe.data_config, recipe.train_split)
    evaluation = None
    if recipe.eval_data is not None:
        if resolve_path(recipe.eval_data) == resolve_path(recipe.data):
            raise ValueError(
                f"eval_data={recipe.eval_data}: it is the training data; name another file, or set eval_rows."
            )
        evaluation = _load_split(recipe.eval_data, None, "train")
    elif recipe.eval_split is not None:
        if recipe.eval_split == recipe.train_split:
            raise ValueError(f"eval_split={recipe.eval_split}: it is the training data; name another split.")
        evaluation = _load_split(recipe.data, recipe.data_config, recipe.eval_split)
    train, evaluation = (None if rows is None else _filter_rows(rows, recipe) for rows in (train, evaluation))
    if evaluation is None and recipe.eval_rows is not None:
        if not 0 < recipe.eval_rows < len(train):
            raise ValueError(f"eval_rows={recipe.eval_rows}: the data have {len(train)} rows; hold out fewer.")
        halves = train.train_test_split(test_size=recipe.eval_rows, seed=recipe.split_seed)
        train, evaluation = halves["train"], halves["test"]
    return train, evaluation


def load_rows(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, kept_column: str | None = None
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Return the encoded training rows, with the column `kept_column`, and the encoded evaluation rows."""
    train, evaluation = load_tables(recipe)
    train = _encode_rows(train, recipe, tokenizer, kept_column=kept_column)
    return train, None if evaluation is None else _sort_by_length(_encode_rows(evaluation, recipe, tokenizer))


def _build_source_options(recipe: Recipe) -> dict[str, Any]:
    given = {"revision": recipe.model_revision, "gguf_file": recipe.gguf_file}
    return {name: value for name, value in given.items() if value is not None}


def _choose_auto_class(recipe: Recipe) -> type:
    if recipe.task == "sequence-classification":
        return AutoModelForSequenceClassification
    return AutoModelForMaskedLM if recipe.fills_mask else AutoModelForCausalLM


def _build_lora_config(recipe: Recipe) -> LoraConfig:
    causal_or_head = TaskType.SEQ_CLS if recipe.task == "sequence-classification" else TaskType.CAUSAL_LM
    return LoraConfig(
        task_type=None if recipe.fills_mask else causal_or_head,
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        target_modules=recipe.lora_target_modules,
        layers_to_transform=recipe.lora_layers,
    )


def _load_split(path: str, config: str | None, split: str) -> datasets.Dataset:
    resolved = resolve_path(path)
    kind = FORMATS.get(Path(resolved).suffix)
    if kind is None:
        return datasets.load_dataset(resolved, config, split=split)
    if not Path(resolved).is_file():
        raise ValueError(f"data={path}: no such file.")
    if split != "train":
        raise ValueError(f"split={split}: a file has no splits; name the other file as eval_data, or set eval_rows.")
    return datasets.load_dataset(kind, data_files=resolved, split="train")


def _filter_rows(rows: datasets.Dataset, recipe: Recipe) -> datasets.Dataset:
    wanted = recipe.where_values
    missing = set(wanted) - set(rows.column_names)
    if missing:
        raise ValueError(f"where={recipe.where}: the data have no column {sorted(missing)[0]}.")
    return rows.filter(lambda row: all(row[name] == value for name, value in wanted.items())) if wanted else rows


def _encode_rows(
    rows: datasets.Dataset, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, kept_column: str | None = None
) -> datasets.Dataset:
    columns = [*Template(template=recipe.template).fields]
    if recipe.task != "causal-lm":
        columns.append(recipe.label_column)
    elif recipe.response is not None:
        columns.extend(Template(template=recipe.response).fields)
    missing = set(columns) - set(rows.column_names)
    if missing:
        names = ", ".join(rows.column_names)
        raise ValueError(f"template={recipe.template!r}: the data have no column {sorted(missing)[0]}, only {names}.")
    encode = _encode_text if recipe.task == "causal-lm" else _encode_example
    options = {"recipe": recipe, "tokenizer": tokenizer}
    removed = [name for name in rows.column_names if name != kept_column]
    return rows.map(encode, fn_kwargs=options, remove_columns=removed, desc="Tokenizing")


def _sort_by_length(rows: datasets.Dataset) -> datasets.Dataset:
    """The same rows, so that those of a batch are padded little. No metric depends on their order."""
    lengths = [len(ids) for ids in rows["input_ids"]]
    return rows.select(sorted(range(len(rows)), key=lengths.__getitem__))


def _encode_example(row: Mapping[str, Any], *, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A text and its class."""
    label = str(row[recipe.label_column])
    if label not in recipe.labels:
        raise ValueError(f"label_words={recipe.label_words}: a row has another label; name every class.")
    encoded = Template(template=recipe.template).encode(row, tokenizer, recipe.max_length)
    return {**encoded, "labels": recipe.labels.index(label)}


def _encode_text(row: Mapping[str, Any], *, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A text of which all tokens are learned, or those of the response alone."""
    template = Template(template=recipe.template)
    if recipe.response is None:
        encoded = template.encode(row, tokenizer, recipe.max_length)
        return {**encoded, "labels": encoded["input_ids"]}
    response = Template(template=recipe.response).encode(row, tokenizer, recipe.max_length // 2)["input_ids"]
    response = [*response, tokenizer.eos_token_id]
    given = template.encode(row, tokenizer, recipe.max_length - len(response))["input_ids"]
    return {
        "input_ids": [*given, *response],
        "attention_mask": [1] * (len(given) + len(response)),
        "labels": [-100] * len(given) + response,
    }
