"""The losses of TRL's trainers, of each row alone, for a trainer that is combined with one of them.

TRL need not be installed: its classes are found among those that a trainer inherits.
"""

import copy
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from transformers import Trainer

from hf_dpzo.losses.causal_lm import CausalLMLoss
from hf_dpzo.losses.dft import DFTLoss
from hf_dpzo.losses.per_example import PerExampleLoss
from hf_dpzo.losses.preference import DPOLoss, PairArithmetic, RewardLoss
from hf_dpzo.losses.reference import AdapterReference, ModelReference
from hf_dpzo.models.unwrap import Inputs


class TRLArithmetic(PairArithmetic):
    """What DPOTrainer itself computes, given the log-probabilities of a pair's tokens. Its metrics are dropped.

    Args:
        trainer: a trainer that inherits from DPOTrainer.
        kind: DPOTrainer.
    """

    def __init__(self, trainer: Trainer, kind: type) -> None:
        self._kind = kind
        # Of this copy, nothing that DPOTrainer writes is kept, and nothing that it gathers is sent.
        self._quiet = copy.copy(trainer)
        self._quiet.accelerator = SimpleNamespace(
            device=trainer.accelerator.device,
            autocast=nullcontext,
            gather=_drop,
            gather_for_metrics=_drop,
        )
        self._quiet.precompute_ref_logps = True  # The reference is given.
        self._quiet.aux_loss_enabled = False
        # No model is called, switched to another adapter, or asked for more than this.
        self._quiet.model = self._quiet.ref_model = SimpleNamespace(training=False, is_gradient_checkpointing=False)

    def sum_tokens(self, inputs: Inputs, log_probs: torch.Tensor) -> torch.Tensor:
        """Return the log-probabilities of both texts of one pair, `[2]`."""
        return torch.cat(self._kind.compute_ref_log_probs(self._quiet, _Evaluated(log_probs), dict(inputs)))

    def compute_loss(self, inputs: Inputs, log_probs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """Return the loss of one pair, a scalar."""
        self._quiet._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        given = {"ref_chosen_logps": reference[:1], "ref_rejected_logps": reference[1:]}
        return self._kind._compute_loss(self._quiet, _Evaluated(log_probs), {**inputs, **given}, False)


class _Evaluated:
    """Stands in for a model that has been called, and returns what DPOTrainer asks of it.

    Args:
        log_probs: the log-probabilities of the targets, `[2, tokens - 1]`.
    """

    def __init__(self, log_probs: torch.Tensor) -> None:
        # Only metrics are computed from the others.
        nothing = torch.zeros(log_probs.shape, device=log_probs.device)
        self._outputs = SimpleNamespace(
            log_probs=log_probs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool()
        )

    def __call__(self, **inputs: Any) -> SimpleNamespace:
        return self._outputs


def _drop(value: Any) -> torch.Tensor:
    """Stand in for a function that gathers a metric from all processes."""
    return torch.zeros(1)


def build_sft_loss(trainer: Trainer, kind: type) -> PerExampleLoss:
    """Return the loss of one row of SFTTrainer."""
    return (DFTLoss if trainer.args.loss_type == "dft" else CausalLMLoss)(trainer.model)


def build_reward_loss(trainer: Trainer, kind: type) -> PerExampleLoss:
    """Return the loss of one pair of RewardTrainer."""
    return RewardLoss(trainer.model, center=trainer.args.center_rewards_coefficient)


def build_dpo_loss(trainer: Trainer, kind: type) -> PerExampleLoss:
    """Return the loss of one pair of DPOTrainer."""
    if trainer.precompute_ref_logps:
        reference = None
    elif trainer.ref_model is None:
        if trainer.args.points_per_pass is not None:
            raise ValueError(
                f"points_per_pass={trainer.args.points_per_pass}: the reference is the model without its adapter, "
                "which cannot be switched off at several points at once; set precompute_ref_log_probs=True."
            )
        copied = "ref" if "ref" in trainer.model.peft_config else None
        reference = AdapterReference(trainer.model, adapter=copied)
    else:
        refuse_shared_reference(trainer.model, trainer.ref_model)
        reference = ModelReference(trainer.ref_model)
    arithmetic = TRLArithmetic(trainer, kind)
    return DPOLoss(trainer.model, arithmetic=arithmetic, reference=reference, beta=trainer.beta)


def refuse_shared_reference(model: torch.nn.Module, reference: torch.nn.Module) -> None:
    """Raise `ValueError` if the reference holds something that is trained, and would move with it."""
    trained = {parameter.data_ptr() for parameter in model.parameters() if parameter.requires_grad}
    if trained & {parameter.data_ptr() for parameter in reference.parameters()}:
        raise ValueError("ref_model: it shares weights with what is trained, and would move too; pass a copy.deepcopy.")


# By the names of TRL's classes.
JOINED_LOSSES: dict[str, Callable[[Trainer, type], PerExampleLoss]] = {
    "SFTTrainer": build_sft_loss,
    "RewardTrainer": build_reward_loss,
    "DPOTrainer": build_dpo_loss,
}
