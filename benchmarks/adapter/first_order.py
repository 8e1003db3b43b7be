"""DP-AdamW on an activated adapter, with the keys and values before the invocation kept for the whole run."""

from collections.abc import Sequence
from typing import Any

import torch
from curve import Curve

from hf_dpzo.frozen.prefix import Prefix, PrefixCache, PrefixLayer, compute_prefix, continuing, split_inputs
from hf_dpzo.models.activation import find_invocation
from hf_dpzo.privacy.accounting import account
from hf_dpzo.privacy.calibration import calibrate_query
from hf_dpzo.privacy.queries import GaussianQuery


class KeptPrefixes:
    """Joins rows to batches that go on after their invocations, with keys and values that were computed once a row."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._invocation = find_invocation(trainer.model)
        self._kept: dict[tuple[int, ...], torch.Tensor] = {}

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the prefixes of rows and what comes after them."""
        split = self._split(rows)
        states = [self._keep(row) for row in rows]
        mask = split.prefix["attention_mask"]
        layers, _, heads, _, features = states[0].shape
        joined = states[0].new_zeros(layers, 2, len(rows), heads, mask.shape[1], features)
        for place, state in enumerate(states):
            joined[:, :, place, :, mask.shape[1] - state.shape[-2] :] = state
        cache = PrefixCache()
        cache.layers = [PrefixLayer(keys, values) for keys, values in joined]
        return {"prefix": Prefix(cache=cache, mask=mask), "inputs": split.suffix}

    def loss(self, model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        """Return the losses of rows from their invocations on, `[batch]`. `model` may be wrapped."""
        with continuing(self._trainer.model, batch["prefix"]):
            return self._trainer.per_example_loss(model, batch["inputs"])

    def _split(self, rows: Sequence[dict[str, Any]]) -> Any:
        inputs = self._trainer.data_collator([dict(row) for row in rows])
        return split_inputs(inputs, self._invocation, suffix_length=len(self._invocation), fixed_shapes=False)

    @torch.no_grad()
    def _keep(self, row: dict[str, Any]) -> torch.Tensor:
        key = tuple(row["input_ids"])
        if key not in self._kept:
            cache = compute_prefix(self._trainer.model, self._split([row]).prefix).cache
            states = [torch.cat([layer.keys, layer.values]) for layer in cache.layers]
            self._kept[key] = torch.stack(states)
        return self._kept[key]


def train_first_order(trainer: Any, settings: dict[str, Any], steps: int, curve: Curve) -> float:
    """Train by DP-AdamW on the rows, the adapter and the loss of `trainer`, and return epsilon."""
    from dp_adamw import DPAdamW  # Here, because nothing else needs Opacus.

    batch, rows = settings["expected_batch_size"], [dict(row) for row in trainer.train_dataset]
    query = GaussianQuery(noise_multiplier=1.0, sampling_rate=batch / len(rows))
    goal = {"target_epsilon": trainer.args.target_epsilon, "target_delta": trainer.args.target_delta}
    query = calibrate_query(query, steps=steps, **goal)
    kept, done = KeptPrefixes(trainer), 0

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
