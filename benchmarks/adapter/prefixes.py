"""Keys and values of the tokens before an invocation, which no contender changes: computed once a row."""

from collections.abc import Sequence
from typing import Any

import torch

from hf_dpzo.frozen.prefix import compute_prefix, continuing, split_inputs
from hf_dpzo.frozen.rows import join_prefixes
from hf_dpzo.models.activation import find_invocation


class KeptPrefixes:
    """Joins rows to batches that go on after their invocations, with keys and values that were computed once a row.

    Args:
        trainer: the trainer whose model, collator and loss are used.
        dtype: the type in which keys and values are kept; `None` for their own.
        kept: what was kept before, of the same base and the same template.
    """

    def __init__(
        self, trainer: Any, dtype: torch.dtype | None = None, kept: dict[tuple[int, ...], torch.Tensor] | None = None
    ) -> None:
        self._trainer = trainer
        self._dtype = dtype
        self._invocation = find_invocation(trainer.model)
        self._kept = {} if kept is None else kept

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the prefixes of rows and what comes after them."""
        split = self._split(rows)
        states = [self._keep(row).float() for row in rows]
        prefix = join_prefixes(states, split.prefix["attention_mask"], passed_over=0)
        return {"prefix": prefix, "inputs": split.suffix}

    def loss(self, model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        """Return the losses of rows from their invocations on, `[batch]`. `model` may be wrapped."""
        with continuing(self._trainer.model, batch["prefix"]):
            return self._trainer.per_example_loss(model, batch["inputs"])

    @torch.no_grad()
    def measure_accuracy(self, rows: Any, batch_size: int = 32) -> float:
        """Return the share of `rows` whose highest score is that of their class."""
        right = 0
        for start in range(0, len(rows), batch_size):
            batch = self([rows[i] for i in range(start, min(start + batch_size, len(rows)))])
            with continuing(self._trainer.model, batch["prefix"]):
                scores = self._trainer.per_example_loss.scores(self._trainer.model, batch["inputs"])
            right += int((scores.argmax(dim=1) == batch["inputs"]["labels"]).sum())
        return right / len(rows)

    def _split(self, rows: Sequence[dict[str, Any]]) -> Any:
        inputs = self._trainer.data_collator([dict(row) for row in rows])
        return split_inputs(inputs, self._invocation, suffix_length=len(self._invocation), fixed_shapes=False)

    @torch.no_grad()
    def _keep(self, row: dict[str, Any]) -> torch.Tensor:
        key = tuple(row["input_ids"])
        if key not in self._kept:
            cache = compute_prefix(self._trainer.model, self._split([row]).prefix).cache
            states = [torch.cat([layer.keys, layer.values]) for layer in cache.layers]
            self._kept[key] = torch.stack(states).to(self._dtype)
        return self._kept[key]
