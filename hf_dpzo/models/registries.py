"""What modules hold besides the values of their tensors: which tensors and modules, and what is saved as plain data."""

import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Self

import torch
from peft import PeftConfig
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel


class Registries:
    """The mappings in which the modules of a model look up their parameters, buffers and inner modules.

    Args:
        model: the model.

    >>> model = torch.nn.Linear(1, 1)
    >>> registries = Registries(model)
    >>> model.register_buffer("seen", torch.zeros(1))
    >>> registries.restore(), registries.restore()
    ('seen', None)
    """

    def __init__(self, model: torch.nn.Module) -> None:
        # torch 2.13 has no public way to exchange what a module holds without its own checks. Remove when it has.
        self._mappings = [
            (name, mapping)
            for name, module in model.named_modules()
            for mapping in (module._parameters, module._buffers, module._modules, *_list_saving_hooks(module))
        ]
        # Which buffers are not saved, and which tensors a model leaves out.
        self._unsaved = [(m._non_persistent_buffers_set, set(m._non_persistent_buffers_set)) for m in model.modules()]
        self._ignored = [(vars(m), vars(m).get(_IGNORED)) for m in model.modules() if isinstance(m, PreTrainedModel)]
        self._originals = [dict(mapping) for _, mapping in self._mappings]
        self._overview = _overview(mapping for _, mapping in self._mappings)

    def restore(self) -> str | None:
        """Put back what was exchanged, remove what was added, and return the name of one of these if there are any."""
        for attributes, ignored in self._ignored:
            if attributes.get(_IGNORED) is not ignored:
                attributes.pop(_IGNORED) if ignored is None else attributes.update({_IGNORED: ignored})
        for present, unsaved in self._unsaved:
            if present != unsaved:
                present.clear()
                present.update(unsaved)
        # There are thousands of mappings, and this is called for each micro-batch.
        if _overview(mapping for _, mapping in self._mappings) == self._overview:
            return None
        changed = []
        for (prefix, mapping), original in zip(self._mappings, self._originals, strict=True):
            names = {**original, **mapping}
            changed += [f"{prefix}.{n}".lstrip(".") for n in names if mapping.get(n) is not original.get(n)]
            mapping.clear()
            mapping.update(original)
        return changed[0] if changed else None


# The attribute that names what transformers leaves out when it saves a model.
_IGNORED = "_keys_to_ignore_on_save"


def _list_saving_hooks(module: torch.nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    return module._state_dict_hooks, module._state_dict_pre_hooks


def _overview(mappings: Iterable[dict[str, Any]]) -> tuple[list[str], list[int]]:
    """Return the names in all mappings, and the identities of what they stand for."""
    filled = list(filter(None, mappings))
    return list(chain.from_iterable(filled)), list(map(id, chain.from_iterable(map(dict.values, filled))))


# What a model saves as plain data.
_CONFIGURATIONS = (PreTrainedConfig, GenerationConfig, PeftConfig)


class PlainHolders:
    """The places in which the modules of a model hold configurations, and the modules that have an extra state.

    Args:
        model: the model.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._places = [place for module in model.modules() for place in _find_places(module)]
        self._stateful = [m for m in model.modules() if type(m).get_extra_state is not torch.nn.Module.get_extra_state]

    def capture(self) -> list["PlainState"]:
        """Return the present states of all of them, each once, wherever it is held."""
        owners = {id(module): (module, []) for module in self._stateful}
        for holder, name in self._places:
            if name in holder:
                owners.setdefault(id(holder[name]), (holder[name], []))[1].append((holder, name))
        return [PlainState.of(owner, places) for owner, places in owners.values()]


@dataclass(frozen=True, kw_only=True)
class PlainState:
    """What is saved as plain data, as it was.

    Args:
        owner: a configuration, a tokenizer, or a module with an extra state.
        pickled: its attributes, or its extra state.
        places: the mappings that hold it, and its name in each.
    """

    owner: Any
    pickled: bytes
    places: Sequence[tuple[dict[str, Any], str]]

    @classmethod
    def of(cls, owner: Any, places: Sequence[tuple[dict[str, Any], str]] = ()) -> Self:
        """Return the present state of `owner`.

        Raises:
            ValueError: it holds what cannot be copied.
        """
        return cls(owner=owner, pickled=_pickle(owner), places=tuple(places))

    def restore(self) -> None:
        """Put the owner back where it was held, and its state into it if that has changed."""
        for holder, name in self.places:
            holder[name] = self.owner
        if _pickle(self.owner) == self.pickled:
            return
        original = pickle.loads(self.pickled)
        if isinstance(self.owner, torch.nn.Module):
            self.owner.set_extra_state(original)
        else:
            vars(self.owner).clear()
            vars(self.owner).update(original)


def _find_places(module: torch.nn.Module) -> list[tuple[dict[str, Any], str]]:
    attributes = vars(module)
    inner = [value for value in attributes.values() if type(value) is dict]
    return [(h, n) for h in (attributes, *inner) for n, value in h.items() if isinstance(value, _CONFIGURATIONS)]


def _pickle(owner: Any) -> bytes:
    try:
        return pickle.dumps(_read(owner))
    except Exception as error:
        raise ValueError(
            f"{type(owner).__name__}: it holds what cannot be copied ({type(error).__name__}), so that rows cannot be "
            "kept out of it; take it out of what is saved with the model."
        ) from None


def _read(owner: Any) -> Any:
    return owner.get_extra_state() if isinstance(owner, torch.nn.Module) else vars(owner)
