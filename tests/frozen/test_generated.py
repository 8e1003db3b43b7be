"""Texts that are generated after a prefix that was computed once are those of whole prompts."""

from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from transformers import DataCollatorWithPadding, DynamicCache

from hf_dpzo.frozen.prefix import compute_prefix, continuing, split_inputs
from hf_dpzo.frozen.store import FrozenCache
from hf_dpzo.losses import GenerationReward
from hf_dpzo.losses.generation import Generation
from hf_dpzo.losses.objective import ColumnsCollator
from hf_dpzo.models.activation import rows_apart
from hf_dpzo.step import sharing
from hf_dpzo.step.sharing import find_shared_work

from support.activated import INVOCATION, activated_losses, alora
from support.models import word_tokenizer
from support.stacks import CAUSAL, build_half_trained, count_runs, find_layers


ATTENTION = ["q_proj", "k_proj", "v_proj", "c_attn", "query_key_value"]
CACHED = [name for name in CAUSAL if name != "MambaForCausalLM"]


def activated(architecture: str = "LlamaForCausalLM", **changes) -> torch.nn.Module:
    is_conv = architecture == "GPT2LMHeadModel"
    adapter = alora(**{"target_modules": ATTENTION, "fan_in_fan_out": is_conv, **changes})
    model = get_peft_model(build_half_trained(architecture), adapter)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def prompts(count: int) -> list[dict]:
    """Prompts of different lengths that end with the invocation."""
    starts = [[4 + (7 * row + 3 * place) % 40 for place in range(2 + row % 5)] for row in range(count)]
    return [{"input_ids": [*start, *INVOCATION], "attention_mask": [1] * (len(start) + 2)} for start in starts]


def pad(rows: list[dict]) -> dict[str, torch.Tensor]:
    return dict(DataCollatorWithPadding(word_tokenizer())([dict(row) for row in rows]))


def build_losses(model: torch.nn.Module, max_new_tokens: int, seen: list | None = None, **changes):
    """Losses that depend on all tokens that are generated."""

    def reward(prompts, completion_ids, **columns):
        if seen is not None:
            seen.extend(prompts)
        return [sum((place + 1) * token for place, token in enumerate(ids)) / 10 for ids in completion_ids]

    loss = GenerationReward(reward, max_new_tokens, word_tokenizer())
    collate = ColumnsCollator(loss.encode, model, DataCollatorWithPadding(word_tokenizer()))
    return activated_losses(model, loss, collate=collate, **changes)


@pytest.mark.parametrize("max_new_tokens", [1, 5])
@pytest.mark.parametrize("architecture", CACHED)
@torch.no_grad()
def test_a_prefix_is_continued_as_a_whole_prompt_is(architecture, max_new_tokens):
    model, inputs = activated(architecture), pad(prompts(8))
    generation = Generation(tokenizer=word_tokenizer(), max_new_tokens=max_new_tokens)
    split = split_inputs(inputs, tuple(INVOCATION), suffix_length=2, fixed_shapes=False)
    prefix = compute_prefix(model, split.prefix)
    with rows_apart(model):
        whole = generation.generate(model, inputs)
    for _ in range(2):
        with continuing(model, prefix):
            assert torch.equal(generation.generate(model, split.suffix, is_whole=False), whole)
    with model.disable_adapter():
        assert not torch.equal(generation.generate(model, inputs), whole), "the adapter changes what is said"


@pytest.mark.parametrize("place", [None, "memory"])
@pytest.mark.parametrize("max_new_tokens", [1, 4])
@pytest.mark.parametrize("padded_lengths", [(), (16,)])
@torch.no_grad()
def test_a_reward_is_that_of_whole_rows_and_frozen_layers_run_once(max_new_tokens, padded_lengths, place, monkeypatch):
    monkeypatch.setattr(sharing, "_batches_points", lambda *_: True)
    model, rows, seen = activated(layers_to_transform=[2, 3]), prompts(9), []
    losses = build_losses(model, max_new_tokens, seen, padded_lengths=padded_lengths)
    cache = None
    if place:
        cache = FrozenCache(place=place, dtype=None, most_rows=9, longest_row=16, folder=None, processes=1)
    shared = find_shared_work(model, losses, [rows], cache)
    assert shared.is_split and shared.points_per_pass is None, "rounding must not flip a token"
    fast = replace(losses, shared=shared)
    expected = losses.of_public(model, rows)
    assert len(set(expected.tolist())) > 2 and torch.equal(fast.of_public(model, rows), expected)
    tokens, layers = [], find_layers(model.get_base_model())
    layers[3].register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[1]))
    batch = fast.build_public_batch(rows)
    with shared.opened(batch.micro_batches):
        fast(model, batch)
        tokens.clear()
        seen.clear()
        runs = count_runs(layers[0], lambda: fast(model, batch))
    assert (runs == 0) == (max_new_tokens == 1), "one that follows needs the keys of the lower layers"
    assert max(tokens) == 2
    whole = {word_tokenizer().decode(row["input_ids"], skip_special_tokens=True) for row in rows}
    assert whole <= set(seen), "a reward is told the whole prompt"


@torch.no_grad()
def test_a_filled_cache_of_a_caller_is_refused():
    model, inputs = activated(), pad(prompts(3))
    split = split_inputs(inputs, tuple(INVOCATION), suffix_length=2, fixed_shapes=False)
    cache = DynamicCache()
    model(**split.suffix, past_key_values=cache)
    with (
        continuing(model, compute_prefix(model, split.prefix)),
        pytest.raises(ValueError, match="filled cache of its own"),
    ):
        model(**split.suffix, past_key_values=cache)
