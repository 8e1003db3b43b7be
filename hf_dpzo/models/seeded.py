"""Initial values that are drawn from a public seed."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftConfig, PeftModel, get_peft_model

from hf_dpzo.models.fingerprints import fingerprint_values


# The public seed of each adapter that `seeded_peft_model` built, and the fingerprint of the values that it gave.
_SEEDED: weakref.WeakKeyDictionary[torch.nn.Module, tuple[int, str]] = weakref.WeakKeyDictionary()


def get_adapter_seed(model: torch.nn.Module) -> int | None:
    """Return the public seed that the adapter of `model` began from; `None` if there is none."""
    return _SEEDED.get(model, (None,))[0]


def forget_changed_seed(model: torch.nn.Module) -> None:
    """Forget the seed of `model` if what is trained no longer has the values that the seed gave.

    Another adapter may have been chosen since, or other values loaded. Every process must call this, before it trains.
    """
    if model in _SEEDED and _SEEDED[model][1] != _fingerprint_trained(model):
        del _SEEDED[model]


def _fingerprint_trained(model: torch.nn.Module) -> str:
    return fingerprint_values(parameter for parameter in model.parameters() if parameter.requires_grad)


@contextmanager
def publicly_seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator with the public `seed` inside the context, and restore its state afterwards.

    Weights that are initialized inside are a function of the seed.

    >>> with publicly_seeded(1):
    ...     first = torch.nn.Linear(2, 2)
    >>> with publicly_seeded(1):
    ...     second = torch.nn.Linear(2, 2)
    >>> torch.equal(first.weight, second.weight)
    True
    """
    state = torch.get_rng_state()
    torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
    try:
        yield
    finally:
        torch.set_rng_state(state)


def seeded_peft_model(model: torch.nn.Module, config: PeftConfig, *, seed: int) -> PeftModel:
    """Return `model` with an adapter whose initial values come from the public `seed`.

    Like `peft.get_peft_model`, except that a log keeps the seed instead of the initial values, and a replay draws them
    again.

    Args:
        model: the base model, which is changed in place, as `get_peft_model` does.
        config: the adapter's configuration.
        seed: the public seed. The noise of a private run never comes from it.

    >>> from peft import LoraConfig
    >>> first, second = (
    ...     seeded_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), LoraConfig(target_modules=["0"]), seed=7)
    ...     for _ in range(2)
    ... )
    >>> weights = [model.get_submodule("base_model.model.0.lora_A.default").weight for model in (first, second)]
    >>> torch.equal(*weights)
    True
    """
    with publicly_seeded(seed):
        adapted = get_peft_model(model, config)
    _SEEDED[adapted] = seed, _fingerprint_trained(adapted)
    return adapted
