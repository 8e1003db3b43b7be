"""The settings of what is kept of rows from step to step, from the arguments of a run and public facts."""

from pathlib import Path
from typing import Any

import torch

from hf_dpzo.arguments.coercion import ALL_UNITS
from hf_dpzo.frozen.store import CACHE_DTYPES, FrozenCache, find_folder
from hf_dpzo.models.unwrap import unwrap_model


# The longest row that there may be if neither arguments nor the model say.
DEFAULT_LONGEST_ROW = 2048


def build_frozen_cache(
    args: Any, model: torch.nn.Module, dataset: Any, *, num_rows: int | None, longest_row: int, most_drawn: int
) -> FrozenCache | None:
    """Return how to keep what is computed for rows from step to step; `None` if it is not kept.

    Args:
        args: the arguments of the run.
        model: the model.
        dataset: the rows.
        num_rows: their number, if it is public; `None` if it is not.
        longest_row: the largest number of tokens of a row, if it is public; 0 if it is not known.
        most_drawn: how many rows all steps draw together at most, a public number.
    """
    if args.frozen_cache in (None, "none"):
        return None
    positions = getattr(getattr(unwrap_model(model), "config", None), "max_position_embeddings", None)
    known = (args.padded_lengths or [0])[-1], longest_row, positions or 0, DEFAULT_LONGEST_ROW
    rows_per_step = num_rows if args.expected_batch_size == ALL_UNITS else args.expected_batch_size
    return FrozenCache(
        place=args.frozen_cache,
        dtype=CACHE_DTYPES[args.frozen_cache_dtype or "float32"],
        most_rows=None if num_rows is None else min(num_rows, most_drawn),
        longest_row=next(filter(None, known)),
        folder=find_folder(dataset, Path(args.output_dir)),
        processes=args.world_size,
        rows_per_step=rows_per_step or 0,
    )
