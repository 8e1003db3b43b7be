"""What a tokenizer must say of itself when it is saved, so that it is used as it was in training."""

from typing import Any

from transformers import PreTrainedTokenizerBase


# Attributes that transformers 5.23 writes only if they were arguments of the tokenizer. Remove when it writes them.
SIDES = ("padding_side", "truncation_side")


def remember_sides(processing_class: Any) -> None:
    """Make a tokenizer, or that of a processor, save on which sides it pads and cuts, as it does now.

    A side that was set as an attribute is lost otherwise: the saved tokenizer pads on the right, and a model that was
    trained with padding on the left continues padding.

    Args:
        processing_class: a tokenizer, or anything else that is saved beside a model, which stays as it is.
    """
    for tokenizer in (processing_class, getattr(processing_class, "tokenizer", None)):
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            tokenizer.init_kwargs |= {side: getattr(tokenizer, side) for side in SIDES}
