"""What would break the claim, or would be silently ignored, is refused before any data are touched.

Every message is one sentence: the value, the reason, the remedy.
"""

import os
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from transformers.integrations import WandbCallback
from transformers.trainer_utils import HubStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames

from hf_dpzo.descent import is_copied
from hf_dpzo.losses import is_decoder, is_prompt_tuned
from hf_dpzo.output_layer import class_name, unwrapped
from hf_dpzo.precision import refuse_shared_scales
from hf_dpzo.row_refusals import refuse_rows


# Models that a trainer of this process has trained: another one's card would not count what was spent on them.
_TRAINED: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
# In clip norms, for each row of a batch.
LARGEST_BOUND = 0.01
METRIC_SCHEDULERS = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
DEFAULT_OPTIMIZER = TrainingArguments.__dataclass_fields__["optim"].default


def refuse_arguments(args: TrainingArguments) -> None:
    """Raise `ValueError` for training arguments that this library can not honour."""
    refused = {
        "gradient_accumulation_steps": (
            args.gradient_accumulation_steps != 1,
            "a batch is cut into pieces of per_device_train_batch_size rows anyway; set expected_batch_size instead",
        ),
        "auto_find_batch_size": (
            args.auto_find_batch_size,
            "a retry after running out of memory would take a step twice; lower per_device_train_batch_size instead",
        ),
        "label_smoothing_factor": (
            args.label_smoothing_factor != 0,
            "it would be ignored; pass a per_example_loss that smooths each row",
        ),
        "neftune_noise_alpha": (
            args.neftune_noise_alpha is not None,
            "losses are compared without dropout or other noise; remove it",
        ),
        "optim": (
            args.optim != DEFAULT_OPTIMIZER,
            "there are no gradients for it to use; remove it",
        ),
        "max_grad_norm": (
            args.max_grad_norm != 0,
            "there is no gradient to clip; set clip_norm, which bounds one example's influence",
        ),
        "weight_decay": (args.weight_decay < 0, "it would make the parameters grow; set 0 or more"),
        "use_liger_kernel": (args.use_liger_kernel, "it fuses a loss over the batch; remove it"),
        "deepspeed": (args.deepspeed, "its engine never calls the zeroth-order update; run without it"),
        "fsdp": (args.fsdp, "accelerate would split the model behind the optimizer's back; split it by fully_shard"),
        "n_gpu": (
            args.n_gpu > 1,
            "nn.DataParallel would split a batch behind the sampler's back; set CUDA_VISIBLE_DEVICES to one device",
        ),
        "save_on_each_node": (args.save_on_each_node, "one process writes the log, and all read it; share the folder"),
        "push_trajectory": (
            args.push_trajectory and not args.push_to_hub,
            "nothing is pushed; set push_to_hub=True too, or run hf-dpzo push-log afterwards",
        ),
        "hub_strategy": (
            args.push_to_hub and args.hub_strategy not in (HubStrategy.END, HubStrategy.EVERY_SAVE),
            "a run goes on from the log, which every commit holds; set every_save, or end",
        ),
        "train_sampling_strategy": (
            args.train_sampling_strategy != "random",
            "batches are Poisson samples, which the guarantee depends on; remove it",
        ),
        "dataloader_drop_last": (args.dataloader_drop_last, "no Poisson batch may be dropped; remove it"),
        "accelerator_config.split_batches": (
            args.accelerator_config.split_batches,
            "batches are never split; remove it",
        ),
        "accelerator_config.dispatch_batches": (
            args.accelerator_config.dispatch_batches,
            "batches are drawn in each process; remove it",
        ),
        "include_num_input_tokens_seen": (
            args.include_num_input_tokens_seen != "no",
            "the number of tokens tells which rows were drawn; remove it",
        ),
        "audit": (args.audit and not args.private, "without noise nothing is claimed; remove it"),
        "points_per_pass": (
            args.points_per_pass is not None and args.parallel == "points",
            "points are spread over processes already; remove one of the two",
        ),
        "debug": (bool(args.debug), "it prints what the model computes on private rows; remove it"),
        "skip_memory_metrics": (not args.skip_memory_metrics, "peak memory follows the largest batch; remove it"),
        # Arguments of TRL's configurations, which subclasses may add.
        "packing": (
            _added(args, "packing"),
            "a packed row holds several examples, and one row is what is protected; remove it",
        ),
        "padding_free": (_added(args, "padding_free"), "it joins the rows of a batch; remove it"),
    }
    _raise_first(args, refused)
    if args.hub_token is not None:
        raise ValueError("hub_token: it would be saved beside the weights; run hf auth login, or set HF_TOKEN instead.")
    if args.private:
        _refuse_for_privacy(args)


def _refuse_for_privacy(args: TrainingArguments) -> None:
    steers = "it lets the evaluation data choose the model; set eval_data_is_public=True if they are"
    rounds = (
        "autocast rounds what is trained too, and may keep a copy of it from before it was perturbed; load a frozen "
        "base with dtype=torch.bfloat16, and train a float32 adapter"
    )
    refused = {
        "fp16": (args.fp16, rounds),
        "bf16": (args.bf16, rounds),
        "mixed_precision": (args.mixed_precision != "no", rounds),
        "fp16_full_eval": (args.fp16_full_eval, "it leaves the weights in 16 bits for training; remove it"),
        "bf16_full_eval": (args.bf16_full_eval, "it leaves the weights in 16 bits for training; remove it"),
        "tf32": (bool(args.tf32), "it rounds to 10 bits, which lets rows move each other's losses; remove it"),
        "save_strategy": (args.save_strategy == SaveStrategy.BEST and not args.eval_data_is_public, steers),
        "load_best_model_at_end": (args.load_best_model_at_end and not args.eval_data_is_public, steers),
        "lr_scheduler_type": (args.lr_scheduler_type in METRIC_SCHEDULERS and not args.eval_data_is_public, steers),
    }
    _raise_first(args, refused)


def refuse_model(model: torch.nn.Module, *, private: bool) -> None:
    """Raise `ValueError` for a model whose parameters can not be perturbed, or whose rows are not kept apart."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(
            "model: none of its parameters requires grad; add an adapter, or unfreeze what is to be trained."
        )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"parameter={name}: it is on the meta device, where changes are lost; load it into memory."
            )
    for name, parameter in trainable:
        if not parameter.is_floating_point() or parameter.element_size() < 4:
            raise ValueError(
                f"parameter={name}: it is trained in {parameter.dtype}, where walking to a probe point and back moves "
                "it farther than a step does; load the model with dtype=torch.float32, or train a float32 adapter."
            )
        if not parameter.is_contiguous():
            raise ValueError(f"parameter={name}: it is not contiguous in memory; call .contiguous() on it first.")
    if private:
        _refuse_coupling(model)


def _refuse_coupling(model: torch.nn.Module) -> None:
    """Refuse models in which one row's loss is known to depend on the other rows of its batch."""
    refuse_shared_scales(model)
    if torch.get_float32_matmul_precision() != "highest":
        raise ValueError(
            f"float32_matmul_precision={torch.get_float32_matmul_precision()}: rounded products let the rows of a "
            'batch move each other\'s losses; call torch.set_float32_matmul_precision("highest").'
        )
    config = model.config.to_dict() if isinstance(model, PreTrainedModel | PeftModel) else {}
    if config.get("output_router_logits"):
        raise ValueError(
            "output_router_logits=True: the router's auxiliary loss couples the rows of a batch; set it to False."
        )
    for rope_type in ("dynamic", "longrope"):
        if f"'rope_type': '{rope_type}'" in str(config):
            raise ValueError(
                f"rope_type={rope_type}: the positions of a row depend on the longest row of its batch; choose another "
                "rope_type, such as linear or yarn."
            )


def refuse_parts(*, dataset: Any, data_collator: Any, callbacks: Iterable[Any], args: Any) -> None:
    """Raise `ValueError` for parts handed to the trainer that would break the claim or be ignored."""
    if dataset is not None:
        refuse_rows(dataset, private=args.private, unit_column=args.privacy_unit_column)
    if isinstance(data_collator, DataCollatorWithFlattening):
        raise ValueError(
            "data_collator=DataCollatorWithFlattening: it joins the rows of a batch; use a padding collator."
        )
    if isinstance(data_collator, DataCollatorForLanguageModeling) and data_collator.mlm:
        raise ValueError(
            "data_collator=DataCollatorForLanguageModeling: its random masks make one row depend on the others; mask "
            "rows once, when they are tokenized."
        )
    given = {one if isinstance(one, type) else type(one) for one in callbacks}
    watched = os.environ.get("WANDB_WATCH")
    if watched in ("all", "parameters") and any(issubclass(one, WandbCallback) for one in given) and args.private:
        raise ValueError(
            f"WANDB_WATCH={watched}: it counts forward passes, whose number follows the sizes of batches; unset it."
        )
    if any(issubclass(one, EarlyStoppingCallback) for one in given) and args.private and not args.eval_data_is_public:
        raise ValueError(
            "callbacks=EarlyStoppingCallback: it lets the evaluation data end the run; set eval_data_is_public=True if "
            "they are."
        )


def refuse_replaced(compute_loss_func: Any, optimizers: tuple) -> None:
    """Raise `ValueError` for parts of the stock Trainer that zeroth-order training replaces."""
    if compute_loss_func is not None:
        raise ValueError(
            "compute_loss_func: it returns one number for a batch; pass per_example_loss, which returns one for each."
        )
    if any(part is not None for part in optimizers):
        raise ValueError(
            "optimizers: the update is made by ZOOptimizer; set learning_rate and lr_scheduler_type instead."
        )


def refuse_changed(args: Any, planned: Mapping[str, Any]) -> None:
    """Raise `ValueError` where `args` no longer hold the values that a budget was planned from."""
    for name, value in planned.items():
        now = getattr(args, name)
        if now != value:
            raise ValueError(f"{name}={now}: the budget was planned with {name}={value}; make a new trainer.")


def refuse_copies(model: torch.nn.Module, points_per_pass: int | None) -> None:
    """Raise `ValueError` where several probe points at once would be as many copies of much of the model."""
    if points_per_pass is not None and not is_copied(model, [p for p in model.parameters() if p.requires_grad]):
        raise ValueError(
            f"points_per_pass={points_per_pass}: more than a tenth of the model is trained, and each point would be a "
            "copy of that; remove it, or train an adapter."
        )


def refuse_bound(bound: float) -> None:
    """Raise `ValueError` where rounding would let rows move each other's part by more than the guarantee can ignore."""
    if bound > LARGEST_BOUND:
        raise ValueError(
            f"isolation: rounding lets rows of a batch move each other's part by {bound:.2g} clip norms; raise "
            "smoothing or clip_norm, or set padded_lengths or per_device_train_batch_size=1."
        )


def refuse_resuming(args: TrainingArguments) -> None:
    """Raise `ValueError` where a log does not hold all that a resumed run would need."""
    if args.lr_scheduler_type in METRIC_SCHEDULERS:
        raise ValueError(
            f"lr_scheduler_type={args.lr_scheduler_type.value}: it depends on evaluations, which a log does not hold; "
            "start a new run, or choose a schedule of the steps alone."
        )


def refuse_trained(model: torch.nn.Module) -> None:
    """Raise `ValueError` for a model that a trainer of this process has trained."""
    if model in _TRAINED:
        raise ValueError("model: another run has trained it, and a card counts one; load the model anew.")


def remember_trained(model: torch.nn.Module) -> None:
    """From now on `model` is one that a trainer of this process has trained."""
    _TRAINED.add(model)


def refuse_padding(model: torch.nn.Module, tokenizer: Any) -> None:
    """Raise `ValueError` where left padding would move the positions of a row, and with them its loss."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or tokenizer.padding_side != "left":
        return
    if is_prompt_tuned(model) or not is_decoder(unwrapped(model)):
        raise ValueError(
            f"padding_side=left: positions in {class_name(unwrapped(model))} would depend on the longest row; set "
            "tokenizer.padding_side='right'."
        )


def _added(args: TrainingArguments, name: str) -> bool:
    return bool(getattr(args, name, False))


def _value(args: TrainingArguments, name: str) -> Any:
    value = args
    for part in name.split("."):
        value = getattr(value, part)
    return value.value if isinstance(value, OptimizerNames | SchedulerType | SaveStrategy | HubStrategy) else value


def _raise_first(args: TrainingArguments, refused: Mapping[str, tuple[Any, str]]) -> None:
    """Raise for the first argument whose condition holds; `refused` gives each one's condition and reason."""
    for name, (condition, reason) in refused.items():
        if condition:
            raise ValueError(f"{name}={_value(args, name)}: {reason}.")
