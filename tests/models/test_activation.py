"""Activated LoRA: where it is active, the ordinary LoRA that it is there, and the hooks that PEFT leaves."""

import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import calculate_alora_offsets
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

from hf_dpzo.isolation.operations import OperationTrace
from hf_dpzo.models.activation import as_ordinary, find_invocation, locate_invocation, rows_apart

from support.models import causal_lm


TOKENS = [5, 6]


def activated(tokens=TOKENS, **changes):
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=tokens)
    model = get_peft_model(causal_lm(**changes), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model.eval()


def count_hooks(model):
    return sum(len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("tokens", [[1], [1, 2], [1, 1], [2, 1, 2]])
def test_the_place_of_the_last_invocation_is_the_one_that_peft_finds(tokens):
    rows = torch.tensor(list(itertools.product([1, 2], repeat=6)))
    config = LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=tokens)
    offsets = calculate_alora_offsets({"default": config}, "default", rows)
    expected = [-1 if offset is None else 6 - offset for offset in offsets]
    assert locate_invocation(rows, tokens).tolist() == expected
    assert -1 in expected


def test_a_row_shorter_than_the_invocation_holds_none():
    assert locate_invocation(torch.tensor([[1], [2]]), [1, 2]).tolist() == [-1, -1]


def test_from_the_invocation_on_it_is_an_ordinary_adapter_on_a_cache_of_the_base():
    model = activated()
    rows = torch.tensor([[9, 8, 7, 5, 6, 3], [1, 2, 3, 5, 6, 9]])
    with torch.no_grad():
        whole = model(input_ids=rows).logits[:, 3:]
        with model.disable_adapter():
            cache = model(input_ids=rows[:, :3]).past_key_values
        with as_ordinary(model):
            assert find_invocation(model) is None
            tail = model(input_ids=rows[:, 3:], past_key_values=cache).logits
        assert find_invocation(model) == tuple(TOKENS)
        torch.testing.assert_close(tail, whole, atol=1e-6, rtol=1e-5)
        assert torch.equal(model(input_ids=rows).logits[:, 3:], whole)
        with model.disable_adapter():
            assert not torch.allclose(model(input_ids=rows).logits[:, 3:], whole, atol=0.01)


def test_as_an_ordinary_adapter_it_can_be_batched_over_points_and_as_an_activated_one_not():
    model = activated()
    rows = torch.tensor([[5, 6, 3], [5, 6, 9]])
    named = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    stacks = {name: torch.stack([value, 2 * value]) for name, value in named.items()}

    def evaluate(values):
        return torch.func.functional_call(model, values, (), {"input_ids": rows, "use_cache": False}).logits

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        with as_ordinary(model):
            batched = torch.func.vmap(evaluate)(stacks)
        each = [evaluate({name: stack[point] for name, stack in stacks.items()}) for point in range(2)]
        torch.testing.assert_close(batched, torch.stack(each), atol=1e-5, rtol=1e-5)
        with rows_apart(model):
            torch.testing.assert_close(torch.func.vmap(evaluate)(stacks), batched, atol=1e-5, rtol=1e-5)
        with pytest.raises(RuntimeError):  # When this passes, PEFT can be batched itself.
            torch.func.vmap(evaluate)(stacks)


def test_the_activation_comes_back_after_an_error():
    model = activated()
    with pytest.raises(ZeroDivisionError), as_ordinary(model):
        raise ZeroDivisionError
    assert find_invocation(model) == tuple(TOKENS)
    assert all(layer.lora_variant for layer in model.modules() if isinstance(layer, LoraLayer))


def test_peft_leaves_a_hook_where_a_call_fails_and_none_is_left_inside_the_context():
    model = activated()
    outside = torch.tensor([[5, 6, 100]])  # No token of the vocabulary.
    before = count_hooks(model)
    with pytest.raises(IndexError), rows_apart(model):
        model(input_ids=outside)
    assert count_hooks(model) == before
    with pytest.raises(IndexError):
        model(input_ids=outside)
    assert count_hooks(model) > before  # When this fails, PEFT takes them away itself.


def test_a_cache_is_not_needed_for_a_row_that_begins_with_the_invocation():
    model = activated()
    rows = torch.tensor([[5, 6, 3, 4]])
    with torch.no_grad():
        whole = model(input_ids=rows).logits
        with as_ordinary(model):
            tail = model(input_ids=rows, past_key_values=DynamicCache()).logits
    torch.testing.assert_close(tail, whole, atol=1e-6, rtol=1e-5)


def test_apart_from_other_rows_it_is_what_peft_computes_wherever_the_rows_are_activated():
    model = activated()
    rows = torch.tensor([[9, 8, 7, 5, 6, 3], [5, 6, 5, 6, 1, 1], [1, 2, 3, 4, 8, 9], [1, 1, 1, 1, 5, 6]])
    with torch.no_grad():
        expected = model(input_ids=rows).logits
        with rows_apart(model):
            torch.testing.assert_close(model(input_ids=rows).logits, expected, atol=1e-6, rtol=1e-5)
        with model.disable_adapter():
            base = model(input_ids=rows).logits
    assert torch.equal(base[2], expected[2]) and torch.equal(base[0, :3], expected[0, :3])
    assert not torch.allclose(base[1, 2:], expected[1, 2:], atol=0.01)
    assert torch.equal(base[1, :2], expected[1, :2])  # The last invocation counts.


def test_no_row_decides_the_shape_in_which_another_one_is_computed():
    model = activated()
    batches = [torch.tensor([[9, 5, 6, 3], other]) for other in ([5, 6, 1, 1], [1, 1, 5, 6], [1, 1, 1, 1])]
    traces = []
    with torch.no_grad():
        for rows in batches:
            with rows_apart(model), OperationTrace() as trace:
                model(input_ids=rows)
            with OperationTrace() as by_peft:
                model(input_ids=rows)
            products = [[shapes for name, shapes in t.operations if "mm" in name] for t in (trace, by_peft)]
            traces.append(products)
    assert all(ours == traces[0][0] for ours, _ in traces)
    assert any(peft != traces[0][1] for _, peft in traces)  # When this fails, PEFT computes in such shapes itself.
