"""Refusals of models that cannot be trained or that couple rows, before any data are touched."""

from typing import Any

import torch
from peft import PeftModel
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from hf_dpzo.distributed.sharding import find_fsdp_roots, get_local_shard, is_sharded
from hf_dpzo.models.activation import refuse_activation
from hf_dpzo.models.precision import refuse_packed_gguf, refuse_shared_scales
from hf_dpzo.models.reloading import refuse_inexact_reload
from hf_dpzo.models.unwrap import class_name, is_decoder, is_prompt_tuned, unwrap_model


def refuse_model(model: torch.nn.Module, *, private: bool) -> None:
    """Raise `ValueError` for a model whose parameters cannot be perturbed, or for one that is known to couple rows.

    An adapter that nothing would activate, or that would not be loaded as it was trained, is refused too, and so are
    weights of GGUF that are still packed.

    Args:
        model: the model to be trained.
        private: whether the run is private. Only then coupled rows are refused.
    """
    refuse_packed_gguf(model)
    refuse_activation(model)
    refuse_inexact_reload(model)
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
    """Raise `ValueError` if one row's loss is known to depend on the other rows of its batch."""
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
    """Raise `ValueError` if left padding would shift a row's positions, and with them its loss."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or tokenizer.padding_side != "left":
        return
    if is_prompt_tuned(model) or not is_decoder(unwrap_model(model)):
        raise ValueError(
            f"padding_side=left: positions in {class_name(unwrap_model(model))} would depend on the longest row; set "
            "tokenizer.padding_side='right'."
        )


# accelerate's names for one process, and for several processes that each run the model as the user built it.
SUPPORTED_DISTRIBUTED_TYPES = ("NO", "MULTI_CPU", "MULTI_GPU")


def refuse_unsupported_sharding(model: torch.nn.Module, args: TrainingArguments, *, distributed_type: str) -> None:
    """Raise `ValueError` for a model that is sharded in a way that cannot be trained.

    Args:
        model: the model to be trained.
        args: the run's arguments.
        distributed_type: accelerate's name for the way in which processes work together.
    """
    _refuse_unsupported_parallelism(model, distributed_type)
    sharded = {name: p for name, p in [*model.named_parameters(), *model.named_buffers()] if is_sharded([p])}
    if not sharded:
        return
    name = next(iter(sharded))
    _refuse_reduced_gathering(model)
    if not find_fsdp_roots(model):
        raise ValueError(f"model: {name} is split, and not by fully_shard, which alone is supported; load it so.")
    for tensor in sharded.values():
        get_local_shard(tensor)
    unsupported = {
        "parallel": (args.parallel != "examples", "all processes have to be at the same point; set examples"),
        "points_per_pass": (args.points_per_pass is not None, "it needs whole parameters; remove it"),
        "load_best_model_at_end": (args.load_best_model_at_end, "a checkpoint is not taken apart again; set False"),
    }
    for setting, (is_set, remedy) in unsupported.items():
        if is_set:
            raise ValueError(f"{setting}={getattr(args, setting)}: {name} is split over processes, and {remedy}.")


def _refuse_unsupported_parallelism(model: torch.nn.Module, distributed_type: str) -> None:
    if distributed_type not in SUPPORTED_DISTRIBUTED_TYPES:
        raise ValueError(
            f"distributed_type={distributed_type}: it would change the model behind the optimizer's back; launch with "
            "--multi_gpu, or by torchrun, and split a model that is too large by fully_shard."
        )
    base = unwrap_model(model)
    config = getattr(base.config, "distributed_config", None) if isinstance(base, PreTrainedModel) else None
    for setting in () if config is None else ("tp_size", "pp_size", "ep_size"):
        if (getattr(config, setting) or 1) > 1:
            raise ValueError(
                f"{setting}={getattr(config, setting)}: its processes have no rows of their own; set fsdp_size instead."
            )


def _refuse_reduced_gathering(model: torch.nn.Module) -> None:
    """Raise `ValueError` if FSDP would gather weights in fewer than 32 bits."""
    for module in model.modules():
        # The private attribute is the only way to the policy in torch 2.13. Remove when there is a public one.
        dtype = module._get_fsdp_state()._mp_policy.param_dtype if isinstance(module, FSDPModule) else None
        if dtype is not None and dtype.itemsize < 4:
            raise ValueError(
                f"mp_policy: weights would be gathered in {dtype}, which rounds what is trained too; load a frozen "
                "base in that type, and train a float32 adapter."
            )


def refuse_sharded_parameters(model: torch.nn.Module, args: TrainingArguments, *, is_stateful: bool) -> None:
    """Raise `ValueError` if trained parameters are sharded, but the run would move or publish them as a whole.

    Args:
        model: the model to be trained.
        args: the run's arguments.
        is_stateful: whether a step depends on more than the parameters.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    sharded = [name for name, parameter in trained.items() if is_sharded([parameter])]
    remedy = "or add an adapter after the model is split: that is whole in each process"
    if sharded and len(sharded) < len(trained):
        whole = min(set(trained) - set(sharded))
        raise ValueError(
            f"model: {sharded[0]} is trained in parts and {whole} is not, which stock puts apart, so that directions "
            f"are numbered in another order; split all that is trained by fully_shard(model), {remedy}."
        )
    if sharded and is_stateful:
        raise ValueError(
            f"model: {sharded[0]} is trained and split over processes, and moments, constraints and masks need all of "
            f"it; use the update sgd of a method without constraint or mask, {remedy}."
        )
    if sharded and args.push_to_hub:
        raise ValueError(
            f"push_to_hub=True: {sharded[0]} is trained and split over processes, and one of them would push alone; "
            f"call save_model in all and upload the folder, {remedy}."
        )
