"""Reads the hidden states that leave a given layer of a frozen model, without computing what comes after it."""

from typing import Any

import torch
from transformers import PreTrainedModel

from hf_dpzo.models.stopping import stopped_behind
from hf_dpzo.models.unwrap import accepts_argument, class_name, count_positions, is_decoder


def find_body(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model inside `model` that has no head. A model without a head is returned itself."""
    return model.base_model


def find_layers(body: PreTrainedModel) -> torch.nn.ModuleList:
    """Return the layers of `body` that read a text, from the first to the last: of several lists, the longest.

    Of a model with an encoder and a decoder, they are the encoder's.

    Raises:
        ValueError: the model has no list of layers.
    """
    reader = _find_reader(body)
    lists = [module for module in reader.modules() if isinstance(module, torch.nn.ModuleList)]
    declared = getattr(reader.config.get_text_config(), "num_hidden_layers", None)
    fitting = [layers for layers in lists if len(layers) == declared]
    found = fitting[0] if fitting else max(lists, key=len, default=None)
    if not found:
        raise ValueError(
            f"base={class_name(body)}: it has no list of layers to read hidden states from; choose a model of layers."
        )
    return found


def choose_layer(count: int) -> int:
    """Return the layer that features come from by default, three quarters of the way up.

    The states above it are shaped for predicting the next token, and those far below hold little of a text's meaning.

    >>> choose_layer(30), choose_layer(12), choose_layer(1)
    (22, 9, 1)
    """
    return max(1, 3 * count // 4)


def choose_position(body: PreTrainedModel) -> str:
    """Return where in a row its states are read by default.

    The last token of a causal language model has read the whole row. In any other model no token stands for the row
    unless it was trained to: the mean classified four sets of texts better, by three to ten points (benchmarks/README).
    """
    return "last" if is_decoder(body) else "mean"


class LayerReader:
    """Computes the states that leave layer `layer` of a model, with positions that do not depend on padding.

    Args:
        body: a model without a head.
        layer: the number of layers to compute, from 1.
    """

    def __init__(self, body: PreTrainedModel, layer: int) -> None:
        self._reader = _find_reader(body)
        self._layer = find_layers(body)[layer - 1]
        self._adds_positions = is_decoder(body) and accepts_argument(self._reader, "position_ids")

    @staticmethod
    def can_continue(body: PreTrainedModel) -> bool:
        """Return whether `body` is a decoder that goes on after keys and values that it is given."""
        reader = _find_reader(body)
        needed = ("past_key_values", "position_ids")
        return is_decoder(body) and all(accepts_argument(reader, name) for name in needed)

    def __call__(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Return the states, `[batch, tokens, hidden_size]`.

        Args:
            inputs: the arguments of the model's forward, among them `attention_mask`, `[batch, tokens]`. A cache among
                them is gone on after, and filled if it fills itself.
        """
        arguments = {name: value for name, value in inputs.items() if accepts_argument(self._reader, name)}
        if self._adds_positions and "position_ids" not in inputs:
            arguments["position_ids"] = count_positions(inputs["attention_mask"])
        if accepts_argument(self._reader, "use_cache"):
            arguments["use_cache"] = False
        with stopped_behind(self._layer) as returned:
            self._reader(**arguments)
        for output in returned:
            states = output[0] if isinstance(output, tuple | list) else output
            if states.shape[:2] == inputs["input_ids"].shape:
                return states
        raise ValueError(
            f"base={class_name(self._reader)}: a forward pass does not go through its layers one by one, with a state "
            "for each token of each row; choose another model."
        )


def _find_reader(body: PreTrainedModel) -> PreTrainedModel:
    """Return what reads a text: the encoder of a model that has an encoder and a decoder, or the model itself."""
    return body.get_encoder() if body.config.is_encoder_decoder else body
