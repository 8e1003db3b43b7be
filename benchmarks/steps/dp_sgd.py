"""DP-SGD through Opacus, on the same batch and the same loss.

Opacus hooks the layers of a model, and takes the first dimension of what goes in for the rows of a batch. OPT needs
some help with that: a few of its layers are wrapped here, in modules that compute the same.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from subjects import RATE, Subject
from transformers.models.opt.modeling_opt import OPTDecoderLayer, OPTLearnedPositionalEmbedding

from hf_dpzo.models.unwrap import accepts_argument, unwrap_model


class Positions(torch.nn.Module):
    """OPT's position embeddings with a hook for positions alone: Opacus takes neither keywords nor integers."""

    def __init__(self, replaced: OPTLearnedPositionalEmbedding) -> None:
        super().__init__()
        self._offset = replaced.offset
        self._table = torch.nn.Embedding(*replaced.weight.shape, device="meta")
        self._table.weight = replaced.weight

    def forward(self, mask: torch.Tensor, past: int, position_ids: torch.Tensor) -> torch.Tensor:
        """As the one that it replaces."""
        return self._table(position_ids + self._offset)


class Rows(torch.nn.Module):
    """A layer that is given the tokens of all rows in one dimension, and hooked where rows have one of their own."""

    def __init__(self, layer: torch.nn.Module, count: int) -> None:
        super().__init__()
        self._layer, self._count = layer, count

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """As the one that it wraps."""
        return self._layer(tokens.unflatten(0, (self._count, -1))).flatten(0, 1)


def make_step(subject: Subject, *, clipping: str) -> Callable[[], None]:
    """Return what takes one step.

    Args:
        subject: what is trained, on which batch.
        clipping: `hooks` or `functorch`, for how gradients of each row are made; `ghost`, where their norms alone are.
    """
    warnings.filterwarnings("ignore", message="Full backward hook is firing")  # Token ids have no gradients.
    ids = subject.inputs["input_ids"]
    rows, tokens = ids.shape
    for module in list(subject.model.modules()):
        if isinstance(module, OPTDecoderLayer):
            for name in ("final_layer_norm", "fc1", "fc2"):
                setattr(module, name, Rows(getattr(module, name), rows))
        for name, child in list(module.named_children()):
            if isinstance(child, OPTLearnedPositionalEmbedding):
                setattr(module, name, Positions(child))
    subject.model.train()  # Opacus listens in training mode alone. Dropout is off.
    # Where a model makes these itself, it makes them for one row, and adds them to all.
    made = {"position_ids": torch.arange(tokens).repeat(rows, 1), "token_type_ids": torch.zeros_like(ids)}
    made = {name: value for name, value in made.items() if accepts_argument(unwrap_model(subject.model), name)}
    subject = replace(subject, inputs={**subject.inputs, **made})
    return _ghost(subject) if clipping == "ghost" else _materialized(subject, functorch=clipping == "functorch")


def _materialized(subject: Subject, *, functorch: bool) -> Callable[[], None]:
    model = GradSampleModule(subject.model, loss_reduction="sum", force_functorch=functorch, strict=False)
    optimizer = _optimizer(DPOptimizer, subject)

    def step() -> None:
        optimizer.zero_grad()
        subject.loss(model, subject.inputs).sum().backward()
        wrong = next((one for one in optimizer.grad_samples if len(one) != len(subject.rows)), None)
        if wrong is not None:
            raise ValueError(f"Opacus found {len(wrong)} gradients for {len(subject.rows)} rows")
        optimizer.step()

    return step


def _ghost(subject: Subject) -> Callable[[], None]:
    model = GradSampleModuleFastGradientClipping(
        subject.model, loss_reduction="sum", max_grad_norm=1.0, use_ghost_clipping=True, strict=False
    )
    optimizer = _optimizer(DPOptimizerFastGradientClipping, subject)

    def step() -> None:
        losses = subject.loss(model, subject.inputs)
        losses.sum().backward(retain_graph=True)
        optimizer.zero_grad()
        model.disable_hooks()
        (model.get_clipping_coef() * losses).sum().backward()
        model.enable_hooks()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _optimizer(kind: type[DPOptimizer], subject: Subject) -> DPOptimizer:
    return kind(
        torch.optim.SGD(subject.trained, lr=RATE),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=len(subject.rows),
        loss_reduction="mean",
    )
