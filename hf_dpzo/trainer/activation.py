"""Refuses activated adapters that nothing would activate, by what is public about model, settings and rows.

A private row that is never activated contributes nothing, and nobody may learn of it. So what can be known before is
said before.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch._dynamo import OptimizedModule

from hf_dpzo.data.collation import copy_row
from hf_dpzo.data.first_rows import are_common
from hf_dpzo.data.pairs import split_pair
from hf_dpzo.isolation.measure import Rows, nonzero_parameters
from hf_dpzo.isolation.watched import watch_outputs
from hf_dpzo.models.activation import find_invocation, hold_invocation, locate_invocation
from hf_dpzo.models.switching import switched_adapter
from hf_dpzo.step.batch_losses import BatchLosses


_REMEDY = (
    "let each row hold these tokens, as the tokenizer writes them within a row, and where truncation cuts them off "
    "raise max_length"
)


def refuse_missing_invocation(model: torch.nn.Module, dataset: Any) -> None:
    """Raise `ValueError` if none of the first rows but one at most holds the tokens that activate the adapter."""
    tokens = find_invocation(model)
    if tokens is not None and are_common(dataset, lambda row: _lacks(row, tokens)):
        raise ValueError(
            f"alora_invocation_tokens={list(tokens)}: the first rows of train_dataset do not hold them, and such rows "
            f"are the base and would contribute nothing; {_REMEDY}."
        )


def _lacks(row: Mapping[str, Any], tokens: Sequence[int]) -> bool:
    texts = [torch.as_tensor(text["input_ids"]) for text in split_pair(dict(row)) if "input_ids" in text]
    return any(text.ndim == 1 and bool(locate_invocation(text[None], tokens) < 0) for text in texts)


def refuse_unactivated_rows(name: str, rows: Iterable[Any], collate: Callable, tokens: Sequence[int]) -> None:
    """Raise `ValueError` if public rows do not hold the invocation; the message counts them.

    Args:
        name: what the rows are, for messages.
        rows: public rows, as the collator gets them.
        collate: the collator.
        tokens: the tokens of the invocation.
    """
    held = [bool(hold_invocation(collate([copy_row(row)]), tokens, rows=1)) for row in rows]
    if not all(held):
        raise ValueError(
            f"{name}: {held.count(False)} of its {len(held)} rows do not hold alora_invocation_tokens={list(tokens)}, "
            f"and such rows are the base and would contribute nothing to training; {_REMEDY}."
        )


def refuse_activating_padding(
    losses: BatchLosses, rows: Rows, tokens: Sequence[int], *, padding_token: int | None
) -> None:
    """Raise `ValueError` where padding could be part of an invocation, so that a row's neighbours would decide on it.

    Args:
        losses: the losses of a logical batch.
        rows: public rows, which are collated to see what pads them.
        tokens: the tokens of the invocation.
        padding_token: the token by which the tokenizer pads; `None` for none.
    """
    if losses.collator.micro_batch_size == 1:
        return
    inputs: Mapping[str, Any] = {}
    with suppress(Exception):  # A collator that cannot pad, for rows of one length, fails on those that are made up.
        inputs = losses.collator.collate([copy_row(row) for row in rows])
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    is_seen = isinstance(ids, torch.Tensor) and isinstance(mask, torch.Tensor) and ids.shape == mask.shape
    padding = {padding_token, *(ids[mask == 0].tolist() if is_seen else ())}
    found = next((token for token in tokens if token in padding), None)
    if found is not None:
        raise ValueError(
            f"alora_invocation_tokens={list(tokens)}: rows are padded with {found} too, so that a row's neighbours "
            "would decide whether it activates the adapter; pad with another token, or set "
            "per_device_train_batch_size=1."
        )


def refuse_inactive_adapter(model: torch.nn.Module, losses: BatchLosses, rows: Rows) -> None:
    """Raise `ValueError` if on public rows the adapter, filled with noise, moves nothing that the model computes.

    PEFT activates it only where its own model is called, and with tokens: not where a loss calls the model inside, or
    passes embeddings.

    Args:
        model: the model as it is trained.
        losses: the losses of a logical batch, as in training.
        rows: public rows that hold the invocation.
    """
    eager = model._orig_mod if isinstance(model, OptimizedModule) else model
    watched = watch_outputs(losses)
    with nonzero_parameters([p for p in eager.parameters() if p.requires_grad]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of embeddings at each call.
        moved = watched.of_public(eager, rows)
        with switched_adapter(eager, None):
            base = watched.of_public(eager, rows)
    if torch.equal(moved.nan_to_num(), base.nan_to_num()):
        raise ValueError(
            f"alora_invocation_tokens={list(find_invocation(eager) or ())}: on public rows the adapter moved nothing "
            "that the model computes, so that it is never activated; let the loss call the model that it is given, "
            "with input_ids, or leave alora_invocation_tokens out."
        )


def foresee_activation(
    model: torch.nn.Module,
    losses: BatchLosses,
    batches: Sequence[Rows],
    *,
    named_rows: Iterable[tuple[str, Iterable[Any]]],
    padding_token: int | None,
    num_beams: int | None,
) -> None:
    """Raise `ValueError` if public rows show that nothing, or that padding, would activate the adapter of `model`.

    PEFT refuses to generate by several beams, and that would only show after training.

    Args:
        model: the model as it is trained.
        losses: the losses of a logical batch, as in training.
        batches: batches of public rows, which may be made up.
        named_rows: what public rows are, for messages, and these rows, as the collator gets them.
        padding_token: the token by which the tokenizer pads; `None` for none.
        num_beams: the number of beams by which texts are predicted; `None` for one.
    """
    tokens = losses.invocation
    if tokens is None:
        return
    if (num_beams or 1) > 1:
        raise ValueError(
            f"generation_num_beams={num_beams}: PEFT does no beam search with an activated adapter; set 1, or leave "
            "alora_invocation_tokens out."
        )
    for name, rows in named_rows:
        refuse_unactivated_rows(name, rows, losses.collator.collate, tokens)
    for rows in batches:
        refuse_activating_padding(losses, rows, tokens, padding_token=padding_token)
    for rows in batches[:1]:
        refuse_inactive_adapter(model, losses, rows)
