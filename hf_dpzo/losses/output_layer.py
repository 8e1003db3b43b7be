"""Evaluates a model's output layer only at the positions, and for the words, that a loss needs.

A vocabulary has tens of thousands of words. The last matrix product of a language model is therefore often its most
expensive one, and the logits its largest tensor, but a loss needs few of them. So the whole model is called as usual,
except that its output layer receives no positions. The layer is then applied to the hidden states that the loss needs.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from hf_dpzo.losses.per_example import IGNORE_INDEX
from hf_dpzo.models.float32_residual import Float32Head, evaluation_mode
from hf_dpzo.models.products import WORDS_PER_CHUNK, is_16_bit, multiply_exactly
from hf_dpzo.models.unwrap import Inputs, unwrap_model


# The number of a row's positions whose logits are in memory at once. It is the same for all rows, so it couples none.
POSITIONS_PER_CHUNK = 128


# How far the float32 logits of one position alone may be from those of the same position among others, relative to the
# largest logit.
ROUNDING = 1e-5


class OutputLayer:
    """The output layer of a language model, evaluated at some positions only.

    Whether an architecture allows this is measured, not looked up in a list. The first call with a model tries it on
    two made-up rows: the layer's outputs must be the logits that the model returns, bit for bit; the layer must treat
    each position by itself; and the model must work when the layer receives no positions. That first call must be
    outside `torch.func.vmap`.

    Args:
        forward: a function from a model and its inputs to the logits, in float32.
    """

    def __init__(self, forward: Callable[[torch.nn.Module, Inputs], torch.Tensor]) -> None:
        self._forward = forward
        self._checked_layer: torch.nn.Module | None = None
        self._is_separable = False

    def supports(self, model: torch.nn.Module) -> bool:
        """Return whether the output layer of `model` can be evaluated at some positions only."""
        layer = find_output_layer(model)
        if layer is not None and layer is not self._checked_layer:
            self._is_separable = self._check_separable(model, layer)
            self._checked_layer = layer
        return layer is not None and self._is_separable

    def score_words(
        self, model: torch.nn.Module, inputs: Inputs, at: torch.Tensor | int, words: Sequence[int]
    ) -> torch.Tensor:
        """Return the logits of some words at one position of each row, float32 `[batch, words]`.

        Args:
            model: a model with an output layer that this class `supports`.
            inputs: the model's inputs.
            at: the position, counted from the end: -1 is the last. One for all rows, or `[batch]`.
            words: the token ids of the words.
        """

        def compute(layer: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
            return _logits(layer, hidden[torch.arange(len(hidden), device=hidden.device), at], list(words))

        return self._run_in_place(model, inputs, compute)

    def compute_target_losses(self, model: torch.nn.Module, inputs: Inputs, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy of each row at its targets, float32 `[batch]`; zero for a row without targets.

        Args:
            model: a model with an output layer that this class `supports`.
            inputs: the model's inputs, with `input_ids` `[batch, tokens]`. Virtual tokens of a prompt come in addition.
            targets: the token to predict at each of the first tokens, `[batch, tokens]` or fewer; -100 for none. For a
                causal model that is the token after it, so that the last token has none.
        """
        tokens = inputs["input_ids"].shape[1]
        # Computed before the model runs, because `nonzero` waits for everything that is queued on a device.
        positions = [(row != IGNORE_INDEX).nonzero().squeeze(1) for row in targets]

        def compute(layer: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
            own = hidden[:, -tokens:]
            groups = _group_rows([len(places) for places in positions])
            return torch.cat([_compute_losses(layer, own, targets, positions, rows) for rows in groups])

        return self._run_in_place(model, inputs, compute)

    def compute_target_log_probs(self, model: torch.nn.Module, inputs: Inputs, targets: torch.Tensor) -> torch.Tensor:
        """Return the log-probability of each target, float32 `[batch, tokens - 1]`; zero where there is none.

        The arguments are those of `compute_target_losses`.
        """
        tokens = inputs["input_ids"].shape[1]
        positions = [(row != IGNORE_INDEX).nonzero().squeeze(1) for row in targets]

        def compute(layer: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
            own = hidden[:, -tokens:]
            rows = [_row_log_probs(layer, own[row], targets[row], places) for row, places in enumerate(positions)]
            return torch.stack(rows)

        return self._run_in_place(model, inputs, compute)

    def _run_in_place(
        self,
        model: torch.nn.Module,
        inputs: Inputs,
        compute: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Call the model, apply `compute` to its output layer and the hidden states, and return the result.

        The hidden states are what would go into the layer, `[batch, tokens, hidden]`. `compute` runs inside the model's
        forward pass, because torch or FSDP may exchange the layer's weights for the time of the pass.
        """
        results = []

        def intercept(layer: torch.nn.Module, args: tuple) -> tuple:
            results.append(compute(layer, args[0]))
            return (args[0][:, :0], *args[1:])

        handle = find_output_layer(model).register_forward_pre_hook(intercept)
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
        with evaluation_mode(model):
            handle = layer.register_forward_hook(lambda layer, args, output: outputs.append(output))
            try:
                logits = self._forward(model, inputs)
                (output,) = outputs
                # The model may cap, scale or slice what its output layer computes.
                if not torch.equal(output.float(), logits):
                    return False
                separate = self._run_in_place(model, inputs, _compute_logits_separately)
            except Exception:  # A model that fails for any reason is evaluated as a whole, as its authors meant it.
                return False
            finally:
                handle.remove()
        tolerance = max(ROUNDING, 4 * torch.finfo(output.dtype).eps) * logits.abs().max().item()
        return separate.shape == logits.shape and torch.allclose(separate, logits, rtol=0, atol=tolerance)


def find_output_layer(model: torch.nn.Module) -> torch.nn.Module | None:
    """Return the module that turns hidden states into logits; `None` if the model names none."""
    base = unwrap_model(model)
    return base.get_output_embeddings() if isinstance(base, PreTrainedModel) else None


def _compute_logits_separately(layer: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Return all logits, computed one position at a time. They differ where a layer couples rows or tokens."""
    return torch.stack([torch.cat([_logits(layer, position) for position in row.split(1)]) for row in hidden])


def _row_loss(
    layer: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    if not len(positions):
        return torch.zeros((), device=hidden.device)
    losses = [
        F.cross_entropy(_logits(layer, hidden[chunk]), targets[chunk], reduction="sum")
        for chunk in positions.split(POSITIONS_PER_CHUNK)
    ]
    return torch.stack(losses).sum() / len(positions)


def _group_rows(counts: Sequence[int]) -> Iterator[list[int]]:
    """Yield the numbers of rows with as many positions each, in groups whose logits fit into memory at once.

    >>> list(_group_rows([100, 20, 30, 300]))
    [[0, 1], [2], [3]]
    """
    group: list[int] = []
    for row, count in enumerate(counts):
        if group and sum(counts[one] for one in group) + count > POSITIONS_PER_CHUNK:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _compute_losses(
    layer: torch.nn.Module,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    positions: Sequence[torch.Tensor],
    rows: Sequence[int],
) -> torch.Tensor:
    """Return the losses of a group of rows, `[rows]`.

    Row by row, so that all shapes follow from the row alone, and rows are kept apart to the last bit. Of several rows,
    the products with a part of the words follow each other, because its weights are read, and unpacked, once then.
    """
    if any(len(positions[row]) > POSITIONS_PER_CHUNK for row in rows) or not _is_cut(layer):
        return torch.stack([_row_loss(layer, hidden[row], targets[row], positions[row]) for row in rows])
    own = {row: hidden[row][positions[row]] for row in rows if len(positions[row])}
    parts: dict[int, list[torch.Tensor]] = {row: [] for row in own}
    multiply = multiply_exactly if type(layer) is Float32Head else F.linear
    for start in range(0, len(layer.weight), WORDS_PER_CHUNK):
        words = slice(start, start + WORDS_PER_CHUNK)
        weight, bias = layer.weight[words].float(), None if layer.bias is None else layer.bias[words]
        for row, states in own.items():
            parts[row].append(multiply(states, weight, bias))
    nothing = torch.zeros((), device=hidden.device)
    return torch.stack(
        [
            F.cross_entropy(torch.cat(parts[row], dim=-1), targets[row][positions[row]]) if row in own else nothing
            for row in rows
        ]
    )


def _is_cut(layer: torch.nn.Module) -> bool:
    """Return whether products with a part of the words at a time are faster: on a CPU, whose cache holds that part."""
    if "forward" in vars(layer) or type(getattr(layer, "weight", None)) not in (torch.Tensor, torch.nn.Parameter):
        return False
    if type(layer) is Float32Head and is_16_bit(layer.weight):
        return True
    is_float32 = type(layer) in (torch.nn.Linear, Float32Head) and layer.weight.dtype == torch.float32
    return is_float32 and layer.weight.device.type == "cpu"


def _row_log_probs(
    layer: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    nothing = torch.zeros(len(targets), device=hidden.device)
    if not len(positions):
        return nothing
    losses = [
        F.cross_entropy(_logits(layer, hidden[chunk]), targets[chunk], reduction="none")
        for chunk in positions.split(POSITIONS_PER_CHUNK)
    ]
    return nothing.scatter(0, positions, -torch.cat(losses))


def _logits(layer: torch.nn.Module, hidden: torch.Tensor, words: list[int] | None = None) -> torch.Tensor:
    """Return the logits of `hidden`, `[positions, hidden]`, for all words or some, computed in the layer's dtype."""
    # A layer whose `forward` was replaced does more than its class says.
    if type(layer) in (torch.nn.Linear, Float32Head) and "forward" not in vars(layer):
        weight, bias = layer.weight, layer.bias
        if words is not None:
            weight, bias = weight[words], None if bias is None else bias[words]
        if type(layer) is Float32Head:
            return multiply_exactly(hidden, weight, bias)
        return F.linear(hidden, weight, bias).float()
    # `layer(hidden)` would run the hook that called this function.
    logits = layer.forward(hidden).float()
    return logits if words is None else logits[:, words]
