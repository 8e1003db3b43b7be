"""The probe as training uses it: before data are touched, through the pipeline that private rows will take."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import TaskType
from transformers import BatchEncoding, DataCollatorForSeq2Seq, DataCollatorWithPadding

from hf_dpzo import ZOTrainer
from hf_dpzo.data.sampling import SealedRows
from hf_dpzo.data.sealed import GlobalRandomnessError
from hf_dpzo.isolation.probe import CoupledRowsError
from hf_dpzo.losses.causal_lm import CausalLMLoss
from hf_dpzo.trajectory.run_log import RunLog

from support.models import causal_lm, classifier, with_lora
from support.rows import labelled_rows


class Centred(torch.nn.Module):
    """A head that subtracts the mean over the batch."""

    def __init__(self, head: torch.nn.Module) -> None:
        super().__init__()
        self.head = head
        head.weight.data *= 30

    def forward(self, x):
        x = self.head(x)
        return x - x.mean(dim=0)


def normalized(**options):
    def head(linear: torch.nn.Module) -> torch.nn.Module:
        return torch.nn.Sequential(linear, Channels(2, **options))

    return head


class Channels(torch.nn.BatchNorm1d):
    """Batch normalization of `[batch, tokens, channels]`."""

    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


@pytest.fixture
def make_trainer(make_args, tokenizer):
    def make(model, *, parts=None, **changes) -> ZOTrainer:
        given = {"train_dataset": labelled_rows(20), "data_collator": DataCollatorWithPadding(tokenizer)}
        return ZOTrainer(model=model, args=make_args(**changes), **{**given, **(parts or {})})

    return make


@pytest.mark.parametrize(
    ("head", "named"),
    [(Centred, "score"), (normalized(track_running_stats=False), r"score\.1")],
    ids=["centred", "batch-norm"],
)
def test_models_that_join_rows_are_refused_before_data_are_touched(head, named, make_trainer, monkeypatch):
    model = classifier()
    model.score = head(model.score)
    monkeypatch.setattr(SealedRows, "__getitems__", lambda rows, drawn: pytest.fail("too far"))
    trainer = make_trainer(model)
    with pytest.raises(CoupledRowsError, match=rf"isolation: .* moved a row's loss .* in module {named} \("):
        trainer.train()
    assert len(trainer.budget.ledger) == 0


class Gated(torch.nn.Module):
    """A head with a branch that joins rows, behind a gate that is closed until it is trained."""

    def __init__(self, head: torch.nn.Module) -> None:
        super().__init__()
        self.head, self.gate = head, torch.nn.Parameter(torch.zeros(1))
        head.weight.data *= 30

    def forward(self, x):
        x = self.head(x)
        return x + self.gate * x.mean(dim=0)


def test_a_branch_that_joins_rows_behind_a_closed_gate_is_refused(make_trainer):
    """Steps evaluate probe points and not the initial weights, so a gate that is zero there proves nothing."""
    model = classifier()
    model.score = Gated(model.score)
    with pytest.raises(CoupledRowsError, match=r"in module score \(Gated\)"):
        make_trainer(model).train()
    assert model.score.gate.item() == 0.0


def test_a_layer_that_joins_rows_within_a_new_adapter_is_refused(make_trainer):
    """PEFT initializes one of the two matrices to zero."""
    model = with_lora(classifier())
    branch = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A
    branch["default"] = Joined(branch["default"])
    with pytest.raises(CoupledRowsError, match="isolation: "):
        make_trainer(model).train()


class Joined(torch.nn.Module):
    """Subtracts from each row the mean of all rows."""

    def __init__(self, linear: torch.nn.Module) -> None:
        super().__init__()
        self.weight = linear.weight

    def forward(self, x):
        x = 30 * torch.nn.functional.linear(x, self.weight)
        return x - x.mean(dim=0)


def test_layers_with_running_statistics_are_accepted(make_trainer):
    model = classifier()
    model.score = normalized()(model.score)
    make_trainer(model).train()


def test_a_run_without_privacy_is_not_probed(make_trainer):
    model = classifier()
    model.score = normalized(track_running_stats=False)(model.score)
    make_trainer(model, method="mezo", noise_multiplier="absent", target_delta="absent").train()


def isolation(trainer) -> dict:
    trainer.train()
    trainer.save_model()
    return json.loads((Path(trainer.args.output_dir) / "privacy.json").read_text())["validity_checks"][
        "numerical_isolation"
    ]


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_padded_lengths_make_runs_bitwise(lora, make_trainer, tokenizer):
    rows = Dataset.from_list([{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 20)
    parts = {"train_dataset": rows, "data_collator": DataCollatorForSeq2Seq(tokenizer)}
    model = with_lora(causal_lm(), TaskType.CAUSAL_LM) if lora else causal_lm()
    stated = isolation(make_trainer(model, parts=parts, padded_lengths=[8, 16]))
    assert stated == {"status": "bitwise", "bound_in_clip_norms": 0.0}


def test_public_rows_are_used_where_they_are_given(make_trainer):
    seen = []

    def loss(model, inputs):
        seen.append(inputs["input_ids"].tolist())
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        return torch.nn.functional.cross_entropy(logits, inputs["labels"], reduction="none")

    public = [{"input_ids": [41, 42, 43 + i], "attention_mask": [1, 1, 1], "labels": i % 2} for i in range(4)]
    make_trainer(classifier(), parts={"per_example_loss": loss, "probe_rows": public}).train()
    assert seen[0][0][-3:] == [41, 42, 43]


def test_public_rows_lose_the_columns_that_private_rows_lose(make_trainer):
    """Otherwise a loss that reads such a column would pass the probe and fail on each private row."""
    rows = labelled_rows(20).add_column("weight", [0.5] * 20)

    def weighted(model, inputs):
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        return inputs["weight"] * torch.nn.functional.cross_entropy(logits, inputs["labels"], reduction="none")

    parts = {"train_dataset": rows, "per_example_loss": weighted, "probe_rows": rows.to_list()[:4]}
    with pytest.raises(ValueError, match="raised KeyError: 'weight'"):
        make_trainer(classifier(), parts=parts).train()
    make_trainer(classifier(), parts=parts, remove_unused_columns=False).train()


class Counting(torch.nn.Module):
    """A layer that keeps a count in a frozen parameter, which would be saved."""

    def __init__(self, head: torch.nn.Module) -> None:
        super().__init__()
        self.head, self.seen = head, torch.nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, x):
        self.seen += x.shape[1]
        return self.head(x)


def test_models_that_count_what_they_see_are_refused(make_trainer):
    model = classifier()
    model.score = Counting(model.score)
    with pytest.raises(CoupledRowsError, match=r"evaluating a batch changed score\.seen"):
        make_trainer(model).train()


def test_every_public_shape_is_probed(make_trainer, monkeypatch):
    shapes = set()

    def loss(model, inputs):
        shapes.add(tuple(inputs["input_ids"].shape))
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        return torch.nn.functional.cross_entropy(logits, inputs["labels"], reduction="none")

    monkeypatch.setattr(SealedRows, "__getitems__", lambda rows, drawn: pytest.fail("private rows are read"))
    monkeypatch.setattr(RunLog, "open", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_trainer(classifier(), parts={"per_example_loss": loss}, padded_lengths=[5, 12]).train()
    assert {shape for shape in shapes if shape[0] > 1} == {(4, 5), (4, 12)}


def test_a_bound_that_is_not_negligible_is_refused(make_trainer):
    """A tiny smoothing magnifies rounding, which depends on the batch where all its logits are computed at once."""
    parts = {**texts(), "per_example_loss": lambda model, inputs: CausalLMLoss(model).evaluate(model, inputs)[0]}
    with pytest.raises(ValueError, match=r"isolation: rounding lets rows .* raise smoothing or clip_norm"):
        make_trainer(causal_lm(), parts=parts, smoothing=1e-6, clip_norm=1e-3).train()


def texts():
    rows = Dataset.from_list(
        [{"input_ids": [5, 6, 7, 8, 9], "attention_mask": [1] * 5, "labels": [5, 6, 7, 8, 9]}] * 20
    )
    return {"train_dataset": rows, "data_collator": collated}


def collated(rows):
    width = max(len(row["input_ids"]) for row in rows)
    fields = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: torch.tensor([list(row[name]) + [fill] * (width - len(row[name])) for row in rows])
        for name, fill in fields.items()
    }


def test_rows_from_a_tokenizer_are_accepted(make_trainer, tokenizer):
    """A tokenizer returns mappings that are not dicts."""
    shapes = set()

    class Tokenized(torch.utils.data.Dataset):
        def __len__(self):
            return 20

        def __getitem__(self, index):
            return BatchEncoding({"input_ids": [5] * (index + 1), "attention_mask": [1] * (index + 1), "labels": 1})

    def loss(model, inputs):
        shapes.add(tuple(inputs["input_ids"].shape))
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        return torch.nn.functional.cross_entropy(logits, inputs["labels"], reduction="none")

    parts = {"train_dataset": Tokenized(), "per_example_loss": loss}
    make_trainer(classifier(), parts=parts, padded_lengths=[8, 16]).train()
    assert {shape for shape in shapes if shape[0] > 1} <= {(4, 8), (4, 16)}


def test_a_column_that_cannot_be_made_up_is_refused_with_a_remedy(make_trainer):
    rows = labelled_rows(20).add_column("text", ["a"] * 20)
    trainer = make_trainer(classifier(), parts={"train_dataset": rows}, remove_unused_columns=False)
    with pytest.raises(ValueError, match=r"column=text: .* pass probe_rows"):
        trainer.train()


def test_errors_on_public_rows_are_shown(make_trainer):
    def wrong(model, inputs):
        raise KeyError("no such field")

    with pytest.raises(ValueError, match=r"raised KeyError: 'no such field'; correct the loss or the collator"):
        make_trainer(classifier(), parts={"per_example_loss": wrong}).train()


def test_a_loss_that_draws_random_numbers_is_refused(make_trainer):
    def drawing(model, inputs):
        return torch.rand(len(inputs["labels"]))

    with pytest.raises(GlobalRandomnessError, match="per_example_loss: it draws from a global random generator"):
        make_trainer(classifier(), parts={"per_example_loss": drawing}).train()


def test_left_padding_is_no_target_of_a_language_model(make_trainer, tokenizer):
    """The first token of a row is predicted from nothing, however far the row was padded."""
    rows = Dataset.from_list([{"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [5, 6, 7]}] * 20)
    parts = {"train_dataset": rows, "data_collator": DataCollatorForSeq2Seq(tokenizer)}
    assert tokenizer.padding_side == "left"
    stated = isolation(make_trainer(causal_lm(), parts=parts))
    assert stated["bound_in_clip_norms"] < 1e-2
