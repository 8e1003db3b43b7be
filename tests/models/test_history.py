"""What runs of this process led to is known again by its values, in whatever type it is loaded."""

import copy
import pickle

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from hf_dpzo.models.history import TrainedValues, find_runs, is_marked_as_trained, mark_as_trained


def layer(seed: int = 0, size: int = 64) -> torch.nn.Linear:
    torch.manual_seed(seed)
    return torch.nn.Linear(size, size)


def moved(run: str, **changes) -> torch.nn.Linear:
    model = layer(**changes)
    values = TrainedValues(model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape))
    values.record(run)
    return model


@pytest.mark.parametrize(("seed", "dtype"), [(100, torch.float32), (101, torch.bfloat16), (102, torch.float16)])
def test_values_are_known_in_each_type_that_they_are_loaded_in(seed, dtype):
    other = layer(seed=5)
    other.load_state_dict(moved(f"run in {dtype}", seed=seed).state_dict())
    assert find_runs(other.to(dtype)) == {f"run in {dtype}"}


def test_a_single_tensor_is_known_and_each_run_that_led_to_any():
    first, second = moved("one", seed=1), moved("two", seed=2)
    other = layer(seed=3)
    assert find_runs(other) == set()
    other.bias.data.copy_(first.bias)
    assert find_runs(other) == {"one"}
    other.weight = torch.nn.Parameter(second.weight.detach().clone(), requires_grad=False)
    assert find_runs(torch.nn.Sequential(other)) == {"one", "two"}


def test_values_that_a_run_began_with_or_that_differ_are_unknown():
    began, ended = layer(seed=7), moved("seven", seed=7)
    assert find_runs(began) == set()
    with torch.no_grad():
        for parameter in ended.parameters():
            parameter.mul_(1.001)
    assert find_runs(ended) == set()


def test_a_tensor_that_a_run_did_not_move_is_unknown():
    model = layer(seed=8)
    values = TrainedValues(model.parameters())
    model.bias.data.add_(1)
    values.record("bias alone")
    other = layer(seed=9)
    other.weight.data.copy_(model.weight)
    assert find_runs(other) == set() != find_runs(model)


def test_a_quantized_base_is_looked_at_part_by_part():
    """After a first run of a process, each further one looks; a quantized tensor cannot be flattened."""
    trained = moved("quantized", seed=11).weight.detach()
    base = torch.nn.Module()
    base.weight = torch.nn.Parameter(TwoTensor(trained.clone(), trained.clone()), requires_grad=False)
    assert find_runs(base) == {"quantized"}
    base.weight = torch.nn.Parameter(TwoTensor(trained * 2, trained * 3), requires_grad=False)
    assert find_runs(base) == set()


def test_copies_of_a_model_that_is_marked_are_marked():
    model = layer()
    assert not is_marked_as_trained(model)
    mark_as_trained(model)
    assert all(is_marked_as_trained(one) for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))))
    assert not is_marked_as_trained(layer())
