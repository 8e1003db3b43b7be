"""DP-AdamW on an activated adapter, with the keys and values before the invocation kept for the whole run."""

from typing import Any

import torch
from curve import Curve
from prefixes import KeptPrefixes

from hf_dpzo.privacy.accounting import account
from hf_dpzo.privacy.calibration import calibrate_query
from hf_dpzo.privacy.queries import GaussianQuery


def train_first_order(trainer: Any, kept: KeptPrefixes, settings: dict[str, Any], steps: int, curve: Curve) -> float:
    """Train by DP-AdamW on the rows, the adapter and the loss of `trainer`, and return epsilon."""
    from dp_adamw import DPAdamW  # Here, because nothing else needs Opacus.

    batch, rows = settings["expected_batch_size"], [dict(row) for row in trainer.train_dataset]
    query = GaussianQuery(noise_multiplier=1.0, sampling_rate=batch / len(rows))
    goal = {"target_epsilon": trainer.args.target_epsilon, "target_delta": trainer.args.target_delta}
    query = calibrate_query(query, steps=steps, **goal)
    done = 0

    def loss(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        nonlocal done
        if done:  # A step begins: the one before has ended.
            curve.measure(done)
        done += 1
        return kept.loss(model, inputs)

    DPAdamW(**settings, noise_multiplier=query.noise_multiplier, steps=steps).train(trainer.model, rows, kept, loss)
    trainer.model.eval()
    curve.measure(steps)
    return account(((query, steps),), delta=goal["target_delta"]).epsilon
