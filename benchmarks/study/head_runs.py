"""A head on features, trained by each contender: by the library's own steps, without its Trainer around them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from head_gradients import FIRST_ORDER
from schedules import Linear
from task_rows import Table
from transformers import LlamaConfig, LlamaModel

from hf_dpzo.arguments.rates import choose_learning_rate
from hf_dpzo.losses.features import FeatureClassificationLoss
from hf_dpzo.methods import METHODS, Method, PrivateMethod
from hf_dpzo.models.feature_classifier import FeatureClassifier
from hf_dpzo.privacy.calibration import calibrate_query
from hf_dpzo.privacy.noise import BernoulliSampler
from hf_dpzo.privacy.queries import GaussianQuery
from hf_dpzo.step.descent import Descent
from hf_dpzo.zo.directions import Rademacher
from hf_dpzo.zo.optimizer import ZOOptimizer
from hf_dpzo.zo.updates import SGD, Update


# The most scores that one pass computes at all its probe points.
MAX_SCORES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Run:
    """One contender on one task.

    Args:
        contender: the parameters of a method, or of gradient descent, and its `method`.
        steps: the number of steps.
        batch: the number of rows of a batch on average; `None` for all.
        learning_rate: the learning rate of the first step; `None` for `factor` times that which follows from the noise.
        epsilon: the epsilon of the run; `None` without privacy.
        delta: its delta.
        seed: the public seed of the directions. Noise and batches have none.
        factor: see `learning_rate`.
        schedule: how the learning rate goes on.
        update: how released coefficients move the head.
    """

    contender: Mapping[str, Any]
    steps: int
    batch: int | None
    learning_rate: float | None
    epsilon: float | None
    delta: float
    seed: int
    factor: float = 1.0
    schedule: type[Linear] = Linear
    update: Update = field(default_factory=SGD)

    def train(self, rows: Table, classes: int) -> FeatureClassifier:
        """Return a head that was trained on `rows`."""
        head = build_head(rows.features.shape[1], classes)
        size = min(self.batch or len(rows), len(rows))
        parameters = {name: value for name, value in self.contender.items() if name != "method"}
        name = self.contender["method"]
        if name in FIRST_ORDER:
            private = {"noise_multiplier": self._calibrate(GaussianQuery, size / len(rows)), "batch": size}
            method = FIRST_ORDER[name](**parameters, **private, learning_rate=self.learning_rate, steps=self.steps)
            method.train(head.classifier, rows)
            return head
        kind = METHODS[name]
        if issubclass(kind, PrivateMethod):
            parameters["expected_batch_size"] = size
            trial = kind(**parameters, noise_multiplier=1.0)
            query = type(trial.mechanism.query(size / len(rows)))
            parameters["noise_multiplier"] = self._calibrate(query, size / len(rows))
        self._descend(head, kind(**parameters), rows, size)
        return head

    def _calibrate(self, query: type, rate: float) -> float:
        if self.epsilon is None:
            return 0.0
        found = calibrate_query(
            query(noise_multiplier=1.0, sampling_rate=rate),
            steps=self.steps,
            target_epsilon=self.epsilon,
            target_delta=self.delta,
        )
        return found.noise_multiplier

    def _descend(self, head: FeatureClassifier, method: Method, rows: Table, size: int) -> None:
        optimizer = ZOOptimizer(
            list(head.classifier.parameters()),
            directions=Rademacher,
            seed=self.seed,
            lr=0.0,  # It is set before each step.
            constraint=method.constraint,
            update=self.update,
        )
        rate = self.learning_rate
        if rate is None:
            rate = self.factor * choose_learning_rate(method, steps=self.steps, update=self.update)
        schedule = self.schedule(rate=rate, steps=self.steps, head=head.classifier, smoothing=method.smoothing)
        descent = Descent(model=head, optimizer=optimizer, method=method, planned_steps=self.steps)
        loss = FeatureClassificationLoss(head)
        batches = BernoulliSampler(size=len(rows), rate=size / len(rows))
        points = max(2, MAX_SCORES // (len(rows) * head.config.num_labels))
        for step in range(self.steps):
            estimator = descent.estimator(step)
            batch = rows if size == len(rows) else rows[torch.from_numpy(batches.draw())]
            inputs = {"features": batch.features, "labels": batch.labels}
            with descent.walk(step, points_per_pass=min(points, len(estimator.points))) as walk:
                losses = [loss.at_points(head, inputs, _name(head, stop.stacks)) for stop in walk]
                compared = torch.cat(losses, dim=1)[:, : len(estimator.points)].double()
                release = method.mechanism.release(estimator.coefficients(compared))
                for group in optimizer.param_groups:
                    group["lr"] = schedule.choose(step, release.coefficients)
                optimizer.receive(step=step, coefficients=release.coefficients)
            optimizer.step()


def build_head(width: int, classes: int) -> FeatureClassifier:
    """Return a new head. Its base is a toy of the same width, because features were read before."""
    config = LlamaConfig(
        vocab_size=8, hidden_size=width, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    return FeatureClassifier.on_base(LlamaModel(config), id2label={number: str(number) for number in range(classes)})


@torch.no_grad()
def measure_accuracy(head: FeatureClassifier, rows: Table) -> float:
    """Return the share of rows whose highest score is that of their class."""
    return (head(features=rows.features).logits.argmax(dim=1) == rows.labels).double().mean().item()


def _name(head: FeatureClassifier, stacks: Mapping[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: stacks[value] for name, value in head.named_parameters() if value in stacks}
