"""Generated text as an objective: what is decoded, what reward functions receive, and what a row that fails counts."""

import asyncio
import functools
import math

import evaluate
import pytest
import torch
from datasets import Dataset
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

from hf_dpzo.data.sealed import run_sealed
from hf_dpzo.losses import GenerationReward, MetricLoss, PerExampleLoss
from hf_dpzo.losses.generation import Generation
from hf_dpzo.losses.heads import build_head_loss
from hf_dpzo.losses.metric import accuracy, exact_match, token_f1
from hf_dpzo.losses.objective import COLUMNS, PROMPTS, ColumnsCollator

from support.heads import CASES
from support.models import causal_lm, classifier, word_tokenizer


NEW = 5
CHAT = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}:{% endif %}"
)
SIZES = {"vocab_size": 64, "d_model": 16}
ENDS = {"pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0}


def t5() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(T5Config(**SIZES, **ENDS, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).eval()


def bart() -> BartForConditionalGeneration:
    parts = {f"{half}_{name}": size for half in ("encoder", "decoder") for name, size in PARTS.items()}
    return BartForConditionalGeneration(BartConfig(**SIZES, **ENDS, **parts, forced_eos_token_id=None)).eval()


PARTS = {"layers": 1, "ffn_dim": 16, "attention_heads": 2}
KINDS = {"llama": causal_lm, "t5": t5, "bart": bart}


@functools.cache
def model(kind: str = "llama") -> torch.nn.Module:
    built = KINDS[kind]()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return built


def attached(loss: PerExampleLoss, kind: str = "llama") -> PerExampleLoss:
    loss.attach(model(kind), word_tokenizer(), lambda: "progress")
    return loss


def collated(loss: PerExampleLoss, rows: list[dict], kind: str = "llama") -> dict:
    return ColumnsCollator(loss.encode, model(kind), None)(rows)


def losses_of(loss: PerExampleLoss, rows: list[dict], kind: str = "llama") -> torch.Tensor:
    return attached(loss, kind)(model(kind), collated(loss, rows, kind))


def prompts(count: int = 3) -> list[dict]:
    return [{"prompt": " ".join(f"w{3 * i + j}" for j in range(2 + i)), "answer": f"w{i}"} for i in range(count)]


def collect(seen: list[dict], **options) -> GenerationReward:
    def reward(**passed):
        seen.append(passed)
        return [1.0]

    return GenerationReward(reward, NEW, **options)


# ---- What is decoded ----


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_what_the_model_would_generate_greedily_for_the_row_alone(kind):
    loss, rows = attached(collect([]), kind), prompts()
    tokens = loss.evaluate(model(kind), collated(loss, rows, kind))[1]
    for row, found in zip(rows, tokens, strict=True):
        encoded = word_tokenizer()(row["prompt"], return_tensors="pt")
        expected = model(kind).generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            max_new_tokens=NEW,
            do_sample=False,
        )[0]
        new = expected[1:] if kind != "llama" else expected[encoded["input_ids"].shape[1] :]
        assert found[: len(new)].tolist() == new.tolist() and len(found) == NEW


@pytest.mark.parametrize("side", ["left", "right"])
def test_either_side_of_padding_is_understood(side):
    loss, rows = attached(collect([])), prompts()
    inputs = collated(loss, rows)
    tokens = loss.scores(model(), inputs)
    order = torch.argsort(inputs["attention_mask"], dim=1, stable=True, descending=side == "right")
    moved = {name: inputs[name].gather(1, order) for name in ("input_ids", "attention_mask")}
    assert torch.equal(loss.scores(model(), moved), tokens)


def test_every_row_decodes_all_tokens_whether_it_ended_or_not(monkeypatch):
    """The number of passes is public: it is that of a row that never ends."""
    loss, rows = attached(collect([])), prompts()
    first = loss.scores(model(), collated(loss, rows))[:, 0]
    passes = []
    handle = model().register_forward_hook(lambda *call: passes.append(1))
    monkeypatch.setattr(model().generation_config, "eos_token_id", first.tolist())
    tokens = loss.scores(model(), collated(loss, rows))
    handle.remove()
    assert len(passes) == NEW
    assert (tokens[:, 1:] == 0).all() and torch.equal(tokens[:, 0], first)
    assert [
        len(ids)
        for ids in Generation(tokenizer=word_tokenizer(), max_new_tokens=NEW).split_completions(model(), tokens)
    ] == [1, 1, 1]


def test_text_ends_before_a_stop_string_and_long_prompts_lose_their_beginning():
    generation = Generation(tokenizer=word_tokenizer(), max_new_tokens=1, max_prompt_length=2, stop_strings=("w5",))
    ids = word_tokenizer()("w3 w4 w5 w6")["input_ids"]
    assert generation.decode(ids) == "w3 w4 "
    assert generation.encode({"prompt": "w3 w4 w5 w6"}, is_encoder_decoder=False)["input_ids"] == ids[-2:]


def test_rows_with_a_response_are_asked_for_it():
    generation = Generation(tokenizer=word_tokenizer(), max_new_tokens=1)
    row = {"input_ids": [5, 6, 7, 8], "attention_mask": [1] * 4, "labels": [-100, -100, 7, 8]}
    assert generation.encode(row, is_encoder_decoder=False)["input_ids"] == [5, 6]
    assert generation.encode(row, is_encoder_decoder=True)["input_ids"] == [5, 6, 7, 8]
    again = generation.encode(generation.encode(row, is_encoder_decoder=False), is_encoder_decoder=False)
    assert again["input_ids"] == [5, 6]


@pytest.mark.parametrize("changes", [{"max_new_tokens": 0}, {"max_new_tokens": 1.5}, {"max_prompt_length": 0}])
def test_impossible_lengths_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        GenerationReward(lambda **columns: [0.0], **{"max_new_tokens": 3, **changes})


def test_models_that_generate_nothing_are_refused():
    with pytest.raises(ValueError, match="it generates no text"):
        collect([]).attach(classifier(), word_tokenizer(), lambda: None)


# ---- What a reward function receives ----


def test_reward_functions_receive_what_grpo_passes_one_row_at_a_time():
    seen = []
    losses_of(collect(seen), prompts())
    assert [call["prompts"] for call in seen] == [[row["prompt"]] for row in prompts()]
    assert [call["answer"] for call in seen] == [["w0"], ["w1"], ["w2"]]
    assert all(0 < len(call["completion_ids"][0]) <= NEW and isinstance(call["completions"][0], str) for call in seen)
    names = {"prompts", "completions", "completion_ids", "answer", "trainer_state", "log_extra", "log_metric"}
    assert set(seen[0]) == names
    assert seen[0]["log_metric"]("mean", 1.0) is None and seen[0]["trainer_state"] == "progress"


def test_messages_are_prompted_by_the_template_and_answered_by_a_message():
    seen, tokenizer = [], word_tokenizer()
    loss = collect(seen, processing_class=_chatting(tokenizer))
    messages = [{"role": "user", "content": "w1 w2"}]
    losses_of(loss, [{"prompt": messages}])
    assert seen[0]["prompts"] == [messages]
    assert [message["role"] for message in seen[0]["completions"][0]] == ["assistant"]
    assert tokenizer.decode(loss.encode({"prompt": messages})["input_ids"]).endswith("w1 w2 :")


def _chatting(tokenizer):
    copied = type(tokenizer)(tokenizer_object=tokenizer._tokenizer, pad_token="[PAD]", eos_token="[EOS]")
    copied.chat_template = CHAT
    return copied


def test_rewards_are_weighted_and_those_that_do_not_apply_are_left_out():
    def first(completions, **columns):
        return [2.0]

    def second(completions, answer, **columns):
        return [None if answer[0] == "w0" else 1]

    async def third(completions, **columns):
        await asyncio.sleep(0)
        return [torch.tensor(0.5)]

    loss = GenerationReward([first, second, third], NEW, reward_weights=[1, 10, 2])
    assert losses_of(loss, prompts()).tolist() == [-3.0, -13.0, -13.0]
    none = GenerationReward(lambda **columns: [None], NEW)
    assert losses_of(none, prompts()).isnan().all()


def test_a_model_judges_prompt_and_completion():
    judge = classifier(num_labels=1)
    losses = losses_of(GenerationReward(judge, NEW, reward_processing_classes=[word_tokenizer()]), prompts())
    assert losses.shape == (3,) and len(set(losses.tolist())) > 1


@pytest.mark.parametrize(
    ("functions", "options", "error"),
    [([], {}, "pass one function"), (len, {"reward_weights": [1, 2]}, "2 weights"), (3, {}, "neither a function")],
)
def test_wrong_functions_are_refused(functions, options, error):
    with pytest.raises(ValueError, match=error):
        GenerationReward(functions, NEW, **options)


# ---- Rows that fail ----


def fails_on_one(completions, answer, **columns):
    if answer[0] == "w1":
        raise KeyError("a secret")
    return [1.0]


def test_a_row_that_fails_fails_alone_and_in_silence_where_rows_are_private(capfd):
    loss = attached(GenerationReward(fails_on_one, NEW))
    inputs = collated(loss, prompts())
    passes = []
    handle = model().register_forward_hook(lambda *call: passes.append(1))
    losses = run_sealed("per_example_loss", lambda: loss(model(), inputs))
    handle.remove()
    assert losses.isnan().tolist() == [False, True, False]
    assert len(passes) == NEW, "rows were evaluated again, by which a failing one would move others"
    assert capfd.readouterr() == ("", "")


def test_errors_are_raised_where_rows_are_public():
    with pytest.raises(KeyError, match="a secret"):
        losses_of(GenerationReward(fails_on_one, NEW), prompts())


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (1.0, "it returned float; return a list"),
        (None, "it returned NoneType; return a list"),
        (torch.tensor(1.0), "it returned Tensor; return a list"),
        (["good"], "a reward is a text; return a number"),
    ],
)
def test_what_is_no_list_of_numbers_is_an_error_of_its_function(returned, message):
    def judge(prompts, completions, **columns):
        return returned

    with pytest.raises(ValueError, match=f"^reward_funcs=judge: {message}"):
        losses_of(GenerationReward(judge, NEW), prompts())


@pytest.mark.parametrize("returned", [torch.tensor([1.0]), (1,), [True]])
def test_any_sequence_of_one_number_is_a_reward(returned):
    assert losses_of(GenerationReward(lambda prompts, completions, **columns: returned, NEW), prompts())[0] == -1


def test_one_reward_too_many_is_an_error():
    with pytest.raises(ValueError, match="returned 2 rewards for 1 completion"):
        losses_of(GenerationReward(lambda **columns: [0.0, 1.0], NEW), prompts())


# ---- Metrics ----


@pytest.mark.parametrize(
    ("metric", "prediction", "reference", "value"),
    [
        (exact_match, "The  Cat!", "cat", 1.0),
        (exact_match, "dog", ["cat", "a dog"], 1.0),
        (token_f1, "red cat", "cat", 2 / 3),
        (token_f1, "", "the", 1.0),
        (token_f1, [1, 2], [2, 3], 0.5),
        (accuracy, [1, 2, 3, 4], [1, 2, 0, 4], 0.75),
        (accuracy, "a", "b", 0.0),
    ],
)
def test_metrics_of_one_row(metric, prediction, reference, value):
    assert metric(prediction, reference) == pytest.approx(value)


def test_accuracy_of_classes_is_the_negative_loss():
    torch.manual_seed(3)
    head = classifier()
    inputs = {"input_ids": torch.randint(4, 40, (6, 5)), "attention_mask": torch.ones(6, 5, dtype=torch.long)}
    predicted = head(**inputs).logits.argmax(dim=1)
    labels = torch.where(torch.arange(6) < 4, predicted, 1 - predicted)
    losses, scores = MetricLoss("accuracy").evaluate(head, {**inputs, "labels": labels})
    assert losses.tolist() == [-1.0] * 4 + [0.0] * 2 and scores.shape == (6, 2)


def test_accuracy_of_next_tokens_counts_targets_alone():
    inputs = {"input_ids": torch.randint(4, 40, (2, 5)), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    predicted = model()(**inputs).logits.argmax(dim=-1)
    labels = torch.full((2, 5), -100)
    labels[0, 3], labels[0, 4] = predicted[0, 2], predicted[0, 3] + 1
    losses = MetricLoss("accuracy")(model(), {**inputs, "labels": labels})
    assert losses[0] == -0.5 and math.isnan(losses[1])


def test_the_metric_of_an_answer_is_that_of_its_places():
    case = CASES["answers"]
    head, inputs = case.model(), case.collate(case.rows(3))
    scores = build_head_loss(head).scores(head, inputs)
    starts, ends = (one.masked_fill(inputs["attention_mask"] == 0, -math.inf).argmax(dim=1) for one in scores)
    ends = torch.maximum(starts, ends)
    inputs |= {"start_positions": starts, "end_positions": ends}
    found = MetricLoss("token_f1")(head, inputs)
    spans = [list(range(a, b + 1)) for a, b in zip(starts.tolist(), scores_ends(scores, inputs), strict=True)]
    wanted = [list(range(a, b + 1)) for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]
    assert found.tolist() == [-token_f1(*pair) for pair in zip(spans, wanted, strict=True)]


def scores_ends(scores, inputs) -> list[int]:
    return scores[1].masked_fill(inputs["attention_mask"] == 0, -math.inf).argmax(dim=1).tolist()


def test_a_model_of_numbers_takes_a_function_of_numbers():
    head = classifier(num_labels=1)
    inputs = {"input_ids": torch.randint(4, 40, (3, 5)), "attention_mask": torch.ones(3, 5, dtype=torch.long)}
    predicted = head(**inputs).logits[:, 0]
    loss = MetricLoss(lambda prediction, reference: -abs(prediction - reference))
    assert torch.allclose(loss(head, {**inputs, "labels": torch.zeros(3)}), predicted.abs())
    with pytest.raises(ValueError, match="metric=accuracy: it compares classes"):
        MetricLoss("accuracy").attach(head, None, dict)


SCRIPT = """
import datasets
import evaluate

class Overlap(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        shared = [len(set(p.split()) & set(r.split())) for p, r in zip(predictions, references)]
        return {"overlap": sum(shared) / len(shared), "rows": len(shared)}
"""


@pytest.fixture(scope="module")
def overlap(tmp_path_factory):
    folder = tmp_path_factory.mktemp("overlap")
    (folder / "overlap.py").write_text(SCRIPT)
    return evaluate.load(str(folder / "overlap.py"), cache_dir=str(folder / "cache"))


def test_metrics_of_evaluate_are_computed_row_by_row_and_in_memory(overlap):
    loss = MetricLoss(overlap, max_new_tokens=NEW, reference="answer", key="overlap")
    rows = prompts()
    texts = [
        word_tokenizer().decode(ids, skip_special_tokens=True)
        for ids in attached(loss).scores(model(), collated(loss, rows))
    ]
    rows = [{**row, "answer": text} for row, text in zip(rows, texts, strict=True)]
    expected = [-float(len(set(text.split()))) for text in texts]
    assert losses_of(loss, rows).tolist() == expected
    assert overlap.keep_in_memory
    with pytest.raises(ValueError, match="name one of them"):
        losses_of(MetricLoss(overlap, max_new_tokens=NEW, reference="answer"), rows)


def test_references_are_by_default_the_text_of_the_labels():
    loss = MetricLoss("exact_match", max_new_tokens=NEW)
    tokens = attached(loss).scores(model(), collated(loss, prompts()))
    rows = [{**row, "labels": ids.tolist()} for row, ids in zip(prompts(), tokens, strict=True)]
    rows[1]["labels"] = [4]
    assert losses_of(loss, rows).tolist() == [-1.0, 0.0, -1.0]


def test_unknown_metrics_are_refused():
    with pytest.raises(ValueError, match="choose one of accuracy, exact_match, token_f1"):
        MetricLoss("rouge")


def test_columns_reach_the_loss_and_tokens_reach_the_model():
    loss = attached(collect([]))
    inputs = collated(loss, Dataset.from_list(prompts()).to_list())
    assert set(inputs) == {"input_ids", "attention_mask", COLUMNS, PROMPTS}
    assert inputs[COLUMNS] == prompts()
