"""Layers that nothing trained comes before are evaluated once for all probe points, and change no bit of a loss."""

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import DynamicCache

from hf_dpzo.frozen.calls import recording, resuming
from hf_dpzo.frozen.layers import find_stretches
from hf_dpzo.frozen.shared import SharedWork

from support.models import causal_lm
from support.stacks import ARCHITECTURES, build_half_trained, build_inputs, count_runs, find_layers


def move(model, by: float) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(by)


def share(model, evaluate) -> SharedWork:
    return SharedWork(model, find_stretches(model, evaluate))


def reuse(shared: SharedWork, model, micro_batch, evaluate):
    return shared.evaluate(model, micro_batch, {}, lambda model, inputs: evaluate())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_a_pass_that_goes_on_has_the_bits_of_a_whole_one(architecture):
    model = build_half_trained(architecture)
    inputs = build_inputs(model)

    def evaluate():
        return model(**inputs).logits

    shared = share(model, evaluate)
    micro_batch = object()
    with shared.opened([micro_batch]):
        for _ in range(3):
            move(model, 0.01)
            found = reuse(shared, model, micro_batch, evaluate)
            assert torch.equal(found, evaluate())
        frozen, *_, trained = find_layers(model)

        def go_on():
            reuse(shared, model, micro_batch, evaluate)

        assert count_runs(frozen, go_on) == 0 < count_runs(frozen, evaluate)
        assert count_runs(trained, go_on) == count_runs(trained, evaluate)
    assert count_runs(frozen, go_on) > 0, "after the step nothing is kept"


@torch.no_grad()
def test_other_inputs_are_computed():
    model = build_half_trained("LlamaForCausalLM")
    inputs = build_inputs(model)
    stretches = find_stretches(model, lambda: model(**inputs))
    with recording(stretches) as calls:
        model(**inputs, use_cache=False)
    for name, changed in (
        ("input_ids", inputs["input_ids"].flip(1)),
        ("input_ids", inputs["input_ids"][:2]),
        ("attention_mask", torch.ones_like(inputs["attention_mask"])),
    ):
        other = {key: value[: len(changed)] for key, value in inputs.items()} | {name: changed}
        with resuming(calls):
            found = model(**other, use_cache=False).logits
        assert torch.equal(found, model(**other).logits)


@torch.no_grad()
def test_a_cache_that_the_caller_passes_is_filled_by_all_layers():
    model = build_half_trained("LlamaForCausalLM")
    inputs = build_inputs(model)
    shared = share(model, lambda: model(**inputs))
    micro_batch = object()
    with shared.opened([micro_batch]):
        for _ in range(2):
            cache = DynamicCache()
            reuse(shared, model, micro_batch, lambda cache=cache: model(**inputs, past_key_values=cache))
            assert [layer.get_seq_length() for layer in cache.layers] == [7] * 4


@pytest.mark.parametrize("number", [0, 1])
@torch.no_grad()
def test_a_hook_changes_what_a_layer_returns_once(number):
    """Also one that comes after it was found out which layers are frozen, such as that of a callback."""
    model = build_half_trained("LlamaForCausalLM")
    inputs = build_inputs(model)
    shared = share(model, lambda: model(**inputs))
    layers = find_layers(model)
    layers[number].register_forward_hook(lambda layer, args, output: output + 0.5)
    expected = model(**inputs).logits
    micro_batch = object()

    def evaluate():
        return model(**inputs).logits

    with shared.opened([micro_batch]):
        for _ in range(3):
            assert torch.equal(reuse(shared, model, micro_batch, evaluate), expected)
        assert count_runs(layers[0], lambda: reuse(shared, model, micro_batch, evaluate)) == 0


@torch.no_grad()
def test_a_layer_that_is_called_once_more_by_itself_runs():
    model = build_half_trained("LlamaForCausalLM")
    inputs = build_inputs(model)
    shared = share(model, lambda: model(**inputs))
    last = find_layers(model)[1]
    hidden = torch.randn(1, 3, 16)
    angles = model.model.rotary_emb(hidden, torch.arange(3)[None])

    def evaluate():
        model(**inputs)
        return last(hidden, position_embeddings=angles)

    expected = evaluate()
    micro_batch = object()
    with shared.opened([micro_batch]):
        for _ in range(2):
            assert torch.equal(reuse(shared, model, micro_batch, evaluate), expected)


@torch.no_grad()
def test_several_passes_of_one_loss_are_shared_in_their_order():
    model = build_half_trained("LlamaForCausalLM")
    inputs = build_inputs(model)
    longer = {name: torch.cat([value, value[:, -1:]], dim=1) for name, value in inputs.items()}

    def evaluate():
        return model(**inputs).logits, model(**longer).logits

    shared = share(model, evaluate)
    micro_batch = object()
    with shared.opened([micro_batch]):
        for _ in range(2):
            move(model, 0.01)
            found = reuse(shared, model, micro_batch, evaluate)
            assert all(map(torch.equal, found, evaluate()))


@torch.no_grad()
def test_what_is_kept_for_a_step_is_bounded():
    model = build_half_trained("LlamaForCausalLM")
    inputs = build_inputs(model)
    shared = share(model, lambda: model(**inputs))
    with recording(find_stretches(model, lambda: model(**inputs))) as calls:
        model(**inputs, use_cache=False)
    micro_batches = [object() for _ in range(3)]

    def evaluate(micro_batch):
        reuse(shared, model, micro_batch, lambda: model(**inputs))

    shared.room = 2 * calls.nbytes
    with shared.opened(micro_batches):
        first = [count_runs(find_layers(model)[0], lambda one=one: evaluate(one)) for one in micro_batches]
        then = [count_runs(find_layers(model)[0], lambda one=one: evaluate(one)) for one in micro_batches]
    assert all(first) and [bool(count) for count in then] == [False, False, True]


@torch.no_grad()
def test_what_does_not_fit_is_not_copied_at_each_point(monkeypatch):
    model = build_half_trained("LlamaForCausalLM")
    inputs = build_inputs(model)
    shared = share(model, lambda: model(**inputs))
    shared.room = 0
    recorded = []
    monkeypatch.setattr(
        "hf_dpzo.frozen.shared.recording", lambda stretches: recorded.append(len(stretches)) or recording(stretches)
    )
    micro_batch = object()
    for _ in range(2):
        with shared.opened([micro_batch]):
            for _ in range(3):
                reuse(shared, model, micro_batch, lambda: model(**inputs))
    assert recorded == [1, 0, 0] * 2


@torch.no_grad()
def test_a_failed_evaluation_keeps_nothing():
    model = build_half_trained("LlamaForCausalLM")
    inputs = build_inputs(model)
    shared = share(model, lambda: model(**inputs))
    micro_batch = object()
    with shared.opened([micro_batch]):
        with pytest.raises(KeyError):
            reuse(shared, model, micro_batch, lambda: {}[model(**inputs).logits.shape])
        assert not shared._kept
    assert all("forward" not in vars(module) and not module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("config", "frozen"),
    [
        (LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], layers_to_transform=[2, 3]), 2),
        (LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"]), 4),
        (LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]), 0),
        (LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["embed_tokens"]), 0),
        (LoraConfig(task_type="CAUSAL_LM", target_modules=["embed_tokens"]), 0),
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), 0),
        (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), 0),
    ],
    ids=["upper", "output", "all", "embedding", "embedding by LoRA", "prompt", "prefix"],
)
@torch.no_grad()
def test_layers_below_the_first_adapter_are_frozen(config, frozen):
    model = get_peft_model(causal_lm(num_hidden_layers=4), config).eval()
    inputs = build_inputs(model.get_base_model())
    stretches = find_stretches(model, lambda: model(**inputs))
    assert sum(len(stretch.layers) for stretch in stretches) == frozen


@torch.no_grad()
def test_a_tied_embedding_that_the_output_layer_trains_freezes_nothing():
    model = build_half_trained("GPT2LMHeadModel").requires_grad_(False)
    model.lm_head.requires_grad_(True)
    inputs = build_inputs(model)
    assert not find_stretches(model, lambda: model(**inputs))


class Ladder(torch.nn.Module):
    """Layers that do not follow each other alone: each reads what two lists have made."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3)) for _ in range(2))
        self.head = torch.nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for left, right in zip(self.left, self.right, strict=True):
            x, y = left(x) + y, right(y) * x
        return self.head(x + y)


@torch.no_grad()
def test_layers_that_do_not_follow_each_other_are_shared_one_by_one():
    model = Ladder().requires_grad_(False)
    model.head.requires_grad_(True)
    x = torch.randn(2, 4)
    shared = share(model, lambda: model(x))
    micro_batch = object()
    with shared.opened([micro_batch]):
        for _ in range(2):
            move(model, 0.1)
            found = reuse(shared, model, micro_batch, lambda: model(x))
            assert torch.equal(found, model(x))
        found = reuse(shared, model, micro_batch, lambda: model(x + 1))
        assert torch.equal(found, model(x + 1))
