"""Initial values that come from a public seed."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftConfig, PeftModel, get_peft_model


ADAPTER_SEEDS: weakref.WeakKeyDictionary[torch.nn.Module, int] = weakref.WeakKeyDictionary()


@contextmanager
def publicly_seeded(seed: int) -> Iterator[None]:
    """What torch draws inside, to initialize weights, comes from a public seed. Outside it is as if nothing happened.

    >>> with publicly_seeded(1):
    ...     first = torch.nn.Linear(2, 2)
    >>> with publicly_seeded(1):
    ...     second = torch.nn.Linear(2, 2)
    >>> torch.equal(first.weight, second.weight)
    True
    """
    before = torch.get_rng_state()
    torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
    try:
        yield
    finally:
        torch.set_rng_state(before)


def seeded_peft_model(model: torch.nn.Module, config: PeftConfig, *, seed: int) -> PeftModel:
    """Return `model` with an adapter whose initial values come from the public `seed`.

    As `peft.get_peft_model`; but a log can tell how to make this one again, so that its initial values are not kept.

    Args:
        model: the base model; like `get_peft_model`, this changes it in place.
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
        made = get_peft_model(model, config)
    ADAPTER_SEEDS[made] = seed
    return made
