"""Metrics of the library `evaluate` in `compute_metrics`: the numbers are those of plain computation."""

import sys

import datasets
import evaluate
import numpy as np
import pytest
from transformers import DataCollatorWithPadding

from hf_dpzo import ZOTrainer

from support.models import one_layer, with_lora
from support.rows import few_public_rows, labelled_rows


CLASSES = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
INFO = {"description": "", "citation": "", "inputs_description": "", "features": CLASSES}
SCRIPT = '''
import datasets
import evaluate


class Recall(evaluate.Metric):
    """A metric as the Hub holds them: a file with one class."""

    def _info(self):
        whole = datasets.Value("int64")
        features = datasets.Features({"predictions": whole, "references": whole})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        hits = [predicted for predicted, true in zip(predictions, references) if true == 1]
        return {"recall": sum(hits) / len(hits)}
'''


class Accuracy(evaluate.Metric):
    """The share of rows whose class is right."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(**INFO)

    def _compute(self, predictions, references) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.array(predictions) == np.array(references)))}


@pytest.fixture
def metrics(tmp_path, monkeypatch):
    """A subclass, and one that is loaded from a file, joined."""
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "metrics")
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", tmp_path / "modules")
    # Whatever this process has loaded before was in another folder.
    monkeypatch.syspath_prepend(tmp_path / "modules")
    for name in [name for name in sys.modules if name.partition(".")[0] == "evaluate_modules"]:
        monkeypatch.delitem(sys.modules, name)
    script = tmp_path / "recall" / "recall.py"
    script.parent.mkdir()
    script.write_text(SCRIPT)
    return evaluate.combine([Accuracy(), evaluate.load(str(script))])


@pytest.mark.parametrize("by_batch", [False, True])
def test_metrics_of_evaluate_are_those_of_plain_computation(metrics, make_args, tokenizer, by_batch):
    def compute(prediction, compute_result=True):
        metrics.add_batch(predictions=prediction.predictions.argmax(-1), references=prediction.label_ids)
        return metrics.compute() if compute_result else {}

    args = make_args(eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=5, batch_eval_metrics=by_batch)
    trainer = ZOTrainer(
        model=with_lora(one_layer()),
        args=args,
        train_dataset=labelled_rows(40),
        eval_dataset=labelled_rows(12, seed=1),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=compute,
        probe_rows=few_public_rows(),
    )
    trainer.train()
    evaluated = [log for log in trainer.state.log_history if "eval_accuracy" in log]
    assert [log["step"] for log in evaluated] == [2, 4]

    trainer.compute_metrics = None
    trainer.args.batch_eval_metrics = False
    prediction = trainer.predict(trainer.eval_dataset)
    guessed, true = prediction.predictions.argmax(-1), prediction.label_ids
    assert evaluated[-1]["eval_accuracy"] == (guessed == true).mean()
    assert evaluated[-1]["eval_recall"] == guessed[true == 1].mean()
    assert 0 < true.mean() < 1
