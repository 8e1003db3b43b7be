"""Chooses the loss of a model. A new head is a file beside this one, and an entry of `HEADS`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers.models.auto import modeling_auto
from transformers.utils.generic import find_labels

from hf_dpzo.losses.causal_lm import CausalLMLoss
from hf_dpzo.losses.features import FeatureClassificationLoss
from hf_dpzo.losses.function import FunctionLoss
from hf_dpzo.losses.masked_lm import MaskedLMLoss
from hf_dpzo.losses.multiple_choice import MultipleChoiceLoss
from hf_dpzo.losses.own import OwnLoss
from hf_dpzo.losses.per_example import PerExampleLoss
from hf_dpzo.losses.question_answering import QuestionAnsweringLoss
from hf_dpzo.losses.seq2seq import Seq2SeqLoss
from hf_dpzo.losses.sequence_classification import SequenceClassificationLoss
from hf_dpzo.losses.token_classification import TokenClassificationLoss
from hf_dpzo.models.feature_classifier import FeatureClassifier
from hf_dpzo.models.unwrap import accepts_argument, class_name, unwrap_model


@dataclass(frozen=True, kw_only=True)
class Head:
    """A kind of head, which the tables of transformers' auto classes list.

    Args:
        task: what it does, in words.
        labels: what a row's labels are: a class, or numbers in its place; classes of tokens; places; a choice; written
            tokens; or tokens that are read.
        loss: its loss, built from a model.
        tables: the names of the tables, between MODEL_FOR_ and _MAPPING_NAMES.
    """

    task: str
    labels: str
    loss: Callable[[torch.nn.Module], PerExampleLoss]
    tables: tuple[str, ...]

    @cached_property
    def architectures(self) -> frozenset[str]:
        """The names of the model classes that have this head."""
        return frozenset(name for table in self.tables for name in read_table(table))


# A class that several tables list has the first of these heads.
HEADS = (
    Head(
        task="classify a text, or predict numbers for it",
        labels="class",
        loss=SequenceClassificationLoss,
        tables=("SEQUENCE_CLASSIFICATION",),
    ),
    Head(
        task="classify each token",
        labels="classes of tokens",
        loss=TokenClassificationLoss,
        tables=("TOKEN_CLASSIFICATION",),
    ),
    Head(
        task="find an answer in a text",
        labels="places",
        loss=QuestionAnsweringLoss,
        tables=("QUESTION_ANSWERING",),
    ),
    Head(task="choose one of several texts", labels="choice", loss=MultipleChoiceLoss, tables=("MULTIPLE_CHOICE",)),
    Head(
        task="write a sequence from another one, or from sounds",
        labels="written tokens",
        loss=Seq2SeqLoss,
        tables=("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ"),
    ),
    Head(task="fill in masked tokens", labels="read tokens", loss=MaskedLMLoss, tables=("MASKED_LM",)),
    Head(task="continue a text", labels="read tokens", loss=CausalLMLoss, tables=("CAUSAL_LM",)),
    Head(task="classify an image", labels="class", loss=SequenceClassificationLoss, tables=("IMAGE_CLASSIFICATION",)),
    Head(task="classify a video", labels="class", loss=SequenceClassificationLoss, tables=("VIDEO_CLASSIFICATION",)),
    Head(task="classify sounds", labels="class", loss=SequenceClassificationLoss, tables=("AUDIO_CLASSIFICATION",)),
)


FEATURE_HEAD = Head(
    task="classify the features of a frozen model",
    labels="class",
    loss=FeatureClassificationLoss,
    tables=(),
)


# Of any other model, the loss that it returns itself.
OTHER_HEAD = Head(task="any other, with labels", labels="any", loss=OwnLoss, tables=())


# Classes whose loss is another one than that of their table: two compare what they return at a token with that token's
# label and see the tokens behind it too, and two predict several tokens at once.
OWN_LOSSES = ("CpmAntForCausalLM", "XLNetLMHeadModel", "ProphetNetForCausalLM", "ProphetNetForConditionalGeneration")


def find_head(model: torch.nn.Module) -> Head | None:
    """Return the head of `model`; `None` for a model that computes no loss, such as one without a head.

    A subclass has the head of the class that it is derived from. What computes its loss in a way of its own, by its own
    `forward` or `loss_function`, is not known as any head, and is trained on what it returns.
    """
    base = unwrap_model(model)
    if isinstance(base, FeatureClassifier):
        return FEATURE_HEAD
    for kind in type(base).__mro__:
        head = next((head for head in HEADS if kind.__name__ in head.architectures), None)
        if head is not None and kind.__module__.startswith("transformers."):
            return head if _has_stock_loss(base, kind) and _is_listed_rightly(base, head) else OTHER_HEAD
    return OTHER_HEAD if find_labels(type(base)) else None


def find_written_fields(model: torch.nn.Module) -> tuple[str, ...]:
    """Return the names of the inputs with the tokens that `model` writes, if it reads others; else none."""
    head = find_head(model)
    return ("labels", "decoder_input_ids", "decoder_attention_mask") if head and head.loss is Seq2SeqLoss else ()


def as_loss(loss: PerExampleLoss | Callable[..., torch.Tensor] | None, model: torch.nn.Module) -> PerExampleLoss:
    """Return `loss` as a `PerExampleLoss`.

    Args:
        loss: a `PerExampleLoss`; a function `(model, inputs) -> [batch]`, which is wrapped; or `None` for the loss that
            belongs to the model's head.
        model: the model to be trained.

    Raises:
        ValueError: `loss` is `None`, and the model's head is not known.
    """
    if loss is None:
        return build_head_loss(model)
    if isinstance(loss, PerExampleLoss):
        return loss
    head = find_head(model)
    return FunctionLoss(loss, None if head is None or head is OTHER_HEAD else head.loss(model))


def build_head_loss(model: torch.nn.Module) -> PerExampleLoss:
    """Return the per-example loss that belongs to the head of `model`.

    Raises:
        ValueError: the head is not known.
    """
    head = find_head(model)
    if head is None:
        raise ValueError(
            f"model={class_name(unwrap_model(model))}: no per-example loss is known for this head; pass "
            "per_example_loss, a function (model, inputs) that returns one loss for each row, shape [batch]."
        )
    return head.loss(model)


def read_table(table: str) -> Iterator[str]:
    """Yield the names of the model classes in the table MODEL_FOR_`table`_MAPPING_NAMES of transformers."""
    for names in getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES").values():
        yield from (names,) if isinstance(names, str) else names


def list_bodies() -> Iterator[str]:
    """Yield the names of the model classes without a head, which read texts, images or sounds."""
    for names in modeling_auto.MODEL_MAPPING_NAMES.values():
        yield from (names,) if isinstance(names, str) else names


def _has_stock_loss(base: torch.nn.Module, kind: type) -> bool:
    """Return whether the model computes its loss as `kind` does, from which it is derived."""
    own = type(base)
    is_replaced = any("_loss_function" in vars(place) for place in (base, *own.__mro__))
    return own.forward is kind.forward and own.loss_function is kind.loss_function and not is_replaced


def _is_listed_rightly(base: torch.nn.Module, head: Head) -> bool:
    """Return whether the model is what its table says."""
    # The table of sequence-to-sequence models also lists decoders that read sounds, whose labels are shifted, and that
    # of answers a model that chooses one of a list.
    if head.loss is Seq2SeqLoss and not base.config.is_encoder_decoder:
        return False
    if head.loss is QuestionAnsweringLoss and not accepts_argument(base, "start_positions"):
        return False
    return class_name(base) not in OWN_LOSSES
