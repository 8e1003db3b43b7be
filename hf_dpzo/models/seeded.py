"""Initial values that are drawn from a public seed."""

import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model

from hf_dpzo.models.fingerprints import fingerprint_values


@dataclass(frozen=True, kw_only=True)
class _Beginning:
    """The public seed of an adapter, the names of its parameters, and the fingerprint of the values that it gave."""

    seed: int
    names: Collection[str]
    fingerprint: str


# Where each adapter that `seeded_peft_model` built began.
_SEEDED: weakref.WeakKeyDictionary[torch.nn.Module, _Beginning] = weakref.WeakKeyDictionary()


# The factor of each kind of LoRA layer that is drawn, while the other one begins at zero.
_DRAWN_FACTORS = {"lora_A", "lora_embedding_B"}


def get_adapter_seed(model: torch.nn.Module) -> int | None:
    """Return the public seed that the adapter of `model` began from; `None` if there is none."""
    return _SEEDED[model].seed if model in _SEEDED else None


def forget_changed_seed(model: torch.nn.Module) -> None:
    """Forget the seed of `model` if its adapter no longer has the values that the seed gave, or more is trained.

    Another adapter may have been chosen since, or other values loaded. Parts of the adapter may have been frozen. Every
    process must call this, before it trains.
    """
    beginning = _SEEDED.get(model)
    if beginning is None:
        return
    own = dict(model.named_parameters())
    trained = {name for name, parameter in own.items() if parameter.requires_grad}
    is_whole = own.keys() >= beginning.names >= trained
    if not is_whole or fingerprint_values(own[name] for name in beginning.names) != beginning.fingerprint:
        del _SEEDED[model]


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


def seeded_peft_model(model: torch.nn.Module, config: PeftConfig, *, seed: int, freeze_a: bool = False) -> PeftModel:
    """Return `model` with an adapter whose initial values come from the public `seed`.

    Like `peft.get_peft_model`, except that a log keeps the seed instead of the initial values, and a replay draws them
    again.

    Args:
        model: the base model, which is changed in place, as `get_peft_model` does.
        config: the adapter's configuration.
        seed: the public seed. The noise of a private run never comes from it.
        freeze_a: whether A, the factor of LoRA that is drawn, stays as it was drawn, and B alone is trained. That is
            the better choice for zeroth-order updates: where B moves, A's gradient wakes up, and both together diverged
            at rates that suit B. Recipes do it by default.

    Raises:
        ValueError: `freeze_a` is asked of an adapter that is not LoRA.

    >>> from peft import LoraConfig
    >>> first, second = (
    ...     seeded_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), LoraConfig(target_modules=["0"]), seed=7)
    ...     for _ in range(2)
    ... )
    >>> weights = [model.get_submodule("base_model.model.0.lora_A.default").weight for model in (first, second)]
    >>> torch.equal(*weights)
    True
    """
    if freeze_a and not isinstance(config, LoraConfig):
        raise ValueError(f"freeze_a=True: {config.peft_type.value} has no factor A; leave it out, or choose LoRA.")
    with publicly_seeded(seed):
        adapted = get_peft_model(model, config)
    drawn = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    fingerprint = fingerprint_values(drawn.values())
    _SEEDED[adapted] = _Beginning(seed=seed, names=drawn.keys(), fingerprint=fingerprint)
    if freeze_a:
        for name, parameter in drawn.items():
            parameter.requires_grad_(not _DRAWN_FACTORS & {*name.split(".")})
    return adapted
