"""While isolation is measured, the frozen work of a public row is done twice, and not once more for each neighbour."""

import contextlib
import dataclasses
from collections import Counter

import pytest
import torch
from transformers import DataCollatorWithPadding

from hf_dpzo.frozen import rows as row_work
from hf_dpzo.frozen.remembered import RepeatedStore
from hf_dpzo.frozen.store import FrozenCache
from hf_dpzo.isolation.measure import measure_isolation
from hf_dpzo.isolation.probe import CoupledRowsError
from hf_dpzo.losses.prompting import NextWordLoss
from hf_dpzo.models.state import ModelState
from hf_dpzo.step.sharing import find_shared_work
from hf_dpzo.trainer import objective
from hf_dpzo.trainer.limits import measure_quotients

from support.activated import activated_losses, activated_model, activated_rows, train_activated
from support.models import word_tokenizer


@pytest.fixture
def model():
    torch.manual_seed(0)
    return activated_model().eval()


@pytest.fixture
def rows():
    return [{**row, "labels": number % 2} for number, row in enumerate(activated_rows(4))]


@pytest.fixture
def losses(model, rows, tmp_path):
    collate = DataCollatorWithPadding(word_tokenizer())
    state = ModelState(model, moving=[p for p in model.parameters() if p.requires_grad])
    plain = activated_losses(model, NextWordLoss(words=[5, 6], model=model), collate=collate)
    plain = dataclasses.replace(plain, state=state)
    cache = FrozenCache(place="memory", dtype=None, most_rows=24, longest_row=64, folder=tmp_path)
    return dataclasses.replace(plain, shared=find_shared_work(model, plain, [rows], cache))


@pytest.fixture
def computed(monkeypatch):
    """Count the prefixes that are computed, by their tokens."""
    counts = Counter()
    compute = row_work.compute_prefix

    def count(model, inputs):
        counts[tuple(inputs["input_ids"].flatten().tolist())] += 1
        return compute(model, inputs)

    monkeypatch.setattr(row_work, "compute_prefix", count)
    return counts


def measure(model, losses, rows) -> float:
    with losses.state.held_still():
        return measure_isolation(model, losses, [rows], points_per_pass=2).loss_change


def test_the_frozen_work_of_a_public_row_is_remembered_while_isolation_is_measured(model, losses, rows, computed):
    change = measure(model, losses, rows)
    remembered = sum(computed.values())
    computed.clear()
    losses.shared.remembering = contextlib.nullcontext
    assert measure(model, losses, rows) == change
    assert remembered < sum(computed.values()) / 2


def test_a_row_of_which_a_batch_has_copies_is_computed_once(model, losses, rows, computed):
    row = rows[0]
    batch = losses.build_public_batch([row] * 4)
    with losses.shared.opened(batch.micro_batches):
        losses(model, batch)
    assert [*computed.values()] == [1]


def test_embeddings_that_round_by_a_hook_of_their_own_forget_nothing(model, rows, tmp_path, computed):
    """As those of a base in few bits do, which returns float32."""
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.float())
    cache = FrozenCache(place="memory", dtype=None, most_rows=24, longest_row=64, folder=tmp_path)
    collate = DataCollatorWithPadding(word_tokenizer())
    plain = activated_losses(model, NextWordLoss(words=[5, 6], model=model), collate=collate)
    losses = dataclasses.replace(plain, shared=find_shared_work(model, plain, [rows], cache))
    computed.clear()

    def evaluate() -> int:
        computed.clear()
        losses.of_public(model, rows)
        return sum(computed.values())

    with losses.shared.remembering():
        assert [evaluate() for _ in range(3)] == [4, 4, 0]
        poison = model.get_input_embeddings().register_forward_hook(lambda module, args, output: output * 1)
        assert evaluate() == 4
        poison.remove()
        assert evaluate() == 0


def test_what_limits_a_run_is_found_without_reading_public_rows_at_each_point(tmp_path, monkeypatch):
    put, counts, seen = RepeatedStore.put, Counter(), Counter()
    monkeypatch.setattr(
        RepeatedStore, "put", lambda store, key, tensors: (counts.update([key]), put(store, key, tensors))
    )

    def watch(*args, **settings):
        counts.clear()
        quotients = measure_quotients(*args, **settings)
        seen.update(counts)
        return quotients

    monkeypatch.setattr(objective, "measure_quotients", watch)
    train_activated(tmp_path / "run", rows=activated_rows(12), frozen_cache="memory", max_steps=1)
    assert set(seen.values()) == {2}  # There are four points. What is computed twice is kept.


def test_nothing_is_remembered_afterwards(model, losses, rows, computed):
    measure(model, losses, rows)
    computed.clear()
    for _ in range(3):
        losses.of_public(model, rows)
    assert set(computed.values()) == {3}


def test_frozen_work_that_differs_each_time_is_done_each_time_and_refused(model, losses, rows):
    """As of a layer that counts its calls: what was kept of a row would depend on the rows before it."""
    calls = iter(range(10**6))
    norm = model.get_base_model().model.layers[0].input_layernorm
    norm.register_forward_hook(lambda module, args, output: output * (1 + 0.1 * next(calls)))
    with pytest.raises(CoupledRowsError, match="again moved a row's loss"):
        measure(model, losses, rows)
