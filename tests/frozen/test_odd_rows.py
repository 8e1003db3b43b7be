"""Rows that a data set may hold, and public rows need not: padded, with holes, with more fields, alike but for one."""

import random
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_dpzo.data.suffix import SuffixRule
from hf_dpzo.frozen.digest import digest_row
from hf_dpzo.frozen.store import FrozenCache, RowStore
from hf_dpzo.losses.causal_lm import CausalLMLoss
from hf_dpzo.losses.function import FunctionLoss
from hf_dpzo.losses.per_example import PerExampleLoss
from hf_dpzo.losses.seq2seq import Seq2SeqLoss
from hf_dpzo.step.batch_losses import BatchLosses
from hf_dpzo.step.sharing import POINTS_AFTER_PREFIX, find_shared_work

from support.activated import INVOCATION, activated_losses, activated_model, activated_rows
from support.models import causal_lm
from support.stacks import CAUSAL, build_half_trained, count_runs


ROWS = activated_rows(6).to_list()
PUBLIC = activated_rows(5, seed=1).to_list()
PADDING = {"input_ids": 0, "attention_mask": 0, "labels": -100}


def pad(row: dict, *, right: bool) -> dict:
    filled = {name: [PADDING[name]] * (14 - len(value)) for name, value in row.items()}
    return {name: value + filled[name] if right else filled[name] + value for name, value in row.items()}


def pierce(row: dict) -> dict:
    """With a place that is not attended to, which of short rows is the last one before the invocation."""
    return {**row, "attention_mask": [1, 0, *row["attention_mask"][2:]]}


def build(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    base = causal_lm(num_hidden_layers=2)
    if kind == "activated":
        return moved(activated_model(base, layers_to_transform=[1]))
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], layers_to_transform=[1])
    return moved(get_peft_model(base, config))


def moved(model: torch.nn.Module) -> torch.nn.Module:
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def plain_losses(model, loss: PerExampleLoss, *, activated: bool = False) -> BatchLosses:
    losses = activated_losses(model, loss)
    if activated:
        return losses
    return replace(losses, collator=replace(losses.collator, suffix_rule=None), invocation=None)


def share(model, losses, rows, tmp_path, *, cached: bool) -> BatchLosses:
    cache = FrozenCache(place="memory", dtype=None, most_rows=16, longest_row=32, folder=tmp_path)
    shared = find_shared_work(model, losses, [rows], cache if cached else None)
    return replace(losses, shared=shared)


def evaluate(losses: BatchLosses, model, rows) -> torch.Tensor:
    batch = losses.build_public_batch(rows)
    order = torch.tensor(batch.row_units).argsort()
    if losses.shared is None:
        return losses(model, batch)[order]
    with losses.shared.opened(batch.micro_batches):
        return losses(model, batch)[order]


ODD = {
    "padded behind": [pad(row, right=True) for row in ROWS],
    "padded before": [pad(row, right=False) for row in ROWS],
    "with a hole": [pierce(row) for row in ROWS],
    "with a hole, padded": [pad(pierce(row), right=number % 2 == 0) for number, row in enumerate(ROWS)],
}


@pytest.mark.parametrize("cached", [False, True], ids=["a step", "a run"])
@pytest.mark.parametrize("kind", ["upper", "activated"])
@torch.no_grad()
def test_padding_and_holes_in_private_rows_move_no_loss(kind, cached, tmp_path):
    model = build(kind)
    losses = plain_losses(model, CausalLMLoss(model), activated=kind == "activated")
    fast = share(model, losses, PUBLIC, tmp_path, cached=cached)
    for name, rows in ODD.items():
        expected = evaluate(losses, model, rows)
        assert expected.isfinite().all()
        for _ in range(2):
            torch.testing.assert_close(evaluate(fast, model, rows), expected, rtol=1e-5, atol=0, msg=name)


@torch.no_grad()
def test_rows_that_differ_in_labels_alone_are_two_rows(tmp_path):
    """A loss may give them to the model, as a decoder's tokens or in place of masked ones."""
    model = build("upper")
    inner = CausalLMLoss(model)

    def fill(model, inputs):
        ids = torch.where(inputs["labels"] == -100, inputs["input_ids"], inputs["labels"])
        return inner(model, {**inputs, "input_ids": ids})

    losses = plain_losses(model, FunctionLoss(fill))
    fast = share(model, losses, PUBLIC, tmp_path, cached=True)
    others = [{**row, "labels": [one if one == -100 else one + 1 for one in row["labels"]]} for row in ROWS]
    for rows in (ROWS, others):
        torch.testing.assert_close(evaluate(fast, model, rows), evaluate(losses, model, rows), rtol=1e-5, atol=0)


@torch.no_grad()
def test_a_row_may_hold_numbers_of_its_own(tmp_path):
    model = build("upper")
    inner = CausalLMLoss(model)

    def weigh(model, inputs):
        return inner(model, {name: value for name, value in inputs.items() if name != "weight"}) * inputs["weight"]

    losses = plain_losses(model, FunctionLoss(weigh))
    fast = share(model, losses, [{**row, "weight": 2.0} for row in PUBLIC], tmp_path, cached=True)
    rows = [{**row, "weight": float(number)} for number, row in enumerate(ROWS)]
    for _ in range(2):
        torch.testing.assert_close(evaluate(fast, model, rows), evaluate(losses, model, rows), rtol=1e-5, atol=0)


def test_a_row_is_known_by_all_that_it_holds():
    inputs = {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.tensor([[1, 1]])}
    rows = [{}, {"labels": 0}, {"labels": 1}, {"text": "a"}, {"image": torch.zeros(2)}, {"image": torch.ones(2)}]
    digests = [digest_row(row, inputs, 0) for row in rows]
    digests += [digest_row({}, {**inputs, "token_type_ids": torch.tensor([[0, kind]])}, 0) for kind in (0, 1)]
    assert len({*digests}) == len(digests) and None not in digests
    assert digest_row({"labels": 1}, inputs, 0) == digests[2]
    assert digest_row({"of a kind of its own": lambda: None}, inputs, 0) is None


@torch.no_grad()
def test_rows_without_a_digest_are_computed_each_time(tmp_path):
    model = build("upper")
    fast = share(model, plain_losses(model, CausalLMLoss(model)), PUBLIC, tmp_path, cached=True)
    expected = evaluate(fast, model, ROWS)
    collate = fast.collator.collate

    def drop(rows):
        return collate([{name: value for name, value in row.items() if name != "odd"} for row in rows])

    fast = replace(fast, collator=replace(fast.collator, collate=drop))
    fast.shared.rows._collate = replace(fast.shared.rows._collate, collate=drop)
    before = len(fast.shared.rows.store._places)
    found = evaluate(fast, model, [{**row, "odd": lambda: None} for row in ROWS[:2]])
    torch.testing.assert_close(found, expected[:2], rtol=1e-5, atol=0)
    assert len(fast.shared.rows.store._places) == before


def test_an_entry_is_read_on_the_device_of_the_batch():
    store = RowStore(torch.empty(256, dtype=torch.uint8))
    store.put(b"row", [torch.ones(3)])
    assert [one.device.type for one in store.get(b"row", torch.device("meta"))] == ["meta"]


def test_a_store_that_gives_other_numbers_is_found_out_before_the_run(tmp_path, monkeypatch):
    """Rows that were seen before are tried too, and not only in the run."""
    model = build("upper")
    get = RowStore.get
    monkeypatch.setattr(RowStore, "get", lambda *given: (found := get(*given)) and [one + 1 for one in found])
    with pytest.raises(ValueError, match="what is kept of it gives other losses"):
        share(model, plain_losses(model, CausalLMLoss(model)), PUBLIC, tmp_path, cached=True)


# As of a loss that reads the end of a prompt.
PROMPTS = SuffixRule(invocation=tuple(INVOCATION), ends_together=True)


@torch.no_grad()
def test_as_many_points_are_batched_as_there_is_room_for():
    model = build("activated")
    losses = activated_losses(model, CausalLMLoss(model), suffix_rule=PROMPTS)
    assert find_shared_work(model, losses, [PUBLIC]).points_per_pass == POINTS_AFTER_PREFIX


@pytest.mark.parametrize(
    ("longest_row", "padded_lengths", "points"),
    [(0, (), None), (50, (), 8), (200, (), 5), (700, (), None), (0, (50, 300), 3), (10, (600,), None)],
)
@torch.no_grad()
def test_answers_are_evaluated_at_as_many_points_as_the_longest_row_allows(longest_row, padded_lengths, points):
    """4,096 tokens at once: in micro-batches of four rows, 1,024 of each row at all points together."""
    model = build("activated")
    losses = activated_losses(model, CausalLMLoss(model), suffix_rule=replace(PROMPTS, ends_together=False))
    losses = replace(losses, collator=replace(losses.collator, padded_lengths=padded_lengths, micro_batch_size=4))
    assert find_shared_work(model, losses, [PUBLIC], longest_row=longest_row).points_per_pass == points


@torch.no_grad()
def test_points_that_would_take_more_memory_than_kept_work_may_are_not_batched(monkeypatch):
    model = build("activated")
    losses = activated_losses(model, CausalLMLoss(model), suffix_rule=PROMPTS)
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    for room, points in ((3 * trained, 3), (trained, None)):
        monkeypatch.setattr("hf_dpzo.frozen.shared.MIN_KEPT_BYTES", room)
        monkeypatch.setattr("hf_dpzo.frozen.shared.KEPT_SHARE", 0)
        assert find_shared_work(model, losses, [PUBLIC]).points_per_pass == points


def test_the_room_for_a_token_is_that_of_the_part_that_takes_more(tmp_path):
    """So rows with longer prompts than public ones have room too."""
    model = build("activated")
    fast = share(model, activated_losses(model, CausalLMLoss(model)), PUBLIC, tmp_path, cached=True)
    keys_and_values = 2 * 16
    assert fast.shared.rows.bytes_per_token == 4 * keys_and_values


def seq2seq_rows(count: int, *, same_lengths: bool) -> list[dict]:
    draw = random.Random(count)
    rows = []
    for number in range(count):
        lengths = (length := 3 + number % 3, length if same_lengths else 1 + number % 2)
        ids, labels = ([draw.randrange(4, 44) for _ in range(length)] for length in lengths)
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return rows


@torch.no_grad()
def test_what_an_encoder_makes_of_a_row_is_kept_but_nothing_of_a_decoder(tmp_path):
    """Also if the texts of public rows are all as long as what is to be written."""
    model = build_half_trained("T5ForConditionalGeneration")
    losses = plain_losses(model, Seq2SeqLoss(model))
    fast = share(model, losses, seq2seq_rows(5, same_lengths=True), tmp_path, cached=True)
    rows = seq2seq_rows(7, same_lengths=False)
    rows += [{**row, "labels": [one + 1 for one in row["labels"]]} for row in rows[:3]]
    expected = evaluate(losses, model, rows)
    encoder = model.encoder.block[0]
    assert count_runs(encoder, lambda: evaluate(fast, model, rows)) > 0
    assert count_runs(encoder, lambda: evaluate(fast, model, rows[::-1])) == 0
    torch.testing.assert_close(evaluate(fast, model, rows), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("architecture", CAUSAL)
@torch.no_grad()
def test_rows_of_any_family_are_kept(architecture, tmp_path):
    """Also of those whose layers return attention weights unasked."""
    model = build_half_trained(architecture)
    losses = plain_losses(model, CausalLMLoss(model))
    fast = share(model, losses, PUBLIC, tmp_path, cached=True)
    expected = evaluate(losses, model, ROWS)
    for _ in range(2):
        torch.testing.assert_close(evaluate(fast, model, ROWS), expected, rtol=1e-5, atol=0)
