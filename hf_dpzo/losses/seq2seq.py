"""The loss of a model that reads one sequence and writes another."""

from collections.abc import Mapping
from typing import Any

import torch

from hf_dpzo.losses.per_example import ForwardPass, ScoreLoss, token_losses
from hf_dpzo.models.unwrap import Inputs, drop_labels, unwrap_model


class Seq2SeqLoss(ScoreLoss):
    """The mean cross-entropy of a row's target tokens, which are those whose label is not -100.

    A row without targets has the loss zero. What the decoder reads is the collator's `decoder_input_ids`, or else the
    labels as the model itself shifts them, row by row.

    Args:
        model: an encoder with a decoder, such as T5, BART or Whisper.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._forward = ForwardPass(model)

    def scores(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """Return the logits of the target tokens, float32 `[batch, target tokens, vocabulary]`."""
        logits = self._forward.outputs(model, self._arguments(model, inputs)).logits.float()
        # The virtual tokens of prompt tuning may stand in front of the decoder's, and have no labels.
        return logits[:, -inputs["labels"].shape[1] :] if inputs.get("labels") is not None else logits

    def losses(self, scores: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """Return one loss for each row, float32 `[batch]`."""
        return token_losses(scores, inputs["labels"])

    def _arguments(self, model: torch.nn.Module, inputs: Inputs) -> Mapping[str, Any]:
        """Return `inputs` with what the decoder reads."""
        if inputs.get("decoder_input_ids") is not None or inputs.get("decoder_inputs_embeds") is not None:
            return drop_labels(inputs)
        if inputs.get("labels") is None:  # A row to predict for: the decoder begins, and reads nothing.
            config, batch = unwrap_model(model).config, next(iter(inputs.values()))
            first = getattr(config, "decoder_start_token_id", None)
            first = config.pad_token_id or 0 if first is None else first
            return {**inputs, "decoder_input_ids": torch.full((len(batch), 1), first, device=batch.device)}
        shift = getattr(unwrap_model(model), "prepare_decoder_input_ids_from_labels", None)
        # A model without that function shifts the labels that it is given. The loss of its own is not read.
        return inputs if shift is None else {**drop_labels(inputs), "decoder_input_ids": shift(labels=inputs["labels"])}
