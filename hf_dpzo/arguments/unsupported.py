"""Refuses training arguments that this library cannot honour.

Every argument gets one sentence: the value, the reason, the remedy. All of them are named at once.
"""

from collections.abc import Mapping
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames

from hf_dpzo.arguments.joined import explain_joined_arguments


METRIC_SCHEDULERS = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)


# The flags of transformers of which no value but the default is ever taken.
ALWAYS_REFUSED = {
    *("gradient_accumulation_steps", "auto_find_batch_size", "label_smoothing_factor", "neftune_noise_alpha", "optim"),
    *("max_grad_norm", "use_liger_kernel", "deepspeed", "fsdp", "save_on_each_node", "train_sampling_strategy"),
    *("dataloader_drop_last", "include_num_input_tokens_seen", "debug", "skip_memory_metrics", "hub_token"),
}


DEFAULT_OPTIMIZER = TrainingArguments.__dataclass_fields__["optim"].default


ROUNDING = (
    "autocast rounds what is trained too, and may keep a copy of it from before it was perturbed; load a frozen base "
    "with dtype=bfloat16, and train a float32 adapter"
)


def refuse_arguments(args: TrainingArguments) -> None:
    """Raise `ValueError` for training arguments that this library cannot honour."""
    refuse_given_arguments(args)
    refused = {
        "n_gpu": (
            args.n_gpu > 1,
            "nn.DataParallel would split a batch behind the sampler's back; set CUDA_VISIBLE_DEVICES to one device",
        ),
        "accelerator_config.split_batches": (
            args.accelerator_config.split_batches,
            "batches are never split; remove it",
        ),
        "accelerator_config.dispatch_batches": (
            args.accelerator_config.dispatch_batches,
            "batches are drawn in each process; remove it",
        ),
        "mixed_precision": (args.private and args.mixed_precision != "no", ROUNDING),
    }
    _refuse(args, refused)


def refuse_given_arguments(args: TrainingArguments) -> None:
    """Raise `ValueError` for arguments that can not be honoured, as they were given or as stock has prepared them.

    Of some that are refused here stock says first that this machine, or another argument, does not allow them. Whoever
    follows that is refused here then. So this is called before stock prepares what was given, too.
    """
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
        "include_num_input_tokens_seen": (
            args.include_num_input_tokens_seen not in ("no", False),
            "the number of tokens tells which rows were drawn; remove it",
        ),
        "audit": (args.audit and not args.private, "without noise nothing is claimed; remove it"),
        "points_per_pass": (
            args.points_per_pass is not None and args.parallel == "points",
            "points are spread over processes already; remove one of the two",
        ),
        "debug": (bool(args.debug), "it prints what the model computes on private rows; remove it"),
        "skip_memory_metrics": (not args.skip_memory_metrics, "peak memory follows the largest batch; remove it"),
    }
    joined = {name: (True, reason) for name, reason in explain_joined_arguments(args).items()}
    _refuse(args, {**refused, **joined, **(_list_against_privacy(args) if args.private else {})})
    if args.hub_token is not None:
        raise ValueError("hub_token: it would be saved beside the weights; run hf auth login, or set HF_TOKEN instead.")


def _list_against_privacy(args: TrainingArguments) -> dict[str, tuple[bool, str]]:
    steering = "it lets the evaluation data choose the model; set eval_data_is_public=True if they are"
    return {
        "fp16": (args.fp16, ROUNDING),
        "bf16": (args.bf16, ROUNDING),
        "fp16_full_eval": (args.fp16_full_eval, "it leaves the weights in 16 bits for training; remove it"),
        "bf16_full_eval": (args.bf16_full_eval, "it leaves the weights in 16 bits for training; remove it"),
        "tf32": (bool(args.tf32), "it rounds to 10 bits, which lets rows move each other's losses; remove it"),
        "save_strategy": (args.save_strategy == SaveStrategy.BEST and not args.eval_data_is_public, steering),
        "load_best_model_at_end": (args.load_best_model_at_end and not args.eval_data_is_public, steering),
        "lr_scheduler_type": (args.lr_scheduler_type in METRIC_SCHEDULERS and not args.eval_data_is_public, steering),
    }


def _read_value(args: TrainingArguments, name: str) -> Any:
    value = args
    for part in name.split("."):
        value = getattr(value, part)
    return value.value if isinstance(value, OptimizerNames | SchedulerType | SaveStrategy | HubStrategy) else value


def _refuse(args: TrainingArguments, refused: Mapping[str, tuple[Any, str]]) -> None:
    """Raise `ValueError` with a sentence for each argument in `refused`, with conditions and reasons, that holds."""
    sentences = [f"{name}={_read_value(args, name)}: {reason}." for name, (holds, reason) in refused.items() if holds]
    if sentences:
        raise ValueError(" ".join(sentences))
