"""Two processes train the ready classes of `hf_dpzo.trl` as one does, and evaluate all pairs once."""

from pathlib import Path

import pytest
import torch

from hf_dpzo.models.fingerprints import fingerprint_values

from support.joined import build, rows_of
from support.processes import Here, alone, frozen
from support.runs import fingerprint, released


ARGS = {"padded_lengths": [12], "learning_rate": 0.1, "max_steps": 2, "expected_batch_size": 6}


def job(here: Here, folder: Path, name: str, args: dict) -> tuple:
    here.patch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    frozen(here, units=24)
    trainer = build(name, folder, args={**ARGS, **args}, eval_dataset=rows_of(name, 7, first=24))
    trainer.train()
    metrics = trainer.evaluate()
    return fingerprint(trainer), {
        key: value for key, value in metrics.items() if "_rewards" in key or "accuracy" in key
    }


@pytest.mark.parametrize(
    ("name", "args"),
    [pytest.param("reward", {}, marks=pytest.mark.slow), ("dpo", {"precompute_ref_log_probs": True})],
    ids=str,
)
def test_two_processes_train_pairs_as_one_does(pair, tmp_path, name, args):
    (first, metrics), (second, same) = pair.each(job, tmp_path / "two", name, args)
    assert first == second and metrics == same
    expected, values = alone(job, tmp_path / "one", name, args)
    assert released(tmp_path / "two") == released(tmp_path / "one")
    assert first == expected
    assert metrics == pytest.approx(values)


def reference(here: Here, folder: Path, args: dict) -> tuple:
    here.patch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    torch.manual_seed(here.rank)
    trainer = build("dpo", folder, args={**ARGS, **args, "max_steps": 1}, eval_dataset=None)
    trainer.train()
    model = trainer.ref_model
    weights = None if model is None else fingerprint_values(model.parameters())
    return fingerprint(trainer), weights, trainer.train_dataset[:].get("ref_chosen_logps")


@pytest.mark.parametrize(
    "args", [{}, pytest.param({"precompute_ref_log_probs": True}, marks=pytest.mark.slow)], ids=str
)
def test_the_reference_is_what_the_first_process_began_from(pair, tmp_path, args):
    first, second = pair.each(reference, tmp_path, args)
    assert first == second
