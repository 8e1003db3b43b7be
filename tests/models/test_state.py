"""Whatever evaluating a model writes is put back, or noticed."""

import copy

import pytest
import torch
from peft import LoraConfig, TaskType
from torch import nn

from hf_dpzo.models import preserved as preserving
from hf_dpzo.models import state as states
from hf_dpzo.models.preserved import preserved
from hf_dpzo.models.seal import Seal
from hf_dpzo.models.state import ModelState
from hf_dpzo.models.write_guard import ModelChangedError

from support.models import causal_lm, llama_config, with_lora


class Counted(nn.Linear):
    """A layer with an extra state."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.count = 0

    def get_extra_state(self) -> int:
        return self.count

    def set_extra_state(self, state: int) -> None:
        self.count = state


def made() -> nn.Module:
    """A language model with adapters, buffers that are saved and that are not, and an extra state."""
    model = with_lora(causal_lm(), TaskType.CAUSAL_LM)
    base = model.get_base_model()
    base.register_buffer("largest", torch.tensor(3.0))
    base.register_buffer("positions", torch.arange(4), persistent=False)
    base.register_buffer("missing", torch.tensor([float("nan")]))
    base.counted = Counted()
    return model


def saved(model: nn.Module) -> dict:
    """All that is saved with a model, and its buffers."""
    values = {**dict(model.state_dict()), **dict(model.named_buffers())}
    plain = {name: value for name, value in values.items() if not isinstance(value, torch.Tensor)}
    tensors = {name: (value.dtype, value.tolist()) for name, value in values.items() if isinstance(value, torch.Tensor)}
    base = model.get_base_model()
    configurations = [base.config.to_dict(), base.generation_config.to_dict(), model.peft_config["default"].to_dict()]
    return copy.deepcopy({"tensors": repr(tensors), "plain": plain, "configurations": configurations})


def base(model):
    return model.get_base_model()


def trained(model):
    return next(parameter for parameter in model.parameters() if parameter.requires_grad)


def frozen(model):
    return base(model).model.embed_tokens.weight


def replace(model, name, value):
    setattr(base(model), name, value)


def register(model, name, *, persistent=True):
    base(model).register_buffer(name, torch.zeros(5), persistent=persistent)


# What is put back. Each is a way to write into what is saved.
RESTORED = {
    "a buffer in place": lambda model: base(model).largest.add_(1),
    "a buffer's data": lambda model: base(model).largest.data.fill_(9),
    "a buffer's storage": lambda model: base(model).positions.numpy().fill(9),
    "a buffer by another": lambda model: replace(model, "largest", torch.tensor(5.0)),
    "a buffer of another shape": lambda model: register(model, "positions", persistent=False),
    "a buffer's data of another shape": lambda model: setattr(base(model).positions, "data", torch.zeros(9)),
    "a new buffer": lambda model: register(model, "cache"),
    "a configuration of generating": lambda model: setattr(base(model).generation_config, "max_length", 77),
    "a buffer taken away": lambda model: base(model).__delattr__("largest"),
    "a sign of zero": lambda model: base(model).missing.fill_(-0.0),
    "a parameter by another": lambda model: replace(model, "lm_head", nn.Linear(16, 64)),
    "a new module": lambda model: base(model).add_module("late", nn.Linear(1, 1)),
    "the configuration": lambda model: setattr(base(model).config, "seen", 5),
    "the configuration by another": lambda model: setattr(base(model), "config", llama_config(vocab_size=9)),
    "the adapter's configuration by another": lambda model: model.peft_config.update(default=LoraConfig(r=9)),
    "a list in the configuration": lambda model: base(model).config.architectures.append("a word"),
    "the adapter's configuration": lambda model: setattr(model.peft_config["default"], "r", 7),
    "an extra state": lambda model: base(model).counted.set_extra_state(7),
}


@pytest.mark.parametrize("name", RESTORED)
def test_what_evaluating_changes_besides_weights_is_put_back(name):
    model = made()
    base(model).config.architectures = ["one"]
    state, before = ModelState(model, moving=[trained(model)]), saved(model)
    with torch.no_grad(), state.held_still():
        RESTORED[name](model)
        assert saved(model) != before
    assert saved(model) == before
    assert state.find_change() is None


# Ways to write into a weight, given as a plain tensor.
WRITES = {
    "in place": lambda weight: weight.mul_(2),
    "one entry": lambda weight: weight.view(-1)[-1:].add_(1e-3),
    "a sign": lambda weight: weight.view(-1)[:1].neg_(),
    "by its data": lambda weight: weight.data.add_(1),
    "by numpy": lambda weight: weight.detach().numpy().fill(3),
    "by an operation of torch": lambda weight: torch.add(weight, 1, out=weight.detach()),
    "all at once": lambda weight: torch._foreach_mul_([weight.detach()], 2),
    "rows swapped": lambda weight: weight.copy_(weight.flip(0).clone()),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_write_into_a_trained_weight_is_noticed_at_once(name):
    model = made()
    state = ModelState(model, moving=[trained(model)])
    with (
        torch.no_grad(),
        pytest.raises(ModelChangedError, match=r"evaluating rows changes .*lora_A"),
        state.held_still(),
    ):
        WRITES[name](trained(model))


@pytest.mark.parametrize("name", WRITES)
def test_a_write_into_a_frozen_weight_is_noticed_before_it_is_saved(name):
    model = made()
    state = ModelState(model, moving=[trained(model)])
    assert state.find_change() is None
    with torch.no_grad():
        WRITES[name](frozen(model))
    assert state.find_change().endswith("embed_tokens.weight")


def test_a_write_that_torch_counts_is_noticed_at_once_in_a_frozen_weight():
    model = made()
    state = ModelState(model, moving=[trained(model)])
    with torch.no_grad(), pytest.raises(ModelChangedError, match=r"embed_tokens\.weight"), state.held_still():
        torch.embedding_renorm_(frozen(model), torch.tensor([5]), 1e-3, 2.0)


def test_a_large_buffer_counts_as_a_frozen_weight(monkeypatch):
    monkeypatch.setattr(states, "MAX_COPIED_BYTES", 4)
    model = made()
    state = ModelState(model, moving=[trained(model)])
    with pytest.raises(ModelChangedError, match="positions"), state.held_still():
        base(model).positions.add_(1)


def test_writing_the_same_values_is_no_change():
    model = made()
    state = ModelState(model, moving=[trained(model)])
    with torch.no_grad(), state.held_still():
        frozen(model).copy_(frozen(model).clone())
        trained(model).mul_(1)


def test_an_error_puts_back_too():
    model = made()
    state, before = ModelState(model, moving=[trained(model)]), saved(model)
    with pytest.raises(ZeroDivisionError), state.held_still():
        base(model).largest.add_(1)
        1 / 0  # noqa: B018
    assert saved(model) == before


@pytest.mark.parametrize("name", WRITES)
def test_a_broken_seal_shows_that_something_else_moved_what_is_trained(name):
    weight = nn.Parameter(torch.randn(3, 5))
    seal = Seal(lambda: [weight])
    assert not seal.is_broken()
    with torch.no_grad():
        WRITES[name](weight)
    assert seal.is_broken()
    seal.apply()
    assert seal.is_broken()  # Whoever asks later learns it too.


def test_a_seal_that_is_applied_again_holds():
    weight = nn.Parameter(torch.zeros(3))
    seal = Seal(lambda: [weight])
    weight.data.add_(1)
    seal.apply()
    assert not seal.is_broken()


@pytest.mark.parametrize("choose", [trained, frozen], ids=["trained", "frozen"])
@pytest.mark.parametrize("name", [name for name in WRITES if name != "by numpy"])
def test_no_operation_of_torch_writes_into_a_guarded_weight(name, choose):
    model = made()
    state, before = ModelState(model, moving=[trained(model)]), saved(model)
    with torch.no_grad(), pytest.raises(ModelChangedError, match=r"lora_A|embed_tokens"), state.guarded(model):
        WRITES[name](choose(model))
    assert saved(model) == before


def test_a_guarded_model_computes_as_it_does_without_a_guard():
    model, tokens = made(), torch.tensor([[5, 6, 7]])
    state = ModelState(model, moving=[trained(model)])
    with torch.no_grad():
        expected = model(tokens).logits
        with state.guarded(model):
            assert torch.equal(model(tokens).logits, expected)


@pytest.mark.parametrize("name", [*RESTORED, *(f"weight: {name}" for name in WRITES)])
def test_a_model_that_something_is_tried_on_is_as_it_was(name):
    model = made().train()
    base(model).config.architectures = ["one"]
    before = saved(model)
    with torch.no_grad(), preserved(model) as state:
        assert not model.training
        if name in RESTORED:
            RESTORED[name](model)
        else:
            WRITES[name.removeprefix("weight: ")](frozen(model))
            WRITES[name.removeprefix("weight: ")](trained(model))
            assert state.find_change() is not None
    assert saved(model) == before
    assert all(module.training for module in model.modules())


def test_a_large_model_that_something_is_tried_on_is_guarded(monkeypatch):
    monkeypatch.setattr(preserving, "MAX_WHOLE_COPY_BYTES", 0)
    model = made().train()
    before = saved(model)
    with torch.no_grad(), pytest.raises(ModelChangedError), preserved(model):
        base(model).largest.add_(1)
        frozen(model).add_(1)
    assert saved(model) == before
    assert all(module.training for module in model.modules())
