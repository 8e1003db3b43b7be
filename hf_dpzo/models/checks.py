"""Models that can not be trained, or whose rows are not kept apart, are refused before any data are touched."""

from typing import Any

import torch
from peft import PeftModel
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from hf_dpzo.distributed.sharding import find_fsdp_roots, get_local_shard, is_sharded
from hf_dpzo.models.precision import refuse_shared_scales
from hf_dpzo.models.unwrap import class_name, is_decoder, is_prompt_tuned, unwrap_model


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


def refuse_left_padding(model: torch.nn.Module, tokenizer: Any) -> None:
    """Raise `ValueError` where left padding would move the positions of a row, and with them its loss."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or tokenizer.padding_side != "left":
        return
    if is_prompt_tuned(model) or not is_decoder(unwrap_model(model)):
        raise ValueError(
            f"padding_side=left: positions in {class_name(unwrap_model(model))} would depend on the longest row; set "
            "tokenizer.padding_side='right'."
        )


# How accelerate calls one process, and several of which each has a model of its own making.
SUPPORTED_DISTRIBUTED_TYPES = ("NO", "MULTI_CPU", "MULTI_GPU")


def refuse_unsupported_sharding(model: torch.nn.Module, args: TrainingArguments, *, distributed_type: str) -> None:
    """Raise `ValueError` for a model that is split in a way that can not be trained.

    Args:
        model: to be trained.
        args: of the run.
        distributed_type: how accelerate calls the way in which processes work together.
    """
    if distributed_type not in SUPPORTED_DISTRIBUTED_TYPES:
        raise ValueError(
            f"distributed_type={distributed_type}: it would change the model behind the optimizer's back; launch with "
            "--multi_gpu, or by torchrun, and split a model that is too large by fully_shard."
        )
    base = unwrap_model(model)
    loaded = getattr(base.config, "distributed_config", None) if isinstance(base, PreTrainedModel) else None
    for kind in () if loaded is None else ("tp_size", "pp_size", "ep_size"):
        if (getattr(loaded, kind) or 1) > 1:
            raise ValueError(
                f"{kind}={getattr(loaded, kind)}: its processes have no rows of their own; set fsdp_size instead."
            )
    split = {name: one for name, one in [*model.named_parameters(), *model.named_buffers()] if is_sharded([one])}
    if not split:
        return
    name = next(iter(split))
    for module in model.modules():
        # torch 2.13 shows the policy nowhere else. Remove when it does.
        kind = module._get_fsdp_state()._mp_policy.param_dtype if isinstance(module, FSDPModule) else None
        if kind is not None and kind.itemsize < 4:
            raise ValueError(
                f"mp_policy: weights would be gathered in {kind}, which rounds what is trained too; load a frozen base "
                "in that type, and train a float32 adapter."
            )
    if not find_fsdp_roots(model):
        raise ValueError(f"model: {name} is split, and not by fully_shard, which alone is supported; load it so.")
    for one in split.values():
        get_local_shard(one)
    unfit = {
        "parallel": (args.parallel != "examples", "all processes have to be at the same point; set examples"),
        "points_per_pass": (args.points_per_pass is not None, "it needs whole parameters; remove it"),
        "load_best_model_at_end": (args.load_best_model_at_end, "a checkpoint is not taken apart again; set False"),
    }
    for setting, (made, remedy) in unfit.items():
        if made:
            raise ValueError(f"{setting}={getattr(args, setting)}: {name} is split over processes, and {remedy}.")


def refuse_sharded_parameters(model: torch.nn.Module, args: TrainingArguments, *, is_stateful: bool) -> None:
    """Raise `ValueError` where what is trained is split, and is to be moved or published in a way that needs all of it.

    Args:
        model: to be trained.
        args: of the run.
        is_stateful: whether a step depends on more than the parameters.
    """
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    split = [name for name, one in trained.items() if is_sharded([one])]
    remedy = "or add an adapter after the model is split: that is whole in each process"
    if split and len(split) < len(trained):
        alone = min(set(trained) - set(split))
        raise ValueError(
            f"model: {split[0]} is trained in parts and {alone} is not, which stock puts apart, so that directions are "
            f"numbered in another order; split all that is trained by fully_shard(model), {remedy}."
        )
    if split and is_stateful:
        raise ValueError(
            f"model: {split[0]} is trained and split over processes, and moments, constraints and masks need all of "
            f"it; use the update sgd of a method without constraint or mask, {remedy}."
        )
    if split and args.push_to_hub:
        raise ValueError(
            f"push_to_hub=True: {split[0]} is trained and split over processes, and one of them would push alone; "
            f"call save_model in all and upload the folder, {remedy}."
        )
