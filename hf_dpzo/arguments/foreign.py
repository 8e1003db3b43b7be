"""Names by which other libraries call what recipes and `ZOTrainingArguments` call otherwise, or can not honour."""

import functools
from collections.abc import Collection
from dataclasses import fields
from typing import Any, TypeVar

from hf_dpzo.arguments.joined import JOINED_FIELDS


Kind = TypeVar("Kind", bound=type)


_PACKED = (
    "a packed row holds several examples, and one row is what is protected; leave it out, and set padded_lengths for "
    "rows of one public shape"
)
_LEARNED = (
    "a recipe learns the assistant's turns alone by task=chat, and the response alone by task=causal-lm with template "
    "and response, and in Python labels of -100 are left out; leave it out"
)
_CUT = "a recipe cuts rows by max_length, and in Python they are cut when they are tokenized; set that"
_FILES = "a recipe names its data in data, and eval_data, eval_split or eval_rows to evaluate on; set these"
_BASE = "a recipe says how the model is loaded by dtype and quantization; set these, or load the model in Python"
_ADAPTER = (
    "a recipe's adapter is set by adapter, lora_r, lora_alpha, lora_target_modules and lora_layers, and in Python by "
    "peft; set these"
)
_TOKENIZER = "it belongs to the tokenizer; save it with the tokenizer beside the model"
_NOTHING = "there is nothing that it would change here; leave it out"
_CLIP = "a row's directional derivatives are clipped, not a gradient; set clip_norm"
_DRAWN = "batches are Poisson samples, which the guarantee depends on; leave it out"
_BATCH = "how many rows a batch has on average is public; set expected_batch_size"
_OVERWRITTEN = (
    "a log is never overwritten; name another output_dir, or go on with its run by resume_from_checkpoint=true"
)


# By name: why it is no field, and what to do instead.
FOREIGN_FIELDS = {
    **dict.fromkeys(("packing", "eval_packing", "packing_strategy", "sample_packing", "multipack"), _PACKED),
    "padding_free": "it joins the rows of a batch, which are kept apart here; leave it out",
    **dict.fromkeys(
        ("completion_only_loss", "assistant_only_loss", "train_on_inputs", "train_on_responses_only", "mask_prompt"),
        _LEARNED,
    ),
    **dict.fromkeys(("max_seq_length", "max_length", "max_prompt_length", "model_max_length"), _CUT),
    **dict.fromkeys(("cutoff_len", "sequence_len", "truncation_mode"), _CUT),
    "pad_to_multiple_of": "rows are padded to public lengths, so that none moves another; set padded_lengths",
    "dataset_text_field": "a recipe writes a row's text by template, with columns in braces; set template='{text}'",
    **dict.fromkeys(("dataset", "datasets", "dataset_name", "dataset_path", "train_file", "validation_file"), _FILES),
    **dict.fromkeys(("eval_dataset", "dataset_test_split", "val_set_size"), _FILES),
    "dataset_config": "a recipe names it in data_config; set that",
    "dataset_train_split": "a recipe names it in train_split; set that",
    **dict.fromkeys(("dataset_kwargs", "dataset_num_proc", "dataset_streaming", "shuffle_dataset"), _NOTHING),
    "neftune": "losses are compared without dropout or other noise; leave it out",
    **dict.fromkeys(("torch_dtype", "load_in_4bit", "load_in_8bit", "model_init_kwargs", "attn_implementation"), _BASE),
    "trust_remote_code": "a recipe runs no code of a model; load it in Python",
    **dict.fromkeys(("use_peft", "peft_config", "lora_rank", "lora_dropout", "lora_bias", "lora_task_type"), _ADAPTER),
    **dict.fromkeys(("lora_modules_to_save", "target_modules", "use_rslora", "use_dora", "finetuning_type"), _ADAPTER),
    **dict.fromkeys(("chat_template", "chat_template_path", "eos_token", "pad_token"), _TOKENIZER),
    **dict.fromkeys(
        ("max_per_sample_grad_norm", "per_sample_max_grad_norm", "per_sample_max_gradient_norm"),
        _CLIP,
    ),
    "dpzero_clip_threshold": "it is called clip_norm here; set that",
    **dict.fromkeys(("zo_eps", "zero_order_eps"), "it is called smoothing here; set that"),
    **dict.fromkeys(("zero_order_sample", "num_perturbations"), "it is called num_directions here; set that"),
    **dict.fromkeys(("epsilon", "dp_epsilon"), "it is called target_epsilon here; set that"),
    **dict.fromkeys(("delta", "dp_delta"), "it is called target_delta here; set that"),
    **dict.fromkeys(("batch_size", "train_batch_size", "micro_batch_size"), _BATCH),
    **dict.fromkeys(("sample_rate", "dp_sample_rate"), _BATCH),
    **dict.fromkeys(("poisson_sampling", "group_by_length", "secure_mode"), _DRAWN),
    **dict.fromkeys(("epochs", "num_epochs"), "it is called num_train_epochs here; set that, or max_steps"),
    "evaluation_strategy": "it is called eval_strategy here, as in transformers 5; set that",
    "warmup_ratio": "it is called warmup_steps here, as in transformers 5, where a number below 1 is a share; set that",
    **dict.fromkeys(("per_gpu_train_batch_size", "per_gpu_eval_batch_size"), "its name has per_device; set that"),
    "no_cuda": "it is called use_cpu here, as in transformers 5; set that",
    "overwrite_output_dir": _OVERWRITTEN,
    "logging_dir": "a tracker is chosen by report_to, which knows where it writes; leave it out",
}


def explain_foreign_name(name: str) -> str | None:
    """Return why `name` is no field, and what to do instead, as one sentence; `None` for a name that is not known.

    >>> explain_foreign_name("dp_epsilon")
    'dp_epsilon: it is called target_epsilon here; set that.'
    >>> explain_foreign_name("center_rewards_coefficient")
    'center_rewards_coefficient: it is a field of RewardConfig; in Python, pass ZORewardConfig of hf_dpzo.trl.'
    """
    if name in FOREIGN_FIELDS:
        return f"{name}: {FOREIGN_FIELDS[name]}."
    for owner, joined in JOINED_FIELDS.items():
        if name in joined.refused:
            return f"{name}: {joined.refused[name]}."
        if name in joined.known:
            return f"{name}: it is a field of {owner}; in Python, pass ZO{owner} of hf_dpzo.trl."
    return None


def refuse_foreign_names(names: Collection[str], known: Collection[str]) -> None:
    """Raise `ValueError` for the first of `names` that is not `known` here, but elsewhere."""
    for name in names:
        sentence = None if name in known else explain_foreign_name(name)
        if sentence is not None:
            raise ValueError(sentence)


def explains_foreign_names(kind: Kind) -> Kind:
    """Return the dataclass `kind`, which says of a name of another library what to do, before Python refuses it."""
    build = kind.__init__
    known = {entry.name for entry in fields(kind) if entry.init}

    @functools.wraps(build)
    def explain_or_build(self: Any, *values: Any, **named: Any) -> None:
        refuse_foreign_names(named, known)
        build(self, *values, **named)

    setattr(kind, "__init__", explain_or_build)  # noqa: B010
    return kind
