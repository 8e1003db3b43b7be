"""Private first-order training of a head, with which zeroth-order methods are compared. Its gradients are exact."""

import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from task_rows import Table

from hf_dpzo.models.feature_classifier import BIAS_WEIGHT
from hf_dpzo.privacy.noise import BernoulliSampler


@dataclass(frozen=True, kw_only=True)
class DPSGD:
    """DP-SGD (Abadi et al. 2016): each row's gradient is clipped, and noise is added to their sum.

    Args:
        clip_norm: the largest norm of one row's gradient, L2.
        noise_multiplier: the noise's standard deviation, in clip norms.
        batch: the number of rows of a batch on average, by which the sum is divided.
        learning_rate: the learning rate of the first step, which falls to zero.
        steps: the number of steps.
    """

    clip_norm: float
    noise_multiplier: float
    batch: int
    learning_rate: float
    steps: int

    def train(self, head: torch.nn.Linear, rows: Table) -> None:
        """Train `head` on Poisson batches of `rows`."""
        optimizer = self._build_optimizer(head)
        batches = BernoulliSampler(size=len(rows), rate=self.batch / len(rows))
        # Not the global generator, whose seed may be known.
        secret = torch.Generator().manual_seed(int.from_bytes(os.urandom(7)))
        inputs = torch.cat([rows.features, torch.full((len(rows), 1), BIAS_WEIGHT)], dim=1)
        norms = inputs.norm(dim=1)
        for step in range(self.steps):
            drawn = slice(None) if self.batch == len(rows) else torch.from_numpy(batches.draw())
            x, labels = inputs[drawn], rows.labels[drawn]
            with torch.no_grad():
                scores = x @ torch.cat([head.weight, head.bias[:, None]], dim=1).T
                # The gradient of a row is the outer product of its residual and its inputs.
                residuals = scores.softmax(dim=1) - F.one_hot(labels, scores.shape[1])
                factors = (self.clip_norm / (residuals.norm(dim=1) * norms[drawn])).clamp(max=1)
                total = (residuals * factors[:, None]).T @ x
                noise = torch.randn(total.shape, generator=secret) * self.noise_multiplier * self.clip_norm
                gradient = (total + noise) / self.batch
            head.weight.grad, head.bias.grad = gradient[:, :-1].contiguous(), gradient[:, -1].contiguous()
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * (1 - step / self.steps)
            optimizer.step()

    def _build_optimizer(self, head: torch.nn.Linear) -> torch.optim.Optimizer:
        return torch.optim.SGD(head.parameters(), lr=self.learning_rate)


class DPAdamW(DPSGD):
    """DP-SGD's gradients, given to AdamW."""

    def _build_optimizer(self, head: torch.nn.Linear) -> torch.optim.Optimizer:
        return torch.optim.AdamW(head.parameters(), lr=self.learning_rate, weight_decay=0.0)


FIRST_ORDER = {"dp-sgd": DPSGD, "dp-adamw": DPAdamW}
