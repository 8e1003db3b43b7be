"""The auditing Trainer, combined with a trainer of TRL: its rows, its loss and its metrics, of each row alone."""

import copy
import functools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from hf_dpzo.arguments.joined import find_joined_fields, refuse_unread_loss_fields
from hf_dpzo.data.pairs import TEXT_COLUMNS
from hf_dpzo.data.sealed import WithheldError, run_sealed
from hf_dpzo.data.silence import silence
from hf_dpzo.distributed.processes import get_processes
from hf_dpzo.distributed.sharding import is_sharded
from hf_dpzo.losses.dft import DFTLoss
from hf_dpzo.losses.heads import as_loss
from hf_dpzo.losses.per_example import PerExampleLoss, Scores
from hf_dpzo.losses.preference import DPOLoss, RewardLoss
from hf_dpzo.trainer.features import FeatureTrainer
from hf_dpzo.trainer.joined_losses import JOINED_LOSSES
from hf_dpzo.trainer.overrides import refuse_overrides


# The names that TRL gives to how often the preferred text has the larger reward, to the mean difference of the rewards,
# and to the means of both.
REWARD_METRICS = {
    RewardLoss: ("accuracy", "margin", "chosen_reward", "rejected_reward"),
    DPOLoss: ("rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected"),
}


class JoiningTrainer(FeatureTrainer):
    """An auditing Trainer that may be combined with TRL's SFTTrainer, RewardTrainer or DPOTrainer.

    What these do in a training step of their own is done by the loss of each row. Without such a class, this one only
    refuses hooks that training would ignore.
    """

    # The rows that the user passed. Those that are trained on were made from them.
    _passed_rows: Any = None
    # The class of TRL, or `None`.
    _joined_class: type | None = None
    # Whether the user has passed a loss, which replaces that of the class of TRL.
    _has_own_loss: bool = False
    # Whether preparing the rows that were passed says nothing about them.
    _is_silent: bool = False
    # The rewards of evaluated pairs, and their number.
    _reward_sums: torch.Tensor | None = None

    # ---- Before the trainer is built ----

    def __init_subclass__(cls, **options: Any) -> None:
        """Raise `TypeError` for a class that puts another trainer before this one, and so would keep its steps."""
        super().__init_subclass__(**options)
        before = cls.__mro__[1 : cls.__mro__.index(JoiningTrainer)]
        others = [kind for kind in before if issubclass(kind, Trainer) and not issubclass(kind, JoiningTrainer)]
        if others:
            raise TypeError(
                f"{cls.__name__}: {others[0].__name__} comes before ZOTrainer, so that rows are prepared and evaluated "
                f"by it alone; write class {cls.__name__}(ZOTrainer, {others[0].__name__})."
            )

    def _join(self, args: Any, passed_rows: Any, *, own_loss: bool) -> None:
        """Find the class of TRL, and refuse what would be ignored. Nothing is built yet."""
        self._passed_rows, self._is_silent, self._has_own_loss = passed_rows, args.private, own_loss
        self._joined_class = _find_trl_class(type(self))
        self._refuse_overrides()
        if self._joined_class is None:
            return
        config = self._joined_class.__name__.removesuffix("Trainer") + "Config"
        if find_joined_fields(args) is None or find_joined_fields(args)[0].__name__ != config:
            raise ValueError(
                f"args={type(args).__name__}: {self._joined_class.__name__} reads the fields of {config}; pass "
                f"ZO{config} of hf_dpzo.trl, or a dataclass that inherits from ZOTrainingArguments and {config}."
            )
        if own_loss:
            refuse_unread_loss_fields(args)

    def _refuse_overrides(self) -> None:
        """Raise `ValueError` for hooks that a class, or the instance, overrides, and training would ignore."""
        refuse_overrides(self, joined=self._joined_class, replaces_loss=self._has_own_loss)

    def _complete_arguments(self, model: Any, others: Mapping[str, Any], args: Any) -> dict[str, Any]:
        """Return the arguments of DPOTrainer with a reference model, where it would look for one at a path."""
        needs_model = self._is_dpo and others.get("ref_model") is None and not args.precompute_ref_log_probs
        has_adapter = isinstance(model, PeftModel) or others.get("peft_config") is not None
        if not needs_model or has_adapter or not isinstance(model, PreTrainedModel):
            return dict(others)
        return {**others, "ref_model": copy.deepcopy(model).requires_grad_(False)}

    @property
    def _is_dpo(self) -> bool:
        return self._joined_class is not None and self._joined_class.__name__ == "DPOTrainer"

    def _refuse_model(self) -> None:
        """Refuse what cannot be trained, and a balance of experts, which TRL adds to the loss of models that have some.

        Raises:
            ValueError: the model cannot be trained.
        """
        if self._joined_class is not None and getattr(self, "aux_loss_enabled", False):
            raise ValueError(
                f"router_aux_loss_coef={self.router_aux_loss_coef}: it weighs how a whole batch is spread over "
                "experts, which is no loss of a row; set 0."
            )
        super()._refuse_model()

    def _build_loss(self, loss: PerExampleLoss | Callable | None) -> PerExampleLoss:
        """Return the loss that the user passed, that of the joined class, or that of the model's head."""
        if self._joined_class is None or loss is not None:
            return as_loss(loss, self.model)
        if self._is_dpo and self.ref_model is not None:
            self._broadcast_weights(self.ref_model)
        return JOINED_LOSSES[self._joined_class.__name__](self, self._joined_class)

    # ---- Rows ----

    def _prepare_dataset(self, dataset: Any, *args: Any, **options: Any) -> Any:
        """Prepare rows as TRL does, but say nothing about private ones, of which its warnings would show a part."""
        with silence() if self._is_silent and dataset is self._passed_rows else nullcontext():
            return super()._prepare_dataset(dataset, *args, **options)

    def _prepare_probe_rows(self, rows: list[Mapping[str, Any]] | None) -> list[Mapping[str, Any]] | None:
        """Return public rows in the form that training rows have been given; they may be in that form already."""
        if self._joined_class is None or rows is None:
            return rows
        dataset = Dataset.from_list([dict(row) for row in rows])
        if not {*dataset.column_names} & {*TEXT_COLUMNS}:
            options = (False, self._formatting_func) if self._joined_class.__name__ == "SFTTrainer" else ()
            dataset = self._prepare_dataset(dataset, self.processing_class, self.args, *options, "probe")
        if self._is_dpo and self.args.precompute_ref_log_probs and "ref_chosen_logps" not in dataset.column_names:
            dataset = self._precompute_ref_logps(dataset, "probe", 1)
        return list(dataset)

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """Return `dataset` with the reference of each pair, in the columns of DPOTrainer, which calls this.

        Pairs are evaluated one by one, so that none moves another one. No file is written. A private pair on which the
        reference fails has NaN, and contributes nothing.
        """
        self._broadcast_weights(self.ref_model or self.model)
        evaluate = functools.partial(_evaluate_reference, self, is_private=name == "train" and self.args.private)
        size, rank = self.accelerator.num_processes, self.accelerator.process_index
        share = logging.tqdm(range(rank, len(dataset), size), desc="Reference", disable=self.args.disable_tqdm)
        own = torch.full((-(-len(dataset) // size), 2), torch.nan, device=self.args.device)
        for place, index in enumerate(share):
            own[place] = evaluate(functools.partial(dataset.__getitem__, index))
        # Row number i is number i // size of process i % size.
        rows = self.accelerator.gather(own).unflatten(0, (size, -1)).transpose(0, 1).flatten(0, 1)[: len(dataset)]
        columns = ("ref_chosen_logps", "ref_rejected_logps")
        for column, values in zip(columns, rows.cpu().unbind(dim=1), strict=True):
            dataset = dataset.add_column(column, values.tolist())
        return dataset

    def _broadcast_weights(self, model: torch.nn.Module) -> None:
        """Give a reference the weights of the first process, as what is trained gets them when training begins."""
        if not isinstance(model, PeftModel):  # Of which the base is compared.
            whole = (parameter for parameter in model.parameters() if not is_sharded([parameter]))
            get_processes(self.args.device).broadcast_tensors_(whole)

    # ---- Evaluation ----

    def _refuse_training_data(self, dataset: Any) -> None:
        """Refuse the training rows also in the form in which the user passed them."""
        super()._refuse_training_data(dataset)
        if self._joined_class is not None and dataset is not None and dataset is self._passed_rows:
            super()._refuse_training_data(self.train_dataset)

    def _evaluate_batch(
        self, model: torch.nn.Module, inputs: dict[str, Any], prediction_loss_only: bool
    ) -> tuple[torch.Tensor | None, Scores | None]:
        """Return the mean loss and the scores; of pairs, both rewards. Each row is evaluated once."""
        if self._joined_class is None:
            return super()._evaluate_batch(model, inputs, prediction_loss_only)
        loss = self.per_example_loss
        # Logits are large. What DFT is trained on is not the loss that it publishes.
        if prediction_loss_only and type(loss) not in REWARD_METRICS and not isinstance(loss, DFTLoss):
            return loss(model, inputs).mean(), None
        losses, scores = loss.evaluate(model, inputs)
        if type(loss) in REWARD_METRICS:
            self._count_rewards(scores)
        return losses.mean(), scores

    def _read_labels(self, inputs: Mapping[str, Any]) -> Any:
        """Return the labels; a class of TRL may name none, though its rows have some."""
        return super()._read_labels(inputs) if self._joined_class is None else inputs.get("labels")

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate or predict as stock does; of pairs, also how often the preferred text has the larger reward."""
        self._reward_sums = None
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self._reward_sums is not None:
            means = (self._reward_sums[:-1] / self._reward_sums[-1]).tolist()
            names = REWARD_METRICS[type(self.per_example_loss)]
            output.metrics.update(
                {f"{metric_key_prefix}_{name}": mean for name, mean in zip(names, means, strict=True)}
            )
        return output

    def _count_rewards(self, rewards: torch.Tensor) -> None:
        """Add the rewards of evaluated pairs, `[pairs, 2]`, of all processes."""
        chosen, rejected = self.accelerator.gather_for_metrics(rewards.contiguous()).double().unbind(dim=1)
        values = [(chosen > rejected).double(), chosen - rejected, chosen, rejected, torch.ones_like(chosen)]
        sums = torch.stack([value.sum() for value in values])
        self._reward_sums = sums if self._reward_sums is None else self._reward_sums + sums


def _evaluate_reference(trainer: JoiningTrainer, read: Callable[[], dict], *, is_private: bool) -> torch.Tensor:
    """Return the reference of one pair, `[2]`; NaN for a private one on which it fails."""
    model = (trainer.ref_model or trainer.model).eval()

    def compute() -> torch.Tensor:
        inputs = trainer._prepare_inputs(trainer.data_collator([read()]))
        return torch.cat(trainer.compute_ref_log_probs(model, inputs))

    if not is_private:
        return compute()
    try:
        return run_sealed("ref_model", compute)
    except WithheldError:
        return torch.full((2,), torch.nan)


def _find_trl_class(kind: type) -> type | None:
    """Return the trainer of TRL that `kind` inherits; raise `ValueError` for one whose loss is not known."""
    of_trl = [owner for owner in kind.__mro__ if owner.__module__.partition(".")[0] == "trl"]
    known = [owner for owner in of_trl if owner.__name__ in JOINED_LOSSES]
    if of_trl and of_trl[0] not in known:
        names = ", ".join(JOINED_LOSSES)
        raise ValueError(
            f"class={kind.__name__}: ZOTrainer does not know the loss of one row of {of_trl[0].__name__}; combine it "
            f"with one of {names}, or pass rows that are prepared, and per_example_loss, to ZOTrainer itself."
        )
    return known[0] if known else None
