"""Measures on public rows the numbers that people get wrong: smoothing, clip norm and learning rate."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from itertools import islice, pairwise
from typing import Any

import torch

from hf_dpzo.data.collation import LogicalBatch
from hf_dpzo.isolation.measure import Rows
from hf_dpzo.methods.method import Method, list_parameters
from hf_dpzo.models.unwrap import unwrap_optimizer
from hf_dpzo.privacy.limits import RunLimits
from hf_dpzo.privacy.mechanism import NoisySum
from hf_dpzo.step.descent import Descent
from hf_dpzo.trainer.limits import measure_quotients
from hf_dpzo.trainer.rehearsing import RehearsingTrainer
from hf_dpzo.trainer.scales import match_scales
from hf_dpzo.trainer.step_trial import left_in_place
from hf_dpzo.zo.optimizer import ZOOptimizer


# The smoothings at which losses are compared, each about three times the one before.
SMOOTHINGS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


# Quotients at one smoothing agree with those at the one before where they differ by no more than this share.
AGREEMENT = 0.05


# The clip norm over the spread of what it bounds: a smaller one adds less noise, and leaves little but directions.
CLIP_SHARE = 0.5


# The factors on a first guess that are tried as learning rates, and how many steps a run of one takes.
RATE_FACTORS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
LEAST_STEPS, MOST_STEPS = 3, 20


# All runs together take about as many seconds, if the fewest steps do not take more.
RUN_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class SmoothingFound:
    """How the quotients of public rows change with the smoothing.

    Args:
        smoothing: the proposed smoothing.
        changes: by smoothing, the share by which quotients differ from those at the smoothing before.
    """

    smoothing: float
    changes: Mapping[float, float]


@dataclass(frozen=True, kw_only=True)
class RateFound:
    """What short public runs led to.

    Args:
        rate: the proposed learning rate, with which the noise of the planned run goes as far as that of a short run
            with the best one.
        best: the rate after which the loss was least.
        steps: the number of steps of each run.
        before: the mean loss of the public rows before them.
        losses: by learning rate, the mean loss after a run; infinite where it diverged.
    """

    rate: float
    best: float
    steps: int
    before: float
    losses: Mapping[float, float]


@dataclass(frozen=True, kw_only=True)
class Tuner:
    """Measures on public rows, on a trainer that was rehearsed and has these rows or made-up ones.

    Args:
        trainer: the trainer. Its parameters are left as they were.
        method: the method of the private run, whose noise the public runs have too.
        sampling_rate: the probability with which a private row takes part in a step.
        planned_steps: the number of steps of the private run.
        rows: public rows, as the collator receives them.
    """

    trainer: RehearsingTrainer
    method: Method
    sampling_rate: float
    planned_steps: int
    rows: Rows

    def find_smoothing(self) -> SmoothingFound:
        """Return the largest smoothing at which quotients still are what they are at a third of it.

        Curvature bends the losses between probe points that are far apart, and rounding blurs those between near ones.
        Where no two agree, it is the one that differs least from the one before.
        """
        quotients = {smoothing: self._measure_quotients(smoothing) for smoothing in SMOOTHINGS}
        changes = {}
        for before, after in pairwise(SMOOTHINGS):
            near, far = quotients[before], quotients[after]
            if near is not None and far is not None and near.shape == far.shape and far.norm() > 0:
                changes[after] = float((far - near).norm() / far.norm())
        if not changes:
            raise ValueError(
                "public: the losses of these rows do not change along any direction, so that nothing can be measured; "
                "pass rows of the recipe's format."
            )
        agreeing = [smoothing for smoothing, change in changes.items() if change <= AGREEMENT]
        chosen = max(agreeing) if agreeing else min(changes, key=changes.get)
        return SmoothingFound(smoothing=chosen, changes=changes)

    def measure_spread(self, smoothing: float) -> float | None:
        """Return the root mean square of what the clip norm bounds in each row; `None` for a method without one."""
        if "clip_norm" not in list_parameters(type(self.method)):
            return None
        quotients = self._measure_quotients(smoothing)
        method = replace(self.method, smoothing=smoothing)
        if quotients is None or not isinstance(method.mechanism, NoisySum):
            return None
        limits = RunLimits.of_public(
            quotients,
            method.mechanism,
            num_directions=method.estimator.num_directions,
            sampling_rate=self.sampling_rate,
            steps=1,
        )
        return limits.spread * method.clip_norm

    def find_rate(self, smoothing: float, clip_norm: float | None) -> RateFound:
        """Return the learning rate after which the loss of the public rows is least, of short runs with the noise.

        The first guess moves parameters as far in a run as a probe point is away from them.

        Args:
            smoothing: the smoothing of the runs.
            clip_norm: their clip norm; `None` for a method without one.
        """
        method = self._scale_method(smoothing, clip_norm)
        batch = self.trainer._estimate.losses.build_public_batch(self._evaluated_rows)
        started = time.perf_counter()
        size = self._measure_released(method, batch)
        seconds = max(1e-3, time.perf_counter() - started)
        steps = int(min(MOST_STEPS, max(LEAST_STEPS, RUN_SECONDS / seconds / len(RATE_FACTORS))))
        guess = smoothing / (size * (steps * method.estimator.num_directions) ** 0.5)
        rates = [float(f"{guess * factor:.1g}") for factor in RATE_FACTORS]
        before = self._measure_loss(batch)
        losses = {rate: self._run(method, batch, rate, steps) for rate in dict.fromkeys(rates)}
        best = min(losses, key=losses.get)
        rate = float(f"{best * min(1.0, (steps / self.planned_steps) ** 0.5):.2g}")
        return RateFound(rate=rate, best=best, steps=steps, before=before, losses=losses)

    # ---- What is measured ----

    @property
    def _descent(self) -> Descent:
        return self.trainer._build_descent()

    def _measure_quotients(self, smoothing: float) -> torch.Tensor | None:
        optimizer = self._descent.optimizer
        evaluate = partial(self.trainer._estimate.losses.of_public, self.trainer.model_wrapped, self._evaluated_rows)
        trained = dict(enumerate(optimizer.parameters()))
        return measure_quotients(trained, evaluate=evaluate, directions=optimizer.directions, smoothing=smoothing)

    def _scale_method(self, smoothing: float, clip_norm: float | None) -> Method:
        """Return the private run's method for batches of the public rows, with as much noise on a coefficient."""
        changes: dict[str, Any] = {"smoothing": smoothing}
        names = {field.name for field in fields(self.method)}
        if clip_norm is not None:
            changes["clip_norm"] = clip_norm
        if "expected_batch_size" in names:
            count = len(self.rows)
            noise = self.method.noise_multiplier * count / self.method.expected_batch_size
            changes |= {"expected_batch_size": count, "noise_multiplier": noise}
        return replace(self.method, **changes)

    @cached_property
    def _evaluated_rows(self) -> Sequence[Any]:
        """The rows as a step evaluates them: as features, if steps take these."""
        trainer = self.trainer
        return self.rows if trainer._table is None else trainer._read_public(trainer.model_wrapped, self.rows)

    def _measure_released(self, method: Method, batch: LogicalBatch) -> float:
        """Return the root mean square of the coefficients that one step releases, as the update takes them."""
        descent = self._build_descent(method, rate=1.0)
        with left_in_place(descent):
            coefficients = self._release(descent, batch, step=0)
        scaled = self.trainer.args.update_rule.scale(coefficients)
        size = float(torch.tensor(scaled, dtype=torch.float64).square().mean().sqrt())
        if size == 0:
            raise ValueError(
                "public: a step on these rows releases zeros alone, so that no learning rate suits; pass others."
            )
        return size

    def _run(self, method: Method, batch: LogicalBatch, rate: float, steps: int) -> float:
        """Return the mean loss after a run of `steps` steps, and give the parameters their values back."""
        descent = self._build_descent(method, rate=rate)
        with left_in_place(descent):
            for step in range(steps):
                descent.optimizer.receive(step=step, coefficients=self._release(descent, batch, step=step))
                descent.optimizer.step()
            return self._measure_loss(batch)

    def _release(self, descent: Descent, batch: LogicalBatch, *, step: int) -> list[float]:
        trainer = self.trainer
        with descent.walk(step, points_per_pass=trainer._points_per_pass) as walk:
            losses = trainer._evaluate_walk(walk, trainer.model_wrapped, batch)
        coefficients = trainer._estimate.coefficients(losses, batch, descent.estimator(step))
        return descent.method.mechanism.release(coefficients, trainer._processes).coefficients

    def _build_descent(self, method: Method, *, rate: float) -> Descent:
        """Build a descent of its own, from where the parameters are."""
        present = unwrap_optimizer(self.trainer.optimizer)
        kind, settings = self.trainer.optimizer_cls_and_kwargs
        groups = [{"params": group["params"]} for group in present.param_groups]
        optimizer: ZOOptimizer = kind(groups, **{**settings, "lr": rate, "constraint": method.constraint})
        if self.trainer.args.perturbation_scales:
            optimizer.scale_directions(
                match_scales(self.trainer.model, optimizer, self.trainer.args.perturbation_scales)
            )
        return Descent(model=self.trainer.model, optimizer=optimizer, method=method, planned_steps=MOST_STEPS)

    def _measure_loss(self, batch: LogicalBatch) -> float:
        losses = self.trainer._estimate.losses(self.trainer.model_wrapped, batch).double()
        return float(losses.mean()) if bool(losses.isfinite().all()) else float("inf")


def list_public_rows(trainer: RehearsingTrainer, count: int) -> Rows:
    """Return at most `count` training rows, spread over them all, of a trainer whose rows are public."""
    rows = trainer._encode_rows(trainer.train_dataset)
    kept = trainer._find_collated_columns(rows)
    places = range(0, len(rows), max(1, len(rows) // count))
    return [{name: value for name, value in rows[place].items() if name in kept} for place in islice(places, count)]
