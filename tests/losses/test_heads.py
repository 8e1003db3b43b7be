"""For every head: the loss of a row is the model's own of that row alone, and its neighbours do not move it."""

import copy

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaModel,
    ProphetNetConfig,
    ProphetNetForConditionalGeneration,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_dpzo.isolation.synthetic_rows import generate_probe_rows
from hf_dpzo.losses import FunctionLoss, OwnLoss, QuestionAnsweringLoss, TokenClassificationLoss
from hf_dpzo.losses.heads import as_loss, build_head_loss
from hf_dpzo.losses.own import split_rows

from support.heads import BERT, CASES, STACKED, text
from support.models import llama_config


ROWS = 5
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def alone(model, case, rows):
    """The model's own loss of each row by itself."""
    model = copy.deepcopy(model)  # Transformers writes the kind of the problem into the configuration.
    return torch.stack([model(**case.collate([row])).loss for row in rows])


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_loss_of_a_row_is_the_models_own_of_that_row_alone(name):
    case = CASES[name]
    model, rows = case.model(), case.rows(ROWS)
    loss = build_head_loss(model)
    assert type(loss).__name__ == case.loss
    before = model.config.to_dict()
    losses = loss(model, case.collate(rows))
    torch.testing.assert_close(losses, alone(model, case, rows), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss.evaluate(model, case.collate(rows))[0], losses, rtol=1e-4, atol=1e-5)
    assert len(losses.unique()) > 1
    assert model.config.to_dict() == before


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_neighbours_do_not_move_the_loss_of_a_row(name):
    case = CASES[name]
    model, rows = case.model(), case.rows(3 * ROWS)
    loss = build_head_loss(model)
    first, others = (loss(model, case.collate([rows[0], *rows[1 + k * 4 : 5 + k * 4]]))[0] for k in (0, 1))
    torch.testing.assert_close(first, others, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_rows_can_be_made_up_for_every_head(name):
    case = CASES[name]
    model = case.model()
    made_up = generate_probe_rows(case.rows(4), model)
    losses = [build_head_loss(model)(model, case.collate([row])) for row in made_up]
    assert torch.cat(losses).isfinite().all()
    if case.collator is not STACKED:
        together = build_head_loss(model)(model, case.collate(made_up))
        torch.testing.assert_close(together, torch.cat(losses), rtol=1e-4, atol=1e-5)


# ---- Kinds of problems ----


def classify(labels, **changes):
    model = CASES["classes"].model(**changes)
    inputs = {"input_ids": torch.tensor([[5, 6, 3]] * len(labels)), "labels": labels}
    return build_head_loss(model)(model, inputs), model, inputs


@torch.no_grad()
def test_the_labels_of_one_batch_do_not_decide_for_the_next():
    """Transformers writes what the first batch seems to be into the configuration."""
    model, rows = CASES["classes"].model(), {"input_ids": torch.tensor([[5, 6, 3]])}
    loss = build_head_loss(model)
    several, one = (loss(model, {**rows, "labels": labels}) for labels in (torch.ones(1, 3), torch.tensor([1])))
    assert not torch.allclose(several, one)
    assert model.config.problem_type is None


@torch.no_grad()
def test_a_column_of_numbers_is_not_compared_across_rows():
    flat, *_ = classify(torch.tensor([0.5, 2.0]), num_labels=1)
    column, *_ = classify(torch.tensor([[0.5], [2.0]]), num_labels=1)
    assert flat.shape == (2,)
    assert torch.equal(flat, column)


@torch.no_grad()
def test_several_labels_may_be_integers():
    whole, *_ = classify(torch.tensor([[1, 0, 1]]))
    numbers, *_ = classify(torch.tensor([[1.0, 0.0, 1.0]]))
    assert torch.equal(whole, numbers)


# ---- Padding and odd labels ----


@torch.no_grad()
def test_labels_at_padding_never_count():
    case = CASES["tokens"]
    model, inputs = case.model(), case.collate(case.rows(ROWS))
    losses = TokenClassificationLoss(model)(model, inputs)
    inputs["labels"][inputs["attention_mask"] == 0] = 1
    assert torch.equal(losses, TokenClassificationLoss(model)(model, inputs))


@torch.no_grad()
def test_answers_are_looked_for_among_a_rows_own_tokens():
    """Upstream compares with the scores at padding too, so that longer neighbours would move the loss."""
    case = CASES["answers"]
    model, rows = case.model(), case.rows(ROWS)
    inputs = case.collate(rows)
    loss = QuestionAnsweringLoss(model)
    scores = loss.scores(model, inputs)
    for end in scores:
        end[inputs["attention_mask"] == 0] += 7
    torch.testing.assert_close(loss.losses(scores, inputs), alone(model, case, rows), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_answer_behind_the_last_token_counts_as_zero():
    case = CASES["answers"]
    model = case.model()
    inputs = case.collate([text(0, start_positions=1, end_positions=9), text(2, start_positions=4, end_positions=4)])
    loss = QuestionAnsweringLoss(model)
    start, end = loss.scores(model, inputs)
    own = inputs["attention_mask"][0].bool()
    expected = -start[0][own].log_softmax(0)[1] / 2
    torch.testing.assert_close(loss.losses((start, end), inputs)[0], expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["tokens", "masked words"])
def test_a_target_that_is_no_class_is_nan_and_a_row_without_targets_zero(name):
    case = CASES[name]
    model, inputs = case.model(), case.collate(case.rows(3))
    inputs["labels"][0, 1] = 99
    inputs["labels"][1] = -100
    losses = build_head_loss(model).evaluate(model, inputs)[0]
    assert losses[0].isnan() and losses[1] == 0 and losses[2].isfinite()


# ---- Subclasses, and models with a loss of their own ----


class Tagger(BertForTokenClassification):
    """A subclass that changes nothing about its loss."""


class Focal(BertForSequenceClassification):
    """A subclass that computes another loss."""

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        logits = super().forward(input_ids=input_ids, attention_mask=attention_mask).logits
        wrong = 1 - logits.softmax(-1).gather(1, labels[:, None])
        return SequenceClassifierOutput(loss=wrong.square().mean(), logits=logits)


class Plain(torch.nn.Module):
    def __init__(self, output):
        super().__init__()
        self.embed, self.output = torch.nn.Embedding(64, 3), output

    def forward(self, input_ids, labels=None):
        logits = self.embed(input_ids).mean(1)
        return self.output(torch.nn.functional.cross_entropy(logits, labels), logits)


def test_a_subclass_has_the_head_of_its_class():
    assert isinstance(build_head_loss(Tagger(BertConfig(**BERT))), TokenClassificationLoss)


@torch.no_grad()
def test_a_subclass_with_a_loss_of_its_own_is_trained_on_that():
    model = Focal(BertConfig(**BERT)).eval()
    case = CASES["classes"]
    loss = build_head_loss(model)
    assert isinstance(loss, OwnLoss)
    torch.testing.assert_close(loss(model, case.collate(case.rows(3))), alone(model, case, case.rows(3)))


@torch.no_grad()
def test_a_models_own_loss_does_not_decide_by_one_row_for_the_next():
    """Transformers writes the kind of the problem of the first labels into the configuration."""
    case = CASES["several labels"]
    model = case.model()
    torch.testing.assert_close(
        OwnLoss(model)(model, case.collate(case.rows(3))), build_head_loss(model)(model, case.collate(case.rows(3)))
    )
    assert model.config.problem_type is None


def test_a_loss_function_that_a_user_set_is_kept():
    model = CASES["tokens"].model()
    model.loss_function = lambda **parts: parts["logits"].mean()
    assert isinstance(build_head_loss(model), OwnLoss)


@pytest.mark.parametrize("name", ["loss_function", "_loss_function"])
def test_a_loss_function_of_a_subclass_is_kept(name):
    def mean(**parts):
        return parts["logits"].mean()

    model = CASES["tokens"].model()
    model.__class__ = type("Mine", (type(model),), {name: property(lambda model: mean)})
    assert isinstance(build_head_loss(model), OwnLoss)


@torch.no_grad()
@pytest.mark.parametrize("output", [lambda loss, logits: {"loss": loss, "logits": logits}, lambda *both: both])
def test_a_plain_module_is_trained_on_the_loss_that_it_returns(output):
    torch.manual_seed(0)
    model, inputs = Plain(output), {"input_ids": torch.tensor([[5, 6], [7, 8]]), "labels": torch.tensor([0, 2])}
    losses, scores = build_head_loss(model).evaluate(model, inputs)
    expected = torch.nn.functional.cross_entropy(scores, inputs["labels"], reduction="none")
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([0])}, r"model=Plain: it returned no loss"),
        ({"input_ids": torch.ones(2, 3), "labels": torch.ones(3)}, r"inputs=labels: its first dimension does not"),
    ],
)
def test_a_loss_that_cannot_be_told_apart_by_rows_is_refused(inputs, message):
    model = Plain(lambda loss, logits: {"logits": logits})
    with pytest.raises(ValueError, match=message):
        OwnLoss(model)(model, inputs)


def test_rows_are_split_with_what_is_no_tensor():
    rows = list(split_rows({"x": torch.arange(4).reshape(2, 2), "boxes": [{"a": 1}, {"a": 2}], "return_dict": True}))
    assert [row["boxes"] for row in rows] == [[{"a": 1}], [{"a": 2}]]
    assert rows[1]["x"].tolist() == [[2, 3]] and rows[1]["return_dict"] is True


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match=r"model=LlamaModel: no per-example loss"):
        build_head_loss(LlamaModel(llama_config()))


# ---- Functions ----


@pytest.fixture
def counted():
    """A classifier, its rows, and the number of its forward passes."""
    model, calls = CASES["classes"].model(), []
    model.register_forward_hook(lambda *call: calls.append(1))
    return model, CASES["classes"].collate(CASES["classes"].rows(3)), calls


@torch.no_grad()
def test_the_scores_of_a_function_are_those_of_its_own_forward_pass(counted):
    model, inputs, calls = counted
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    loss = as_loss(lambda model, inputs: model(**given).logits.sum(dim=1), model)
    losses, scores = loss.evaluate(model, inputs)
    assert len(calls) == 1
    torch.testing.assert_close(losses, scores.sum(dim=1))


@torch.no_grad()
def test_a_function_without_a_forward_pass_of_its_own_has_the_scores_of_the_head():
    case = CASES["t5"]
    model, inputs = case.model(), case.collate(case.rows(3))
    _, scores = as_loss(lambda model, inputs: inputs["labels"][:, 0] * 1.0, model).evaluate(model, inputs)
    assert scores.shape == (3, inputs["labels"].shape[1], 64)


@torch.no_grad()
def test_a_function_without_any_scores_is_evaluated_all_the_same():
    loss = FunctionLoss(lambda model, inputs: inputs["x"])
    model, inputs = torch.nn.Linear(1, 1), {"x": torch.ones(2)}
    assert [loss.evaluate(model, inputs)[1] for _ in range(2)] == [None, None]


def test_a_model_whose_loss_is_not_that_of_its_table_is_trained_on_its_own():
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    layers = {"num_encoder_layers": 1, "num_decoder_layers": 1, "num_encoder_attention_heads": 2}
    config = ProphetNetConfig(vocab_size=64, num_decoder_attention_heads=2, **sizes, **layers)
    assert isinstance(build_head_loss(ProphetNetForConditionalGeneration(config)), OwnLoss)
