"""The output layer, at the positions and for the words that a loss asks for.

A vocabulary has tens of thousands of words: the last product of a language model is often its most expensive one, and
what it makes its largest tensor. A loss needs few of those numbers. So the model is called whole, as ever, but its
output layer is given no position at all. Of what would have gone into it, the loss makes what it needs.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from hf_dpzo.models.unwrap import Inputs, unwrap_model


# Labels that are none, as everywhere in transformers.
IGNORE_INDEX = -100


# Positions of a row whose logits are in memory at once. The same for all rows, so that it joins none.
POSITIONS_PER_CHUNK = 128


# Relative to the largest logit: how far one position may be by itself from what it is among others, in float32.
ROUNDING = 1e-5


class OutputLayer:
    """The output layer of a language model, evaluated in parts.

    Whether an architecture allows it is found out, not listed. At the first call with a model, which should be an
    ordinary one, outside of `torch.func.vmap`, two made-up rows show whether what the layer makes is what the model
    returns, bit for bit; whether each position is treated by itself; and whether the model can do without the rest.

    Args:
        forward: from a model and inputs to its logits, float32.
    """

    def __init__(self, forward: Callable[[torch.nn.Module, Inputs], torch.Tensor]) -> None:
        self._forward = forward
        self._checked_layer: torch.nn.Module | None = None
        self._is_separable = False

    def supports(self, model: torch.nn.Module) -> bool:
        """Whether the logits are what the output layer makes of each position, so that parts of them can be had."""
        layer = find_output_layer(model)
        if layer is not None and layer is not self._checked_layer:
            self._checked_layer, self._is_separable = layer, self._check_separable(model, layer)
        return layer is not None and self._is_separable

    def score_words(
        self, model: torch.nn.Module, inputs: Inputs, at: torch.Tensor | int, words: Sequence[int]
    ) -> torch.Tensor:
        """Logits of `words` at one position of each row, float32 `[batch, words]`; `at` counts from the end."""

        def compute(layer: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
            return _logits(layer, hidden[torch.arange(len(hidden), device=hidden.device), at], list(words))

        return self._run_in_place(model, inputs, compute)

    def compute_target_losses(self, model: torch.nn.Module, inputs: Inputs, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of each row at its own targets, float32 `[batch]`; zero for a row without any.

        Args:
            model: with an output layer that this class `supports`.
            inputs: of `tokens` tokens, beside virtual ones in front.
            targets: what follows each token but the last, `[batch, tokens - 1]`; -100 for nothing.
        """
        tokens = inputs["input_ids"].shape[1]
        # Before the model runs: a device would have to wait for it.
        positions = [(row != IGNORE_INDEX).nonzero().squeeze(1) for row in targets]

        def compute(layer: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
            own = hidden[:, -tokens:]
            # Row by row: so the shape of what is computed follows from the row alone, and rows stay apart to the bit.
            losses = [_row_loss(layer, own[row], targets[row], places) for row, places in enumerate(positions)]
            return torch.stack(losses)

        return self._run_in_place(model, inputs, compute)

    def _run_in_place(
        self,
        model: torch.nn.Module,
        inputs: Inputs,
        compute: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """What `compute` makes of the output layer and of the hidden states `[batch, tokens, hidden]` that go into it.

        It is called from inside the model, where weights are those that the model uses, whoever exchanged them.
        """
        results = []

        def keep(layer: torch.nn.Module, args: tuple) -> tuple:
            results.append(compute(layer, args[0]))
            return (args[0][:, :0], *args[1:])

        handle = find_output_layer(model).register_forward_pre_hook(keep)
        try:
            self._forward(model, inputs)
        finally:
            handle.remove()
        (result,) = results
        return result

    @torch.no_grad()
    def _check_separable(self, model: torch.nn.Module, layer: torch.nn.Module) -> bool:
        tokens = torch.tensor([[0, 1], [1, 0]], device=unwrap_model(model).device)
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        outputs = []
        with _evaluation_mode(model):
            handle = layer.register_forward_hook(lambda layer, args, output: outputs.append(output))
            try:
                logits = self._forward(model, inputs)
                (output,) = outputs
                if not torch.equal(output.float(), logits):  # Capped, scaled or cut.
                    return False
                apart = self._run_in_place(model, inputs, _compute_logits_separately)
            except Exception:  # Whatever the reason: then the whole is computed, as the model's authors meant it.
                return False
            finally:
                handle.remove()
        far = max(ROUNDING, 4 * torch.finfo(output.dtype).eps) * logits.abs().max().item()
        return apart.shape == logits.shape and torch.allclose(apart, logits, rtol=0, atol=far)


def find_output_layer(model: torch.nn.Module) -> torch.nn.Module | None:
    """The module that makes logits of hidden states, or None where it is not known."""
    base = unwrap_model(model)
    return base.get_output_embeddings() if isinstance(base, PreTrainedModel) else None


def _compute_logits_separately(layer: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """All logits, but one position after the other: a layer that joins rows or tokens makes something else."""
    return torch.stack([torch.cat([_logits(layer, one) for one in row.split(1)]) for row in hidden])


def _row_loss(
    layer: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor, places: torch.Tensor
) -> torch.Tensor:
    if not len(places):
        return torch.zeros((), device=hidden.device)
    losses = [
        F.cross_entropy(_logits(layer, hidden[some]), targets[some], reduction="sum")
        for some in places.split(POSITIONS_PER_CHUNK)
    ]
    return torch.stack(losses).sum() / len(places)


def _logits(layer: torch.nn.Module, hidden: torch.Tensor, words: list[int] | None = None) -> torch.Tensor:
    """What the layer makes of `hidden`, `[positions, hidden]`, for all words or some; computed in its own dtype."""
    # One whose `forward` was exchanged does more than its class says.
    if type(layer) is torch.nn.Linear and "forward" not in vars(layer):
        weight, bias = layer.weight, layer.bias
        if words is not None:
            weight, bias = weight[words], None if bias is None else bias[words]
        return F.linear(hidden, weight, bias).float()
    # Not by calling it: that would run the hook from which this is called.
    logits = layer.forward(hidden).float()
    return logits if words is None else logits[:, words]


@contextmanager
def _evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """In evaluation mode, so that nothing is drawn; afterwards each module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
