"""Made-up rows have a data set's format and none of its content."""

import numpy as np
import pytest
import torch
from datasets import Array3D, ClassLabel, Dataset, Features, List, Value
from peft import TaskType
from transformers import BertConfig, BertForTokenClassification, DataCollatorWithPadding, LlamaForSequenceClassification

from hf_dpzo.data.collation import LogicalBatchCollator
from hf_dpzo.data.pairs import list_sequences
from hf_dpzo.isolation.measure import build_probe_batches, list_columns
from hf_dpzo.isolation.neighbors import repeat_tokens
from hf_dpzo.isolation.synthetic_rows import generate_probe_rows, generate_rows, infer_columns
from hf_dpzo.losses.heads import build_head_loss
from hf_dpzo.models.activation import locate_invocation

from support.activated import activated_model, activated_rows
from support.models import causal_lm, classifier, llama_config, masked_lm, with_lora
from support.rows import labelled_rows


COLLATOR = LogicalBatchCollator(collate=list, micro_batch_size=2)


TOKENS = {"input_ids": [7, 7], "attention_mask": [1, 1]}


class Rows(torch.utils.data.Dataset):
    """A data set that is not one of the package `datasets`."""

    def __init__(self, *rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def generate_row(dataset, model=None, **settings):
    return generate_rows(dataset, model or classifier(), count=1, length=6, **settings)[0]


def test_rows_have_the_requested_length_and_columns():
    rows = generate_rows(labelled_rows(3), classifier(), count=4, length=6)
    assert len(rows) == 4
    for row in rows:
        assert set(row) == {"input_ids", "attention_mask", "labels"}
        assert len(row["input_ids"]) == 6
        assert row["attention_mask"] == [1] * 6
        assert all(0 < token < 64 for token in row["input_ids"])  # Zero is the padding token.
        assert row["labels"] in (0, 1)


def test_a_loss_can_be_computed_for_them(tokenizer):
    model = with_lora(classifier()).eval()
    inputs = DataCollatorWithPadding(tokenizer)(generate_probe_rows(labelled_rows(2), model))
    assert build_head_loss(model)(model, inputs).isfinite().all()


def test_rows_are_the_same_each_time_and_draw_from_no_global_generator():
    model, dataset = classifier(), Rows({**TOKENS, "weight": 0.5, "labels": 1})
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()
    first, again = (generate_rows(dataset, model, count=3, length=6) for _ in range(2))
    assert first == again
    assert generate_rows(dataset, model, count=2, length=6) == first[:2]
    assert len({tuple(row["input_ids"]) for row in first}) == 3
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]


def test_the_content_of_the_data_makes_no_difference():
    model = classifier()
    secret, other = (
        Rows({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": label})
        for ids, label in (([5, 6, 7], 1), ([9] * 20, 0))
    )
    assert generate_rows(secret, model, count=3, length=6) == generate_rows(other, model, count=3, length=6)


def test_features_are_enough_and_no_row_is_read():
    dataset = labelled_rows(3)
    empty = dataset.select([])
    assert generate_rows(empty, classifier(), count=3, length=6) == generate_rows(
        dataset, classifier(), count=3, length=6
    )


def test_probe_rows_are_five_of_one_length_a_shorter_and_a_longer_one():
    rows = generate_probe_rows(labelled_rows(2), classifier())
    assert [len(row["input_ids"]) for row in rows] == [11] * 5 + [5, 22]
    assert len({tuple(row["input_ids"][:5]) for row in rows}) == 7


@pytest.mark.parametrize("as_tensors", [False, True])
def test_a_torch_dataset_keeps_its_containers(as_tensors):
    row = {**TOKENS, "position_ids": [0, 1], "token_type_ids": [0, 1], "labels": 1}
    row = {name: torch.tensor(value) for name, value in row.items()} if as_tensors else row
    generated = generate_row(Rows(row))
    assert [type(generated[name]) for name in row] == [type(value) for value in row.values()]
    if as_tensors:
        assert [(generated[name].dtype, generated[name].ndim) for name in row] == [
            (v.dtype, v.ndim) for v in row.values()
        ]
        generated = {name: value.tolist() for name, value in generated.items()}
    assert generated["position_ids"] == [0, 1, 2, 3, 4, 5]
    assert generated["token_type_ids"] == [0] * 6


def test_numpy_rows_keep_their_dtypes():
    generated = generate_row(
        Rows({"input_ids": np.array([3, 4], dtype=np.int32), "labels": np.int64(1), "weight": np.float32(2)})
    )
    assert generated["input_ids"].dtype == np.int32
    assert isinstance(generated["labels"], np.int64)
    assert isinstance(generated["weight"], np.float32)


def test_a_formatted_dataset_keeps_its_format():
    generated = generate_row(labelled_rows(2).with_format("torch", columns=["input_ids", "labels"]))
    assert set(generated) == {"input_ids", "labels"}
    assert generated["input_ids"].dtype == torch.int64
    assert generated["labels"].shape == ()


def test_rows_of_a_transformed_dataset_have_the_columns_of_its_output():
    dataset = Dataset.from_list([{"text": "a secret"}]).with_transform(
        lambda batch: {"input_ids": [[5, 6, 7] for _ in batch["text"]], "labels": [1 for _ in batch["text"]]}
    )
    assert set(generate_row(dataset)) == {"input_ids", "labels"}


# ---- Labels ----


def regression(**changes):
    return LlamaForSequenceClassification(llama_config(**changes))


def test_labels_for_language_models_are_their_own_tokens():
    for model in (causal_lm(), masked_lm()):
        generated = generate_row(Rows({**TOKENS, "labels": [1, 2]}), model)
        assert generated["labels"] == generated["input_ids"]


def test_labels_for_regression_are_floats():
    assert isinstance(generate_row(Rows({**TOKENS, "labels": 0.5}), regression(num_labels=1))["labels"], float)


@pytest.mark.parametrize("labels", [[1.0, 0.0], [1, 0], torch.tensor([1.0, 0.0, 0.0])])
def test_multi_label_rows_have_one_number_for_each_label(labels):
    model = regression(num_labels=5, problem_type="multi_label_classification")
    assert len(generate_row(Rows({**TOKENS, "labels": labels}), model)["labels"]) == 5


def test_rows_for_token_classification_have_a_class_for_each_token():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForTokenClassification(BertConfig(vocab_size=64, num_labels=3, **sizes))
    labels = generate_row(Rows({**TOKENS, "labels": [2, 2]}), model)["labels"]
    assert len(labels) == 6
    assert set(labels) <= {0, 1, 2}


def test_classes_for_a_head_of_one_label_are_all_zero():
    rows = generate_rows(labelled_rows(1), regression(num_labels=1), count=8, length=4)
    assert {row["labels"] for row in rows} == {0}


# ---- Other columns ----


def test_columns_are_made_up_from_their_types():
    features = Features(
        {
            "input_ids": List(Value("int32")),
            "label": ClassLabel(names=["a", "b", "c"]),
            "pixel_values": Array3D(shape=(3, 2, 2), dtype="float32"),
            "word_mask": List(Value("float32")),
            "weight": Value("float64"),
            "kept": Value("bool"),
            "pair": List(Value("int64"), length=2),
        }
    )
    generated = generate_row(Dataset.from_dict({name: [] for name in features}, features=features))
    assert generated["label"] in (0, 1)
    assert np.shape(generated["pixel_values"]) == (3, 2, 2)
    assert generated["word_mask"] == [1.0] * 6
    assert 0 < generated["weight"] < 1
    assert generated["kept"] is True
    assert generated["pair"] == [1, 1]


def test_a_length_that_the_features_fix_is_kept():
    features = Features({"input_ids": List(Value("int64"), length=16), "labels": Value("int64")})
    rows = generate_probe_rows(Dataset.from_dict({"input_ids": [], "labels": []}, features=features), classifier())
    assert {len(row["input_ids"]) for row in rows} == {16}
    assert len({tuple(row["input_ids"]) for row in rows}) == 7


def test_columns_that_never_reach_the_collator_are_left_out():
    dataset = Dataset.from_list([{**TOKENS, "labels": 1, "text": "a secret"}])
    assert set(generate_row(dataset, kept_columns={"input_ids", "labels"})) == {"input_ids", "labels"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**TOKENS, "text": "a secret"}, r"column=text: values of type str can not be made up; pass probe_rows"),
        ({**TOKENS, "texts": ["a secret"]}, r"column=texts: values of type str in 1 dimensions"),
        ({**TOKENS, "labels": None}, r"column=labels: values of type NoneType"),
        ({"pixel_values": torch.zeros(3, 4, 5)}, r"column=pixel_values: values of type float in 3 dimensions"),
        ({"input_ids": torch.zeros(1, 4).long()}, r"column=input_ids: values of type int in 2 dimensions"),
        (([5, 6], 1), r"train_dataset: its first rows fail, or are no mappings .*; let it return a dictionary"),
    ],
)
def test_values_that_cannot_be_made_up_are_refused_without_showing_them(row, message):
    with pytest.raises(ValueError, match=message) as caught:
        generate_row(Rows(row))
    assert "secret" not in str(caught.value)


def test_features_that_cannot_be_made_up_are_refused():
    with pytest.raises(ValueError, match=r"column=text: values of type str"):
        generate_row(Dataset.from_list([{**TOKENS, "text": "a secret"}]))
    with pytest.raises(ValueError, match=r"column=pair: values of type dict"):
        generate_row(Dataset.from_list([{**TOKENS, "pair": {"a": 1}}]))


def test_tokens_for_a_model_without_a_vocabulary_are_refused():
    with pytest.raises(
        ValueError, match=r"column=input_ids: the model says of no token that it knows it; pass probe_rows"
    ):
        generate_row(labelled_rows(1), torch.nn.Linear(2, 2))


def test_an_error_of_the_dataset_is_withheld():
    with pytest.raises(ValueError, match=r"train_dataset: its first rows fail, .* on public rows") as caught:
        generate_row(Rows())
    assert caught.value.__context__ is None


def test_no_single_row_decides_the_types_of_columns():
    rows = [{**TOKENS, "labels": 1} for _ in range(4)]
    expected = generate_row(rows)
    for place in range(4):
        for bad in (None, {}, {**TOKENS, "labels": None}, {"input_ids": "text", "labels": 0.5}, (1, 2)):
            assert generate_row([*rows[:place], bad, *rows[place + 1 :]]) == expected


def test_types_that_one_row_more_or_less_could_decide_between_are_refused_either_way():
    one, other = {"input_ids": [5, 6], "labels": 1}, {"input_ids": [5, 6], "labels": "yes"}
    mixed = [one, other] * 4 + [one] + [other] * 30
    for rows in (mixed, mixed[1:], [one, other], [other, one]):
        with pytest.raises(ValueError, match="train_dataset: its first rows have columns of several types"):
            infer_columns(rows)


def test_one_row_of_other_types_changes_nothing_wherever_it_is():
    one, other = {"input_ids": [5, 6], "labels": 1}, {"input_ids": [5, 6], "labels": "yes"}
    expected = [(column.name, column.python_type) for column in infer_columns([one] * 12)]
    for place in range(12):
        rows = [one] * place + [other] + [one] * (11 - place)
        assert [(column.name, column.python_type) for column in infer_columns(rows)] == expected


def test_public_rows_decide_between_several_types():
    mixed = [{"input_ids": [5], "labels": 1}, {"input_ids": [5], "labels": "yes", "more": 1}] * 5
    with pytest.raises(ValueError, match="columns of several types"):
        list_columns(mixed, None)
    assert list_columns(mixed, [{"input_ids": [5], "labels": 1}]) == {"input_ids", "labels"}
    assert list_columns(mixed[:1] * 9, [{"input_ids": [5]}]) == {"input_ids", "labels"}


@pytest.mark.parametrize("invocation", [[5], [5, 6, 7], [5, 5, 5], list(range(5, 25))])
def test_a_row_holds_the_invocation_once_with_tokens_before_and_after_it(invocation):
    few_tokens = causal_lm(num_hidden_layers=1, vocab_size=max(invocation) + 2)  # So that chance would repeat it.
    model = activated_model(few_tokens, alora_invocation_tokens=invocation)
    (rows,) = build_probe_batches(
        activated_rows(3), model, COLLATOR, kept_columns={"input_ids", "labels"}, public_rows=None
    )
    for row in rows:
        tokens, count = row["input_ids"], len(invocation)
        found = [start for start in range(len(tokens)) if tokens[start : start + count] == invocation]
        assert len(found) == 1 and 0 < found[0] < len(tokens) - count
    lengths = {len(row["input_ids"]) for row in rows}
    assert len(lengths) == 3


def probe(model, lengths: list[int]) -> list[dict]:
    return generate_probe_rows(activated_rows(3), model, lengths=lengths)


def test_made_up_rows_learn_an_answer_alone_or_each_token_so_that_both_ways_are_tried():
    """From an invocation in the middle on, or as a whole: of the second kind are two rows of the commonest length."""
    model = activated_model(causal_lm(num_hidden_layers=1), alora_invocation_tokens=[5, 6])
    rows = generate_probe_rows(activated_rows(3), model, lengths=[8] * 5 + [4, 12])
    learned = [[label != -100 for label in row["labels"]] for row in rows]
    assert learned[:3] == [[False] * 6 + [True] * 2] * 3
    assert all(map(all, learned[3:]))
    for row in rows:
        targets = zip(row["labels"], row["input_ids"], strict=True)
        assert all(label in (-100, token) for label, token in targets)
    (timed,) = generate_rows(activated_rows(3), model, count=1, length=40)
    assert [label == -100 for label in timed["labels"]] == [True] * 22 + [False] * 18
    prompts = generate_probe_rows(activated_rows(3), model, lengths=[8] * 5, ending=[5, 6])
    assert all(row["labels"] == row["input_ids"] for row in prompts)


def test_rows_beside_the_first_learn_few_tokens_because_each_costs_a_product_with_all_words():
    plain, lengths = causal_lm(num_hidden_layers=1), [48] * 5 + [24, 36]
    targets = [[label for label in row["labels"] if label != -100] for row in probe(plain, lengths)]
    assert [len(row) for row in targets] == [48, 16, 16, 16, 16, 24, 36]
    assert targets[1] == probe(plain, lengths)[1]["input_ids"][-16:]
    model = activated_model(causal_lm(num_hidden_layers=1), alora_invocation_tokens=[5, 6])
    counts = [sum(label != -100 for label in row["labels"]) for row in probe(model, lengths)]
    assert counts == [22, 16, 16, 48, 48, 24, 36]  # Rows as a whole have targets before the invocation.


@pytest.mark.parametrize("dtype", ["uint16", "int64"])
def test_labels_that_can_not_be_negative_are_all_learned(dtype):
    forms = (np.asarray([3], dtype=dtype), torch.tensor([3], dtype=getattr(torch, dtype)))
    features = Features({"input_ids": List(Value("int64")), "labels": List(Value(dtype))})
    kinds = [[{"input_ids": [3], "labels": form}] * 9 for form in forms]
    for dataset in (*kinds, Dataset.from_dict({"input_ids": [], "labels": []}, features=features)):
        rows = generate_probe_rows(dataset, causal_lm(num_hidden_layers=1), lengths=[48] * 5)
        learned = [sum(int(label) != -100 for label in row["labels"]) for row in rows]
        assert learned == ([48] * 5 if dtype == "uint16" else [48, 16, 16, 16, 16])


def test_rows_end_as_those_of_the_data_do():
    model = activated_model(causal_lm(num_hidden_layers=1), alora_invocation_tokens=[5, 6])
    texts = [{"input_ids": [3], "labels": [3]}] * 9
    rows = generate_probe_rows(texts, model, lengths=[9, 4, 1], ending=[7, 5, 6])
    assert [(len(row["input_ids"]), row["input_ids"][-3:]) for row in rows] == [(9, [7, 5, 6]), *[(4, [7, 5, 6])] * 2]
    assert all(row["labels"] == row["input_ids"] for row in rows)


def test_rows_without_an_invocation_are_those_of_an_ordinary_adapter():
    ordinary = generate_probe_rows(activated_rows(3), with_lora(causal_lm(), TaskType.CAUSAL_LM))
    assert generate_probe_rows(activated_rows(3), causal_lm()) == ordinary


def test_both_texts_of_a_pair_hold_the_invocation():
    model = activated_model(alora_invocation_tokens=[5, 6, 7])
    for names in (("chosen_ids", "rejected_ids"), ("prompt_ids", "chosen_ids", "rejected_ids")):
        for row in generate_probe_rows([{name: [3] for name in names}] * 9, model, lengths=[2, 5, 11]):
            texts = torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, list_sequences(row))), batch_first=True)
            assert (locate_invocation(texts, [5, 6, 7]) >= 0).all()
            (repeated, *_) = repeat_tokens(row, [], kept=[5, 6, 7])
            texts = torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, list_sequences(repeated))), batch_first=True)
            assert (locate_invocation(texts, [5, 6, 7]) >= 0).all()


def test_rows_of_a_fixed_length_without_room_for_the_invocation_can_not_be_made_up():
    features = Features({"input_ids": List(Value("int64"), length=2), "labels": List(Value("int64"), length=2)})
    rows = Dataset.from_dict({"input_ids": [[5, 6]], "labels": [[5, 6]]}, features=features)
    with pytest.raises(ValueError, match="2 tokens have no room for the 3 that activate"):
        generate_probe_rows(rows, activated_model(alora_invocation_tokens=[5, 6, 7]))
