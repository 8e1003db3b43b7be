"""Keys and values of tokens that a model has seen, which stay as they are however often it goes on after them."""

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class PrefixLayer(DynamicLayer):
    """The keys and values of a prefix in one layer, which stay as they are.

    Args:
        keys: the keys, `[batch, heads, tokens, features]`.
        values: the values, in the same shape.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values of prefix and suffix, and keep only those of the prefix."""
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


class PrefixCache(DynamicCache):
    """A cache of `PrefixLayer`s. A layer that is given one leaves nothing in it."""
