"""Progress bars show epsilon, and a notebook's table has no column for a loss that is never shown."""

import pytest
import transformers.trainer
from transformers import DataCollatorWithPadding, ProgressCallback
from transformers.utils.notebook import NotebookProgressCallback

import hf_dpzo.trainer.notebook
import hf_dpzo.trainer.progress
from hf_dpzo import ZOTrainer
from hf_dpzo.trainer.notebook import EpsilonNotebookCallback, EpsilonTracker
from hf_dpzo.trainer.progress import EpsilonProgressCallback

from support.models import one_layer, with_lora, word_tokenizer
from support.rows import few_public_rows, labelled_rows
from support.runs import short_args


@pytest.fixture
def notebook(monkeypatch):
    """What transformers does in a notebook; returns the tables that were shown, as HTML."""
    for module in (transformers.trainer, hf_dpzo.trainer.progress):
        monkeypatch.setattr(module, "DEFAULT_PROGRESS_CALLBACK", NotebookProgressCallback)
    shown = []
    monkeypatch.setattr(EpsilonTracker, "display", lambda tracker: shown.append(tracker.inner_table))
    return shown


def run(folder, **changes):
    trainer = ZOTrainer(
        model=with_lora(one_layer()),
        args=short_args(folder, disable_tqdm=False, max_steps=2, padded_lengths=[16], **changes),
        train_dataset=labelled_rows(16),
        eval_dataset=labelled_rows(4),
        data_collator=DataCollatorWithPadding(word_tokenizer()),
        probe_rows=few_public_rows(),
    )
    trainer.train()
    return trainer


def test_a_terminal_shows_epsilon_on_its_bar(tmp_path, capsys):
    trainer = run(tmp_path)
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert EpsilonProgressCallback in kinds and ProgressCallback not in kinds
    said = capsys.readouterr().err
    assert "epsilon=" in said and "Training: " in said and "Evaluating: " not in said
    trainer.evaluate()
    assert "Evaluating: " in capsys.readouterr().err


def test_a_notebook_shows_epsilon_step_by_step(tmp_path, notebook):
    trainer = run(tmp_path)
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert EpsilonNotebookCallback in kinds and NotebookProgressCallback not in kinds
    logged = [(row["step"], row["epsilon"]) for row in trainer.state.log_history if "epsilon" in row]
    header, *lines = notebook[-1]
    assert header == ["Step", "Epsilon"]
    assert [tuple(line) for line in lines] == logged


def test_a_notebook_shows_epsilon_beside_each_evaluation(tmp_path, notebook):
    trainer = run(tmp_path, eval_strategy="steps", eval_steps=1)
    header, *lines = notebook[-1]
    assert header[:2] == ["Step", "Epsilon"] and "Training Loss" not in header and "Validation Loss" in header
    assert [line[0] for line in lines] == [1, 2]
    logged = [row["epsilon"] for row in trainer.state.log_history if "epsilon" in row]
    assert [line[1] for line in lines] == logged


def test_an_evaluation_after_training_shows_metrics_alone(tmp_path, notebook, monkeypatch):
    trainer = run(tmp_path)
    shown = []
    monkeypatch.setattr(hf_dpzo.trainer.notebook, "display", lambda html: shown.append(html.data))
    trainer.evaluate()
    (table,) = shown
    assert "eval_loss" in table and "Training Loss" not in table and "runtime" not in table
