"""DP-AdamW through Opacus, on the adapter and the loss that the zeroth-order methods train."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer

from hf_dpzo.losses.per_example import PerExampleLoss
from hf_dpzo.privacy.noise import BernoulliSampler


@dataclass(frozen=True, kw_only=True)
class DPAdamW:
    """Private first-order fine-tuning: the baseline that zeroth-order methods are compared with.

    Args:
        learning_rate: of AdamW.
        clip_norm: of one row's gradient, L2.
        noise_multiplier: the noise's standard deviation, in clip norms.
        expected_batch_size: what the sum of gradients is divided by.
        steps: how many batches are drawn.
    """

    learning_rate: float
    clip_norm: float
    noise_multiplier: float
    expected_batch_size: int
    steps: int

    def train(self, model: torch.nn.Module, rows: Any, collate: Any, loss: PerExampleLoss) -> None:
        """Train the parameters of `model` that require gradients, on Poisson batches of `rows`."""
        wrapped = GradSampleModule(model, loss_reduction="sum")
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = DPOptimizer(
            torch.optim.AdamW(trainable, lr=self.learning_rate, weight_decay=0.0),
            noise_multiplier=self.noise_multiplier,
            max_grad_norm=self.clip_norm,
            expected_batch_size=self.expected_batch_size,
            loss_reduction="mean",
            # By default it would draw from torch's global generator, which may be seeded with a public number.
            generator=torch.Generator().manual_seed(int.from_bytes(os.urandom(7))),
        )
        mask = BernoulliSampler(size=len(rows), rate=self.expected_batch_size / len(rows))
        model.train()  # Opacus listens in training mode alone. Neither model nor adapter has dropout.
        for _ in range(self.steps):
            batch = [row for row, joins in zip(rows, mask.draw(), strict=True) if joins]
            self._step(wrapped, optimizer, batch, collate, loss)
        wrapped.to_standard_module()

    def _step(self, wrapped: Any, optimizer: DPOptimizer, batch: list, collate: Any, loss: PerExampleLoss) -> None:
        optimizer.zero_grad()
        if batch:
            loss(wrapped, dict(collate(batch))).sum().backward()
        else:  # No gradients, but noise.
            for parameter in optimizer.params:
                parameter.grad_sample = torch.zeros(0, *parameter.shape)
        optimizer.step()
