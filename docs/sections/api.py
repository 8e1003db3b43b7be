"""The public names, each of which autodoc describes from its docstring."""

import importlib
import inspect
from collections.abc import Iterator
from functools import cached_property

from transformers import TrainingArguments


PACKAGES = ("hf_dpzo", "hf_dpzo.privacy", "hf_dpzo.methods", "hf_dpzo.losses", "hf_dpzo.trl")


MEMBERS = (property, classmethod, staticmethod, cached_property)


def build_api() -> str:
    """Return a section for each public package, with what autodoc is to make of each of its names."""
    seen: set[int] = set()
    return "\n".join(
        f"## `{package}`\n\n```{{eval-rst}}\n{''.join(_list_names(package, seen))}```\n" for package in PACKAGES
    )


def _list_names(package: str, seen: set[int]) -> Iterator[str]:
    module = importlib.import_module(package)
    for name in module.__all__:
        value = getattr(module, name)
        options = ["   :no-index:"] if id(value) in seen else []  # What two packages offer is described in both.
        seen.add(id(value))
        if inspect.isclass(value):
            # All fields of training arguments are too many for one line, and have a page of their own.
            signature = "(...)" if issubclass(value, TrainingArguments) else ""
            options.append(f"   :members: {', '.join(list_members(value))}")
            yield _join(f".. autoclass:: {package}.{name}{signature}", *options)
        elif inspect.isfunction(value):
            yield _join(f".. autofunction:: {package}.{name}", *options)
        else:
            yield _join(f".. py:data:: {package}.{name}")


def list_members(owner: type) -> list[str]:
    """Return the public methods and properties of a class that this library has written."""
    own = (kind for kind in owner.__mro__ if kind.__module__.startswith("hf_dpzo."))
    members = ((name, member) for kind in own for name, member in vars(kind).items() if not name.startswith("_"))
    return list(dict.fromkeys(n for n, member in members if inspect.isfunction(member) or isinstance(member, MEMBERS)))


def _join(*lines: str) -> str:
    return "\n".join(lines) + "\n\n"
