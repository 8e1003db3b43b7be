"""The probe goes the way of training: the same callable, the same code, and neighbours chosen to move a row."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import (
    BartConfig,
    BartForCausalLM,
    DataCollatorWithPadding,
    MixtralConfig,
    MixtralForSequenceClassification,
    Qwen2MoeConfig,
    Qwen2MoeForSequenceClassification,
)

from hf_dpzo import ZOTrainer
from hf_dpzo.data.collation import LogicalBatchCollator
from hf_dpzo.data.sampling import FetchedRow
from hf_dpzo.isolation import measure as measuring
from hf_dpzo.isolation.measure import computes_by_value
from hf_dpzo.isolation.neighbors import repeat_tokens
from hf_dpzo.isolation.probe import CoupledRowsError
from hf_dpzo.losses.function import FunctionLoss
from hf_dpzo.losses.prompting import NextWordLoss
from hf_dpzo.models.state import ModelState
from hf_dpzo.step.batch_losses import BatchLosses

from support.models import causal_lm, classifier, with_lora, word_tokenizer
from support.rows import labelled_rows
from support.runs import short_args


def trainer_of(folder, model, **changes) -> ZOTrainer:
    parts = {"data_collator": DataCollatorWithPadding(word_tokenizer()), "train_dataset": labelled_rows(40)}
    given = {name: changes.pop(name) for name in ("per_example_loss", "probe_rows", *parts) if name in changes}
    return ZOTrainer(model=model, args=short_args(folder, **changes), **{**parts, **given})


def stated(trainer: ZOTrainer) -> dict:
    trainer.train()
    trainer.save_model()
    said = json.loads((Path(trainer.args.output_dir) / "privacy.json").read_text())
    return said["validity_checks"]["numerical_isolation"]


# ---- Losses ----


def losses_of(loss, *, micro_batch_size: int = 2) -> BatchLosses:
    model = torch.nn.Linear(1, 1)
    collator = LogicalBatchCollator(
        collate=lambda rows: torch.tensor([row["x"] for row in rows]), micro_batch_size=micro_batch_size
    )
    return BatchLosses(
        loss=FunctionLoss(loss),
        collator=collator,
        prepare=lambda inputs: inputs,
        device=torch.device("cpu"),
        state=ModelState(model, moving=model.parameters()),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_are_copied_before_the_next_micro_batch(dtype):
    """A graph that a loss is compiled to returns the same memory each time."""
    memory = torch.zeros(8, dtype=dtype)

    def loss(model, inputs):
        memory[: len(inputs)] = inputs
        return memory[: len(inputs)]

    losses = losses_of(loss)
    rows = [{"x": float(i)} for i in range(6)]
    fetched = [FetchedRow(unit=i, row=row, slot=i) for i, row in enumerate(rows)]
    model = torch.nn.Linear(1, 1)
    batch = losses.collator(fetched)["batch"]
    assert sorted(losses(model, batch).tolist()) == [0, 1, 2, 3, 4, 5]
    assert losses.of_public(model, rows).tolist() == [0, 1, 2, 3, 4, 5]


# ---- The callable ----


@pytest.fixture
def callables(monkeypatch) -> dict[str, set]:
    """The models that the probe and the steps evaluate."""
    seen = {"probed": set(), "trained": set()}
    measure, evaluate = measuring._measure, BatchLosses.__call__

    def measured(model, losses, batches, tick):
        seen["probed"].add(id(model))
        return measure(model, losses, batches, tick)

    def evaluated(losses, model, batch):
        seen["trained"].add(id(model))
        return evaluate(losses, model, batch)

    monkeypatch.setattr(measuring, "_measure", measured)
    monkeypatch.setattr(BatchLosses, "__call__", evaluated)
    return seen


def test_what_is_probed_is_what_is_trained(callables, tmp_path):
    trainer_of(tmp_path, classifier()).train()
    assert callables["probed"] == callables["trained"]


def test_a_compiled_model_is_probed_compiled_and_as_it_was(callables, tmp_path):
    settings = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 1, "padded_lengths": [16]}
    trainer = trainer_of(tmp_path, classifier(num_hidden_layers=1), **settings)
    trainer.train()
    assert callables["trained"] == {id(trainer.model_wrapped)}
    assert callables["probed"] == {id(trainer.model_wrapped), id(trainer.model)}


def joining(graph, example_inputs):
    """Compile to what adds to each row's logits some of the other rows'. A backend of torch.compile."""

    def run(*inputs):
        outputs = graph(*inputs)
        return tuple(
            out + 0.1 * out.sum(0, keepdim=True)
            if isinstance(out, torch.Tensor) and out.is_floating_point() and out.shape[-1:] == (2,)
            else out
            for out in outputs
        )

    return run


def test_rows_that_only_the_compiled_model_joins_are_found(monkeypatch, tmp_path):
    trainer = trainer_of(tmp_path, classifier(num_hidden_layers=1), max_steps=1, padded_lengths=[16])
    prepare = trainer.accelerator.prepare_model
    monkeypatch.setattr(
        trainer.accelerator,
        "prepare_model",
        lambda *given, **rest: torch.compile(prepare(*given, **rest), backend=joining),
    )
    with pytest.raises(CoupledRowsError, match="moved a row's loss"):
        trainer.train()


# ---- Neighbours ----


def mixture(**changes) -> Qwen2MoeForSequenceClassification:
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "num_labels": 2}
    experts = {"num_experts": 8, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    return Qwen2MoeForSequenceClassification(Qwen2MoeConfig(**sizes, **experts, **changes)).eval()


def mixtral(**changes) -> MixtralForSequenceClassification:
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "num_labels": 2}
    return MixtralForSequenceClassification(MixtralConfig(**sizes, **changes)).eval()


@pytest.mark.parametrize("experts", [None, "eager", "grouped_mm"])
@pytest.mark.parametrize("make", [mixture, mixtral])
def test_a_mixture_of_experts_is_never_bitwise(make, experts, tmp_path):
    model = make(**({} if experts is None else {"experts_implementation": experts}))
    isolation = stated(trainer_of(tmp_path, model, padded_lengths=[16], max_steps=1))
    assert isolation["status"] == "bounded"
    assert isolation["bound_in_clip_norms"] >= 1e-6


def test_a_mixture_of_experts_whose_rows_are_alone_is_bitwise(tmp_path):
    model = mixture()
    isolation = stated(trainer_of(tmp_path, model, per_device_train_batch_size=1, max_steps=1))
    assert isolation["status"] == "bitwise"


class Sparse(torch.nn.Module):
    """A head that computes only where its inputs are positive, which selects rows of a product by their values."""

    def __init__(self, head: torch.nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        chosen = (flat.sum(-1) > 0).nonzero().squeeze(1)
        out = torch.zeros(*flat.shape[:-1], self.head.out_features)
        return out.index_copy(0, chosen, self.head(flat[chosen])).view(*x.shape[:-1], -1)


def test_a_model_that_selects_by_values_is_not_bitwise(tmp_path):
    model = classifier()
    model.score = Sparse(model.score)
    assert stated(trainer_of(tmp_path, model, padded_lengths=[16], max_steps=1))["status"] == "bounded"


@pytest.mark.parametrize("lora", [False, True])
def test_a_plain_model_computes_by_shapes_alone(lora, tmp_path):
    model = with_lora(classifier()) if lora else classifier()
    trainer = trainer_of(tmp_path, model, padded_lengths=[16], max_steps=1)
    trainer.train()
    assert not computes_by_value(model, trainer._estimate.losses, trainer._public_batches[0])


def test_repeated_tokens_are_labels_only_where_labels_are_tokens():
    def labels_of(row):
        return [copy["labels"] for copy in repeat_tokens({"input_ids": [5, 6, 7], **row}, [{"input_ids": [9]}])]

    assert labels_of({"labels": [5, 6, 7]}) == [[5, 5, 5], [7, 7, 7], [9, 9, 9]]
    assert labels_of({"labels": [-100, -100, 7]}) == [[-100, -100, 5], [-100, -100, 7], [-100, -100, 9]]
    assert labels_of({"labels": [0, 1, 1]}) == [[0, 1, 1]] * 3  # Classes of tokens.
    assert labels_of({"labels": 1}) == [1, 1, 1]
    (first, *_) = repeat_tokens({"input_ids": torch.tensor([5, 6]), "labels": 1}, [])
    assert first["input_ids"].tolist() == [5, 5]


# ---- Padding to public lengths ----


def bart(**changes) -> BartForCausalLM:
    sizes = {"vocab_size": 64, "d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
    return BartForCausalLM(BartConfig(**sizes, init_std=0.2, pad_token_id=0, **changes)).eval()


@pytest.mark.parametrize("lengths", [None, [16], [5, 16]])
def test_a_decoder_without_positions_is_refused_with_and_without_public_lengths(lengths, tmp_path):
    """Left padding takes the first of its positions."""
    model = bart()
    with pytest.raises(CoupledRowsError, match="pass position_ids and masks that leave padding out"):
        trainer_of(
            tmp_path, model, per_example_loss=NextWordLoss(words=[5, 6], model=model), padded_lengths=lengths
        ).train()


def test_a_decoder_with_positions_is_accepted_with_public_lengths(tmp_path):
    model = causal_lm()
    loss = NextWordLoss(words=[5, 6], model=model)
    assert stated(trainer_of(tmp_path, model, per_example_loss=loss, padded_lengths=[16]))["status"] == "bitwise"


# ---- The first step ----


def test_a_run_is_guarded_by_its_own_rows_collator_and_loss(tmp_path):
    """The model's own dummy inputs would not fit a loss that reads features."""
    seen = []

    class Features(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(3, 2)
            self.device = torch.device("cpu")

        def forward(self, features):
            return self.linear(features)

    def loss(model, inputs):
        seen.append(tuple(inputs["features"].shape))
        return torch.nn.functional.cross_entropy(model(inputs["features"]), inputs["labels"], reduction="none")

    rows = Dataset.from_list([{"features": [0.1 * i, 1.0, 2.0], "labels": i % 2} for i in range(40)])
    trainer = trainer_of(
        tmp_path,
        Features(),
        train_dataset=rows.with_format("torch"),
        data_collator=lambda rows: {name: torch.stack([row[name] for row in rows]) for name in rows[0]},
        per_example_loss=loss,
        probe_rows=rows.with_format("torch").select(range(4)),
        remove_unused_columns=False,
    )
    trainer.train()
    assert set(seen) <= {(n, 3) for n in range(1, 5)}


def test_a_loss_that_counts_errors_is_accepted(tmp_path):
    """It is the same at both probe points of most rows."""

    def errors(model, inputs):
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        return (logits.argmax(dim=-1) != inputs["labels"]).float()

    trainer_of(tmp_path, classifier(), per_example_loss=errors, padded_lengths=[16], smoothing=1e-5).train()
