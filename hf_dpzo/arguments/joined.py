"""What the configurations of TRL's trainers add to the arguments: each field is honoured, refused, or never read.

The tables go by the names of the classes, so that TRL need not be installed. A test compares them with its fields.
"""

from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field
from typing import Any

from transformers import TrainingArguments


@dataclass(frozen=True, kw_only=True)
class JoinedFields:
    """The fields that a configuration adds, by what becomes of them.

    Args:
        prepares: fields that are read before training, when the model, the tokenizer and the rows are prepared.
        loss: fields that only the loss reads, all of which it honours.
        refused: fields that must keep their default, each with the reason and the remedy.
        unread: fields that nothing reads, because another one is refused.
    """

    prepares: frozenset[str]
    loss: frozenset[str]
    refused: Mapping[str, str]
    unread: frozenset[str] = field(default_factory=frozenset)

    @property
    def known(self) -> frozenset[str]:
        """The names of all fields that are known."""
        return self.prepares | self.loss | self.unread | {*self.refused}


_LOADED = {
    "model_init_kwargs",
    "trust_remote_code",
    "dataset_num_proc",
    "max_length",
    "pad_to_multiple_of",
    "pad_token",
}


_REFUSED = {
    "activation_offloading": "without a backward pass no activations are kept that could be moved away; remove it",
}


_ROUTER = {
    "router_aux_loss_coef": "it weighs how a whole batch is spread over experts, which is no loss of a row; set 0",
}


# These are refused of any configuration that has them.
_PADDING_FREE = {"padding_free": "it joins the rows of a batch; remove it"}


_PACKING = {"packing": "a packed row holds several examples, and one row is what is protected; remove it"}


JOINED_FIELDS = {
    "SFTConfig": JoinedFields(
        prepares=frozenset(
            {
                *_LOADED,
                "chat_template_path",
                "dataset_text_field",
                "dataset_kwargs",
                "eos_token",
                "truncation_mode",
                "shuffle_dataset",
                "completion_only_loss",
                "assistant_only_loss",
            }
        ),
        loss=frozenset({"loss_type"}),
        refused={
            **_REFUSED,
            **_ROUTER,
            **_PADDING_FREE,
            **_PACKING,
            "eval_packing": "a packed row holds several examples, and the loss is the mean of single ones; remove it",
        },
        unread=frozenset({"packing_strategy"}),
    ),
    "RewardConfig": JoinedFields(
        prepares=frozenset({*_LOADED, "chat_template_path", "disable_dropout", "eos_token"}),
        loss=frozenset({"center_rewards_coefficient"}),
        refused=_REFUSED,
    ),
    "DPOConfig": JoinedFields(
        prepares=frozenset({*_LOADED, "disable_dropout", "truncation_mode", "precompute_ref_log_probs"}),
        loss=frozenset(
            {
                "loss_type",
                "loss_weights",
                "beta",
                "label_smoothing",
                "ld_alpha",
                "f_divergence_type",
                "f_alpha_divergence_coef",
                "discopop_tau",
            }
        ),
        refused={
            **_REFUSED,
            **_ROUTER,
            **_PADDING_FREE,
            "precompute_ref_batch_size": "the reference is evaluated row by row, which keeps rows apart; remove it",
            "use_weighting": (
                "its weights are constants to a gradient, but a difference of losses would train them too; remove it"
            ),
            "sync_ref_model": "the reference is what the run began from, also where it is resumed; remove it",
        },
        unread=frozenset({"ref_model_mixup_alpha", "ref_model_sync_steps"}),
    ),
}


# Losses of DPO that are no losses of one pair.
_SORTED = {"aot", "aot_unpaired"}


def find_joined_fields(args: Any) -> tuple[type, JoinedFields] | None:
    """Return the configuration of TRL that the class of `args` inherits, and what becomes of its fields."""
    for kind in type(args).__mro__:
        if kind.__module__.partition(".")[0] == "trl" and kind.__name__ in JOINED_FIELDS:
            return kind, JOINED_FIELDS[kind.__name__]
    return None


def explain_joined_arguments(args: Any) -> dict[str, str]:
    """Return why fields of a joined configuration are refused: this library cannot honour, or does not know them."""
    refused = {name: reason for name, reason in {**_PACKING, **_PADDING_FREE}.items() if getattr(args, name, False)}
    joined = find_joined_fields(args)
    if joined is None:
        return refused
    kind, fields = joined
    for name, declared in list_added_fields(kind).items():
        value = getattr(args, name)
        if value == get_default(declared) or (name == "router_aux_loss_coef" and not value):
            continue
        if name in fields.refused:
            refused[name] = fields.refused[name]
        elif name not in fields.known:
            refused[name] = (
                f"this version of hf_dpzo does not know what {kind.__name__} means by it, and would ignore it; remove "
                "it"
            )
    kinds = getattr(args, "loss_type", None)
    if _SORTED & {*([kinds] if isinstance(kinds, str) else kinds or ())}:
        refused["loss_type"] = (
            "aot and aot_unpaired sort the pairs of a batch, and are no loss of one pair; choose sigmoid, which they "
            "are for a single pair"
        )
    return refused


def refuse_unread_loss_fields(args: Any) -> None:
    """Raise `ValueError` for fields that only the joined trainer's loss would read, where another loss replaces it."""
    joined = find_joined_fields(args)
    if joined is None:
        return
    kind, fields = joined
    for name, declared in list_added_fields(kind).items():
        if name in fields.loss and getattr(args, name) != get_default(declared):
            raise ValueError(
                f"{name}={getattr(args, name)}: per_example_loss replaces the loss that reads it; remove one of them."
            )


def list_added_fields(kind: type) -> dict[str, Field]:
    """Return the fields that a configuration adds to those of `transformers.TrainingArguments`."""
    stock = TrainingArguments.__dataclass_fields__
    return {name: declared for name, declared in kind.__dataclass_fields__.items() if name not in stock}


def get_default(declared: Field) -> Any:
    """Return the default of a field."""
    return declared.default if declared.default_factory is MISSING else declared.default_factory()
