"""Rows are evaluated from the invocation of an activated adapter on, and their losses are those of whole rows."""

import pytest
import torch
from peft import get_peft_model
from transformers import DataCollatorWithPadding

from hf_dpzo.data.collation import LogicalBatchCollator
from hf_dpzo.data.suffix import SuffixRule
from hf_dpzo.frozen.prefix import compute_prefix, continuing, split_inputs
from hf_dpzo.losses.causal_lm import CausalLMLoss
from hf_dpzo.losses.prompting import LabelStringLoss, NextWordLoss
from hf_dpzo.models.activation import rows_apart
from hf_dpzo.step import sharing
from hf_dpzo.step.batch_losses import BatchLosses
from hf_dpzo.step.batched_points import at_stacks
from hf_dpzo.step.sharing import find_shared_work

from support.activated import INVOCATION, activated_losses, activated_rows, alora, right_collator
from support.models import causal_lm, word_tokenizer
from support.stacks import CAUSAL, build_half_trained, count_runs, find_layers


ATTENTION = ["q_proj", "k_proj", "v_proj", "c_attn", "query_key_value"]
CACHED = [name for name in CAUSAL if name != "MambaForCausalLM"]


def activated(architecture: str, **changes) -> torch.nn.Module:
    base = build_half_trained(architecture)
    is_conv = architecture == "GPT2LMHeadModel"
    model = get_peft_model(base, alora(**{"target_modules": ATTENTION, "fan_in_fan_out": is_conv, **changes}))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def prompts(count: int) -> list[dict]:
    """Rows that end with the invocation and two words, and have a class."""
    rows = activated_rows(count).to_list()
    return [{**row, "labels": number % 2} for number, row in enumerate(rows)]


CASES = {
    "targets": (CausalLMLoss, activated_rows(9).to_list(), None),
    "word": (
        lambda model: NextWordLoss(words=[5, 6], model=model),
        prompts(9),
        DataCollatorWithPadding(word_tokenizer()),
    ),
    "strings": (
        lambda model: LabelStringLoss(strings=[[5, 7], [6]], model=model),
        prompts(9),
        DataCollatorWithPadding(word_tokenizer()),
    ),
}


@pytest.mark.parametrize("architecture", CACHED)
@torch.no_grad()
def test_a_suffix_on_the_keys_of_its_prefix_has_the_logits_of_a_whole_row(architecture):
    model = activated(architecture)
    inputs = right_collator()([dict(row) for row in activated_rows(5).to_list()])
    split = split_inputs(inputs, tuple(INVOCATION), suffix_length=6, fixed_shapes=False)
    prefix = compute_prefix(model, split.prefix)
    with rows_apart(model):
        whole = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    for _ in range(2):
        with continuing(model, prefix):
            suffix = model(**{name: split.suffix[name] for name in ("input_ids", "attention_mask")}).logits
        for row, length in enumerate(inputs["attention_mask"].sum(dim=1).tolist()):
            torch.testing.assert_close(suffix[row, :4], whole[row, length - 4 : length], rtol=0, atol=2e-5)
    base = model.get_base_model()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    assert (base[0, -1] - whole[0, -1]).abs().max() > 1e-2, "the adapter moves something"


@torch.no_grad()
def test_no_logits_are_computed_for_a_prefix():
    """Nobody reads them, and for one position of each row torch would copy the output layer for each row."""
    model = activated("LlamaForCausalLM")
    inputs = {"input_ids": torch.tensor([[4, 5, 6]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    calls = []
    model.get_base_model().lm_head.register_forward_hook(lambda *call: calls.append(call))
    assert len(compute_prefix(model, inputs).cache.layers) == model.config.num_hidden_layers
    assert not calls and not model.get_base_model().lm_head._forward_pre_hooks


@pytest.mark.parametrize("padded_lengths", [(), (16,)])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_losses_from_the_invocation_on_are_those_of_whole_rows(case, padded_lengths, monkeypatch):
    build, rows, collate = CASES[case]
    model = activated("LlamaForCausalLM", layers_to_transform=[2, 3])
    losses = activated_losses(model, build(model), collate=collate, padded_lengths=padded_lengths)
    monkeypatch.setattr(sharing, "ROUNDING", 2e-6)  # Of the losses of rows, which are about four.
    shared = find_shared_work(model, losses, [rows])
    assert shared._invocation == tuple(INVOCATION) and shared._stretches
    fast = BatchLosses(**{**vars(losses), "shared": shared})
    assert torch.allclose(fast.of_public(model, rows), losses.of_public(model, rows), rtol=2e-6)
    tokens = []
    layers = find_layers(model.get_base_model())
    layers[3].register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[1]))
    batch = fast.build_public_batch(rows)
    with shared.opened(batch.micro_batches):
        assert count_runs(layers[0], lambda: fast(model, batch)) > 0
        tokens.clear()
        assert count_runs(layers[0], lambda: fast(model, batch)) == 0
    assert max(tokens) <= 6 < max(len(row["input_ids"]) for row in rows)


@torch.no_grad()
def test_several_points_at_once_go_on_from_one_prefix():
    model = activated("LlamaForCausalLM")
    losses = activated_losses(model, CausalLMLoss(model))
    rows = activated_rows(6).to_list()
    fast = BatchLosses(**{**vars(losses), "shared": find_shared_work(model, losses, [rows])})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    stacks = {parameter: torch.stack([parameter, 2 * parameter, parameter]) for parameter in trained}
    found = at_stacks(fast, model, stacks).of_public(model, rows)
    expected = losses.of_public(model, rows)
    for column in (0, 2):
        torch.testing.assert_close(found[:, column], expected, rtol=1e-5, atol=0)
    assert not torch.allclose(found[:, 1], expected, rtol=1e-3)


@torch.no_grad()
def test_a_row_in_a_public_shape_has_the_same_bits_beside_any_others():
    model = activated("LlamaForCausalLM")
    losses = activated_losses(model, CausalLMLoss(model), padded_lengths=(16, 32))
    rows = activated_rows(9).to_list()
    fast = BatchLosses(**{**vars(losses), "shared": find_shared_work(model, losses, [rows])})
    longer = dict(rows[1])
    longer = {name: [*value, *value[-1:] * 20] for name, value in longer.items()}
    alone = fast.of_public(model, rows[:1])[0]
    failing = {**rows[1], "input_ids": [10**6, *rows[1]["input_ids"][1:]]}
    for others in (rows[1:2], rows[1:], [longer], [rows[0]] * 5, [failing]):
        batch = fast.build_public_batch([rows[0], *others])
        assert torch.equal(fast(model, batch)[batch.row_units.index(0)], alone)


@torch.no_grad()
def test_an_earlier_invocation_is_the_base():
    model = activated("LlamaForCausalLM")
    ids = torch.tensor([[9, *INVOCATION, 8, 7, *INVOCATION, 5, 6]])
    split = split_inputs({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, tuple(INVOCATION), **SHAPE)
    with continuing(model, compute_prefix(model, split.prefix)):
        suffix = model(**split.suffix).logits
    with rows_apart(model):
        whole = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(suffix, whole[:, -4:], rtol=0, atol=2e-5)


SHAPE = {"suffix_length": 4, "fixed_shapes": False}


@torch.no_grad()
def test_what_cannot_go_on_after_a_prefix_is_evaluated_as_a_whole():
    """A model that keeps no keys, a loss that needs whole rows, and an adapter that also moves the embeddings."""
    rows = activated_rows(6).to_list()
    mamba = activated("MambaForCausalLM", target_modules=["x_proj"], exclude_modules=None)
    shared = find_shared_work(mamba, activated_losses(mamba, CausalLMLoss(mamba)), [rows])
    assert shared is None or shared._invocation is None
    ordinary = activated("LlamaForCausalLM")

    class FirstToken(CausalLMLoss):
        def __call__(self, model, inputs):
            return self.scores(model, inputs)[:, 0, 0]

    assert find_shared_work(ordinary, activated_losses(ordinary, FirstToken(ordinary)), [rows]) is None
    moving = get_peft_model(causal_lm(), alora(trainable_token_indices=list(range(40)))).eval()
    assert find_shared_work(moving, activated_losses(moving, CausalLMLoss(moving)), [rows]) is None


def test_rows_with_targets_before_the_invocation_have_no_suffix():
    rule = SuffixRule(invocation=(5, 6))
    ids = [1, 5, 6, 7]
    assert rule.measure({"input_ids": ids, "labels": [-100, -100, 6, 7]}) == 3
    assert rule.measure({"input_ids": ids, "labels": [-100, 5, 6, 7]}) is None
    assert rule.measure({"input_ids": ids, "labels": 1}) == 3
    assert rule.measure({"input_ids": torch.tensor(ids), "labels": torch.tensor([-100, -100, 6, 7])}) == 3
    assert rule.measure({"input_ids": [5, 6, 1, 5, 6]}) == 2
    for odd in ({"input_ids": [5]}, {"input_ids": None}, {"input_ids": "ab"}, {}, None, {"input_ids": [[5, 6]]}):
        assert rule.measure(odd) is None


def test_rows_of_one_micro_batch_have_suffixes_of_one_public_length():
    collator = LogicalBatchCollator(
        collate=right_collator(),
        micro_batch_size=4,
        padded_lengths=(32,),
        suffix_rule=SuffixRule(invocation=tuple(INVOCATION)),
    )
    losses = BatchLosses(loss=None, collator=collator, prepare=None, device=torch.device("cpu"))
    rows = [
        {
            "input_ids": [9] * 4 + INVOCATION + [8] * more,
            "attention_mask": [1] * (6 + more),
            "labels": [-100] * (6 + more),
        }
        for more in (0, 1, 2, 3, 7, 0)
    ]
    batches = losses.build_public_batch(rows).micro_batches
    assert sorted((len(one.rows), one.suffix_length) for one in batches) == [(1, 4), (1, 6), (1, 12), (3, 4)]
