"""What would break the claim, or would be silently ignored, is refused before any data are touched.

Every message is one sentence: the value, the reason, the remedy.
"""

from collections.abc import Iterable, Sized
from typing import Any

import torch
from transformers import DataCollatorWithFlattening, EarlyStoppingCallback, TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames


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
        "use_liger_kernel": (args.use_liger_kernel, "it fuses a loss over the batch; remove it"),
        "deepspeed": (args.deepspeed, "its engine never calls the zeroth-order update; run without it"),
        "fsdp": (args.fsdp, "sharded parameters can not be perturbed yet; run without it"),
        "n_gpu": (
            args.n_gpu > 1,
            "nn.DataParallel would split a batch behind the sampler's back; set CUDA_VISIBLE_DEVICES to one device",
        ),
        "world_size": (args.world_size > 1, "several processes are not supported yet; launch one"),
        "push_to_hub": (
            args.push_to_hub,
            "commits made while training would carry weights without their guarantee; upload the folder afterwards",
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
        # Arguments of TRL's configurations, which subclasses may add.
        "packing": (
            _added(args, "packing"),
            "a packed row holds several examples, and one row is what is protected; remove it",
        ),
        "padding_free": (_added(args, "padding_free"), "it joins the rows of a batch; remove it"),
    }
    _raise_first((name, _value(args, name), reason) for name, (refuse, reason) in refused.items() if refuse)
    if args.private:
        _refuse_for_privacy(args)


def _refuse_for_privacy(args: TrainingArguments) -> None:
    steers = "it lets the evaluation data choose the model; set eval_data_is_public=True if they are"
    refused = {
        "fp16": (args.fp16, "16-bit rounding lets rows of a batch move each other's losses; train in float32"),
        "bf16": (args.bf16, "16-bit rounding lets rows of a batch move each other's losses; train in float32"),
        "load_best_model_at_end": (args.load_best_model_at_end and not args.eval_data_is_public, steers),
        "lr_scheduler_type": (args.lr_scheduler_type in METRIC_SCHEDULERS and not args.eval_data_is_public, steers),
    }
    _raise_first((name, _value(args, name), reason) for name, (refuse, reason) in refused.items() if refuse)


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
                f"parameter={name}: it is trained in {parameter.dtype}, which perturbing in place would wear away; "
                "load the model with dtype=torch.float32, or train an adapter."
            )
        if not parameter.is_contiguous():
            raise ValueError(f"parameter={name}: it is not contiguous in memory; call .contiguous() on it first.")
    if private:
        _refuse_coupling(model)


def _refuse_coupling(model: torch.nn.Module) -> None:
    """Refuse models in which one row's loss is known to depend on the other rows of its batch."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.element_size() < 4:
            raise ValueError(
                f"parameter={name}: it is {parameter.dtype}, and 16-bit rounding lets rows of a batch move each "
                "other's losses; load the model with dtype=torch.float32."
            )
    config = model.config.to_dict() if hasattr(model, "config") else {}
    if config.get("output_router_logits"):
        raise ValueError(
            "output_router_logits=True: the router's auxiliary loss couples the rows of a batch; set it to False."
        )


def refuse_parts(
    *, dataset: Any, data_collator: Any, callbacks: Iterable[Any], compute_loss_func: Any, optimizers: tuple, args: Any
) -> None:
    """Raise `ValueError` for parts handed to the trainer that would break the claim or be ignored."""
    if dataset is not None and (
        isinstance(dataset, torch.utils.data.IterableDataset) or not isinstance(dataset, Sized)
    ):
        raise ValueError(
            f"train_dataset={type(dataset).__name__}: an iterable has no length to sample from; load it with "
            "datasets.Dataset.from_generator, which keeps it on disk."
        )
    if isinstance(data_collator, DataCollatorWithFlattening):
        raise ValueError(
            "data_collator=DataCollatorWithFlattening: it joins the rows of a batch; use a padding collator."
        )
    if compute_loss_func is not None:
        raise ValueError(
            "compute_loss_func: it returns one number for a batch; pass per_example_loss, which returns one for each."
        )
    if any(part is not None for part in optimizers):
        raise ValueError(
            "optimizers: the update is made by ZOOptimizer; set learning_rate and lr_scheduler_type instead."
        )
    refuse_callbacks(callbacks, args)


def refuse_callbacks(callbacks: Iterable[Any], args: Any) -> None:
    """Raise `ValueError` for callbacks that let unreleased data steer the run."""
    early = any(isinstance(one, EarlyStoppingCallback) or one is EarlyStoppingCallback for one in callbacks)
    if early and args.private and not args.eval_data_is_public:
        raise ValueError(
            "callbacks=EarlyStoppingCallback: it lets the evaluation data end the run; set eval_data_is_public=True if "
            "they are."
        )


def _added(args: TrainingArguments, name: str) -> bool:
    return bool(getattr(args, name, False))


def _value(args: TrainingArguments, name: str) -> Any:
    value = args
    for part in name.split("."):
        value = getattr(value, part)
    return value.value if isinstance(value, OptimizerNames | SchedulerType) else value


def _raise_first(refused: Iterable[tuple[str, Any, str]]) -> None:
    for name, value, reason in refused:
        raise ValueError(f"{name}={value}: {reason}.")
