"""Each row has a loss of its own, equal to the model's own loss on a batch of one."""

import pytest
import torch
from peft import PromptTuningConfig, TaskType, get_peft_model
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
    LlamaModel,
)

from hf_dpzo.losses import CausalLMLoss, FunctionLoss, SequenceClassificationLoss
from hf_dpzo.losses.heads import build_head_loss
from hf_dpzo.losses.prompting import LabelStringLoss, MaskedWordLoss, NextWordLoss, Prompt, Template

from support.models import causal_lm, classifier, llama_config, masked_lm, with_lora


TEXTS = ["w1 w2", "w3", "w4 w5 w6 w7 w8", "w9 w10 w11"]


def tokens(text, tokenizer):
    return tokenizer(text)["input_ids"]


def padded(tokenizer, texts=TEXTS, labels=(0, 1, 1, 0)):
    encoded = [tokenizer(text, return_token_type_ids=False) for text in texts]
    rows = [{**dict(row), "labels": label} for row, label in zip(encoded, labels, strict=True)]
    return DataCollatorWithPadding(tokenizer)(rows).data


def select_row(inputs, row):
    """Return row `row` by itself, without its padding."""
    mask = inputs["attention_mask"][row].bool()
    parts = {name: inputs[name][row][mask][None] for name in ("input_ids", "attention_mask")}
    return {
        **parts,
        "labels": inputs["labels"][row][mask][None] if inputs["labels"].ndim > 1 else inputs["labels"][[row]],
    }


def each_alone(model, inputs):
    return torch.stack([model(**select_row(inputs, row)).loss for row in range(len(inputs["labels"]))])


@torch.no_grad()
def test_classification_loss_is_the_models_own_on_each_row(tokenizer):
    model, inputs = classifier(), padded(tokenizer)
    torch.testing.assert_close(build_head_loss(model)(model, inputs), each_alone(model, inputs), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("problem", "num_labels", "labels"),
    [
        ("regression", 1, torch.tensor([0.5, 1.0, -1.0, 2.0])),
        ("multi_label_classification", 3, torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 1], [0, 0, 0]])),
    ],
)
def test_other_problem_types_have_their_own_loss(tokenizer, problem, num_labels, labels):
    model = LlamaForSequenceClassification(llama_config(num_labels=num_labels, problem_type=problem)).eval()
    inputs = {**padded(tokenizer), "labels": labels}
    alone = []
    for row in range(4):
        mask = inputs["attention_mask"][row].bool()
        alone.append(model(inputs["input_ids"][row][mask][None], labels=labels[row][None]).loss)
    torch.testing.assert_close(build_head_loss(model)(model, inputs), torch.stack(alone), rtol=1e-4, atol=1e-5)


def causal_batch(tokenizer):
    """Return rows of which the first token is given and the others are targets."""
    rows = []
    for text in ["w1 w2 w3", "w4 w5 w6 w7 w8 w9", "w10 w11"]:
        ids = tokens(text, tokenizer)
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100, *ids[1:]]})
    return DataCollatorForSeq2Seq(tokenizer)(rows).data


@torch.no_grad()
def test_causal_loss_is_the_mean_over_a_rows_own_targets(tokenizer):
    model, inputs = causal_lm(), causal_batch(tokenizer)
    torch.testing.assert_close(build_head_loss(model)(model, inputs), each_alone(model, inputs), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_targets_of_one_row_do_not_change_the_loss_of_another(tokenizer):
    model, inputs = causal_lm(), causal_batch(tokenizer)
    before = CausalLMLoss(model)(model, inputs)
    inputs["labels"][1] = -100
    after = CausalLMLoss(model)(model, inputs)
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert after[1] == 0


@torch.no_grad()
def test_virtual_tokens_have_no_targets(tokenizer):
    base = causal_lm()
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)
    model, inputs = get_peft_model(base, config).eval(), causal_batch(tokenizer)
    losses = build_head_loss(model)(model, inputs)
    torch.testing.assert_close(losses, each_alone(model, inputs), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("head", [GPT2LMHeadModel, GPT2ForSequenceClassification])
def test_left_padding_does_not_move_absolute_positions(tokenizer, head):
    """GPT-2 would count padding as tokens: a long row would then move the losses of the short rows beside it."""
    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=64, pad_token_id=0, num_labels=2)
    model = head(config).eval()
    inputs = causal_batch(tokenizer) if head is GPT2LMHeadModel else padded(tokenizer)
    torch.testing.assert_close(build_head_loss(model)(model, inputs), each_alone(model, inputs), rtol=1e-4, atol=1e-4)


def test_any_function_can_be_a_loss(tokenizer):
    loss = FunctionLoss(lambda model, inputs: inputs["labels"] * 2.0)
    assert loss(None, padded(tokenizer)).tolist() == [0.0, 2.0, 2.0, 0.0]


def test_unknown_head_is_refused_with_a_remedy():
    with pytest.raises(ValueError, match=r"model=LlamaModel: .* pass per_example_loss"):
        build_head_loss(LlamaModel(llama_config()))


def test_head_inside_an_adapter_is_recognised():
    assert isinstance(build_head_loss(with_lora(classifier())), SequenceClassificationLoss)


# ---- Prompts ----


def prompts(tokenizer, template, labels=(0, 1, 1, 0)):
    encoder = Template(template=template)
    rows = [
        {**encoder.encode({"text": text}, tokenizer, 64), "labels": y} for text, y in zip(TEXTS, labels, strict=True)
    ]
    return DataCollatorWithPadding(tokenizer)(rows).data


@torch.no_grad()
def test_next_word_scores_are_the_label_words_logits_at_the_end(tokenizer):
    model, inputs = causal_lm(), prompts(tokenizer, "{text} very :")
    loss = Prompt(template="{text} very :", label_words=("bad", "good")).loss(model, tokenizer)
    assert isinstance(loss, NextWordLoss)
    words = [tokens(word, tokenizer)[0] for word in ("bad", "good")]
    expected = torch.stack(
        [model(torch.tensor([tokens(f"{text} very :", tokenizer)])).logits[0, -1, words] for text in TEXTS]
    )
    torch.testing.assert_close(loss.scores(model, inputs), expected, rtol=1e-4, atol=1e-5)
    cross_entropy = torch.nn.functional.cross_entropy(expected, inputs["labels"], reduction="none")
    torch.testing.assert_close(loss(model, inputs), cross_entropy, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_label_strings_are_scored_by_their_mean_log_probability(tokenizer):
    model, inputs = causal_lm(), prompts(tokenizer, "{text} :")
    loss = Prompt(template="{text} :", label_words=("very bad", "good")).loss(model, tokenizer)
    assert isinstance(loss, LabelStringLoss)
    for row, text in enumerate(TEXTS):
        for column, word in enumerate(("very bad", "good")):
            given, label = tokens(f"{text} :", tokenizer), tokens(word, tokenizer)
            logits = model(torch.tensor([given + label])).logits[0, len(given) - 1 : -1]
            expected = logits.log_softmax(-1)[range(len(label)), label].mean()
            torch.testing.assert_close(loss.scores(model, inputs)[row, column], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_masked_word_scores_are_taken_at_the_mask(tokenizer):
    model, inputs = masked_lm(), prompts(tokenizer, "{text} very {mask} :")
    loss = Prompt(template="{text} very {mask} :", label_words=("bad", "good")).loss(model, tokenizer)
    assert isinstance(loss, MaskedWordLoss)
    words = [tokens(word, tokenizer)[0] for word in ("bad", "good")]
    expected = []
    for text in TEXTS:
        ids = torch.tensor([tokens(f"{text} very [MASK] :", tokenizer)])
        padded_ids = torch.nn.functional.pad(ids, (inputs["input_ids"].shape[1] - ids.shape[1], 0))
        at = (padded_ids[0] == tokenizer.mask_token_id).nonzero().item()
        expected.append(model(padded_ids, attention_mask=(padded_ids != 0).long()).logits[0, at, words])
    torch.testing.assert_close(loss.scores(model, inputs), torch.stack(expected), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("words", [("bad", "good"), ("very bad", "good")])
def test_prompt_scores_do_not_depend_on_padding(tokenizer, words):
    model = with_lora(causal_lm(), TaskType.CAUSAL_LM).eval()
    loss = Prompt(template="{text} :", label_words=words).loss(model, tokenizer)
    inputs = prompts(tokenizer, "{text} :")
    longer = {
        "input_ids": torch.nn.functional.pad(inputs["input_ids"], (9, 0)),
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (9, 0)),
    }
    torch.testing.assert_close(loss.scores(model, inputs), loss.scores(model, longer), rtol=1e-4, atol=1e-5)


def test_the_longest_column_is_cut_and_never_the_template(tokenizer):
    row = {"a": "w1 w2", "b": " ".join(f"w{i}" for i in range(30))}
    encoded = Template(template="good {a} : {b} very bad").encode(row, tokenizer, 16)
    text = tokenizer.decode(encoded["input_ids"])
    assert len(encoded["input_ids"]) <= 16
    assert text.startswith("good w1 w2 : w0 w1")
    assert text.endswith("very bad")


def test_a_template_longer_than_max_length_is_refused(tokenizer):
    with pytest.raises(ValueError, match="max_length=3: the template alone"):
        Template(template="good very bad : {a}").encode({"a": "w1"}, tokenizer, 3)


@pytest.mark.parametrize(
    ("template", "words", "message"),
    [
        ("no column", ("bad", "good"), "it names no column"),
        ("{mask}", ("bad", "good"), "it names no column"),
        ("{text} {mask} {mask}", ("bad", "good"), "remove the others"),
        ("{text}", ("bad",), "two at least"),
        ("{text}", ("bad", "bad"), "a word of its own"),
    ],
)
def test_invalid_prompts_are_refused(template, words, message):
    with pytest.raises(ValueError, match=message):
        Prompt(template=template, label_words=words)


def test_label_words_of_several_tokens_are_refused_for_a_mask(tokenizer):
    with pytest.raises(ValueError, match="one token of this model"):
        Prompt(template="{text} {mask}", label_words=("very bad", "good")).loss(masked_lm(), tokenizer)


def test_right_padding_is_refused_for_prompts_that_are_continued(tokenizer):
    tokenizer.padding_side = "right"
    try:
        with pytest.raises(ValueError, match="padding_side='left'"):
            Prompt(template="{text}", label_words=("bad", "good")).loss(causal_lm(), tokenizer)
    finally:
        tokenizer.padding_side = "left"
