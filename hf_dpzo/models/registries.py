"""What a module holds besides the values of its tensors: which tensors and modules, and what is saved as plain data."""

import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import torch
from peft import PeftConfig
from transformers import GenerationConfig, PreTrainedConfig


@dataclass(frozen=True, kw_only=True)
class Registry:
    """The tensors or modules that one module held under their names.

    Args:
        prefix: the module's own name, and a dot unless it is the whole model.
        present: the mapping that the module looks names up in.
        original: what it held.
    """

    prefix: str
    present: dict[str, Any]
    original: dict[str, Any]

    def restore(self) -> str | None:
        """Put back what was exchanged, remove what was added, and return the name of one of these if there are any."""
        names = [name for name in {**self.original, **self.present} if not self._is_original(name)]
        if not names:
            return None
        self.present.clear()
        self.present.update(self.original)
        return self.prefix + names[0]

    def _is_original(self, name: str) -> bool:
        both = name in self.present and name in self.original
        return both and self.present[name] is self.original[name]


def list_registries(model: torch.nn.Module) -> list[Registry]:
    """Return the registries of all modules in `model`: of parameters, of buffers and of inner modules."""
    registries = []
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        # torch 2.13 has no public way to exchange what a module holds without its own checks. Remove when it has.
        for present in (module._parameters, module._buffers, module._modules):
            registries.append(Registry(prefix=prefix, present=present, original=dict(present)))
    return registries


@dataclass(frozen=True, kw_only=True)
class PlainState:
    """A configuration that is saved with a model, as it was.

    Args:
        owner: the configuration, or a module with an extra state.
        pickled: its attributes, or its extra state.
    """

    owner: Any
    pickled: bytes

    @classmethod
    def capture(cls, owner: Any) -> Self:
        """Return the present state of `owner`."""
        return cls(owner=owner, pickled=pickle.dumps(_read(owner)))

    def restore(self) -> None:
        """Put the state back, if it has changed."""
        if pickle.dumps(_read(self.owner)) == self.pickled:
            return
        original = pickle.loads(self.pickled)
        if isinstance(self.owner, torch.nn.Module):
            self.owner.set_extra_state(original)
        else:
            vars(self.owner).clear()
            vars(self.owner).update(original)


def list_plain_owners(model: torch.nn.Module) -> list[Any]:
    """Return what `model` saves besides tensors: its configurations, and its modules with an extra state."""
    owners = {}
    for module in model.modules():
        if type(module).get_extra_state is not torch.nn.Module.get_extra_state:
            owners[id(module)] = module
        for value in vars(module).values():
            candidates: Iterable[Any] = value.values() if isinstance(value, dict) else (value,)
            found = (c for c in candidates if isinstance(c, PreTrainedConfig | GenerationConfig | PeftConfig))
            owners |= {id(config): config for config in found}
    return list(owners.values())


def _read(owner: Any) -> Any:
    return owner.get_extra_state() if isinstance(owner, torch.nn.Module) else vars(owner)
