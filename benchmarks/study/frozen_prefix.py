"""The lower layers of a decoder, evaluated once for each row.

They are frozen in every run of the study, and below every adapter, so what they compute never changes. What is trained
is the rest of the same model, on their outputs in place of token embeddings. It computes what the whole model computes.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def outputs_of_layers(model: PreTrainedModel, rows: Any, count: int) -> list[dict[str, Any]]:
    """Return the rows with the outputs of the first `count` layers, `[tokens, width]`, in place of their tokens."""
    cached = []
    for row in rows:
        hidden = model(torch.tensor([row["input_ids"]]), output_hidden_states=True, logits_to_keep=1).hidden_states
        cached.append({"inputs_embeds": hidden[count][0], "labels": row["labels"]})
    return cached


def without_layers(model: PreTrainedModel, count: int) -> PreTrainedModel:
    """Return a copy of `model` without its first `count` layers."""
    rest = copy.deepcopy(model)
    rest.model.layers = rest.model.layers[count:]
    for number, layer in enumerate(rest.model.layers):
        layer.self_attn.layer_idx = number
    rest.config.num_hidden_layers -= count
    return rest


def collate(rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    """Pad rows of layer outputs on the left, where the prompts' tokenizer pads."""
    if tokenizer.padding_side != "left":
        raise ValueError(f"padding_side={tokenizer.padding_side!r}: prompts are padded on the left.")
    longest = max(len(row["inputs_embeds"]) for row in rows)
    states = [
        torch.nn.functional.pad(row["inputs_embeds"], (0, 0, longest - len(row["inputs_embeds"]), 0)) for row in rows
    ]
    masks = [[0] * (longest - len(row["inputs_embeds"])) + [1] * len(row["inputs_embeds"]) for row in rows]
    return {
        "inputs_embeds": torch.stack(states),
        "attention_mask": torch.tensor(masks),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }
