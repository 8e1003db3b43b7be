"""The tokens that all rows of a template begin with: what a frozen decoder computes of them is computed once.

Tokens that come later change nothing in earlier ones, so the keys and values of a beginning serve all rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from transformers import DynamicCache

from hf_dpzo.models.layer_reader import LayerReader
from hf_dpzo.models.prefix_cache import PrefixCache, PrefixLayer
from hf_dpzo.models.unwrap import count_positions


# Fewer tokens are not worth a pass of another form.
MIN_TOKENS = 3


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """The tokens that rows begin with, and what a model has computed of them.

    Args:
        tokens: the tokens, `[tokens]`.
        layers: the keys and the values of each layer, each `[1, heads, tokens, features]`.
    """

    tokens: torch.Tensor
    layers: Sequence[tuple[torch.Tensor, torch.Tensor]]

    @classmethod
    @torch.no_grad()
    def compute(cls, reader: LayerReader, tokens: Sequence[int], device: torch.device) -> "Beginning":
        """Return the beginning of `tokens` in the layers that `reader` computes."""
        ids = torch.tensor([list(tokens)], device=device)
        cache = DynamicCache()
        reader({"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": cache})
        kept = [(layer.keys, layer.values) for layer in cache.layers if layer.get_seq_length()]
        return cls(tokens=ids[0], layers=kept)

    def find_rows(self, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return which rows, padded on the right, have this beginning and a token after it, booleans `[batch]`."""
        count = len(self.tokens)
        if input_ids.shape[1] <= count:
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        return (input_ids[:, :count] == self.tokens).all(dim=1) & mask[:, : count + 1].all(dim=1)

    def read(self, reader: LayerReader, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the states of the tokens after the beginning, `[batch, later tokens, hidden_size]`.

        What is returned for a row that has not this beginning is of no use.
        """
        count, cache = len(self.tokens), PrefixCache()
        cache.layers = [
            PrefixLayer(keys.expand(len(input_ids), -1, -1, -1), values.expand(len(input_ids), -1, -1, -1))
            for keys, values in self.layers
        ]
        whole = torch.cat([torch.ones_like(mask[:, :count]), mask[:, count:]], dim=1)
        later = {"input_ids": input_ids[:, count:], "attention_mask": whole, "past_key_values": cache}
        return reader({**later, "position_ids": count_positions(whole)[:, count:]})


def find_common_beginning(rows: Sequence[Sequence[int]]) -> list[int]:
    """Return the tokens that all `rows` begin with, and none of which is the last of a row.

    >>> find_common_beginning([[1, 2, 3], [1, 2, 4, 5], [1, 2, 3, 4]]), find_common_beginning([[1, 2], [1, 2]])
    ([1, 2], [1])
    """
    places = zip(*(row[:-1] for row in rows), strict=False)
    return [tokens[0] for tokens in takewhile(lambda tokens: len({*tokens}) == 1, places)]
