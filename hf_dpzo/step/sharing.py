"""Finds out what the probe points of a step can share, by trying it on public rows."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch._dynamo import OptimizedModule

from hf_dpzo.frozen.layers import Stretch, find_stretches
from hf_dpzo.frozen.rows import RowWork
from hf_dpzo.frozen.shared import SharedWork
from hf_dpzo.frozen.store import FrozenCache, RowStore
from hf_dpzo.models.precision import describe_reduced_precision
from hf_dpzo.models.unwrap import unwrap_model
from hf_dpzo.step.batch_losses import BatchLosses
from hf_dpzo.step.batched_points import at_stacks
from hf_dpzo.step.descent import is_copied
from hf_dpzo.step.fsdp import FSDPLosses
from hf_dpzo.zo.directions import Gaussian
from hf_dpzo.zo.shift import shifted


# The distances, in units of public noise, of the two points between which work is shared.
POINTS = (0.05, -0.05)


# How far the losses of rows that are evaluated from an invocation on may be from those of whole rows: relative to the
# loss, or absolute for a loss below one. The same for a base, or for what is kept, that is not float32.
ROUNDING = 1e-4
REDUCED_ROUNDING = 0.05


# The number of probe points of one pass after a prefix. A pass over few tokens is mostly reading weights and calling
# kernels, so that eight at once take 0.7 to 0.85 of the time of one after the other.
POINTS_AFTER_PREFIX = 8

# The most tokens of such a pass where suffixes may be long: with more of them, several points at once save little, and
# take their memory.
TOKENS_PER_PASS = 1 << 12


# The number of public rows on which it is tried, of each shape.
TRIED_ROWS = 5


# The memory for what is kept of public rows while this is tried.
TRIAL_BYTES = 1 << 26


@torch.no_grad()
def find_shared_work(
    model: torch.nn.Module,
    losses: BatchLosses,
    batches: Sequence[Sequence[Mapping[str, Any]]],
    cache: FrozenCache | None = None,
    *,
    longest_row: int = 0,
) -> SharedWork | None:
    """Return what keeps the work that all probe points share; `None` for a model that must be evaluated as a whole.

    It is tried on public rows. Their losses at one point, computed from what was kept at another one, must be those
    without anything kept, bit for bit. Those of rows that are evaluated from an invocation on, or of which something is
    kept from step to step, must be those of whole rows, up to rounding. A model that is compiled, or sharded over
    processes, is evaluated as a whole.

    Args:
        model: the model as it is trained.
        losses: the losses of a logical batch, as in training.
        batches: batches of public rows.
        cache: how to keep what is computed for rows from step to step; `None` not to.
        longest_row: the largest number of tokens of a row, if it is public; 0 if it is not known.

    Raises:
        ValueError: `cache` is given, and nothing can be kept.
    """
    is_whole = isinstance(model, OptimizedModule) or isinstance(losses, FSDPLosses)
    if is_whole and cache is not None:
        raise ValueError(
            f"frozen_cache={cache.place}: a model that is compiled, or split over processes, is evaluated as a whole; "
            "leave frozen_cache out, or torch_compile and fsdp."
        )
    if not is_whole:
        for shared in _propose(model, losses, batches, cache):
            if not _suits(model, losses, shared, batches):
                continue
            if shared.is_split:
                shared.points_per_pass = _choose_points(model, losses, shared, batches[0], longest_row)
            if cache is not None:
                shared.rows.store = cache.open_store(shared.rows.bytes_per_token)
            return shared
    if cache is not None:
        raise ValueError(
            f"frozen_cache={cache.place}: nothing of a row is the same in all steps, or what is kept of it gives other "
            "losses; train an adapter of upper layers or an activated one on rows of tokens, or leave frozen_cache out."
        )
    return None


def _suits(
    model: torch.nn.Module,
    losses: BatchLosses,
    shared: SharedWork,
    batches: Sequence[Sequence[Mapping[str, Any]]],
) -> bool:
    """Return whether sharing changes no loss of public rows."""
    with suppress(Exception):  # Rows or models that fail as a whole are refused elsewhere, with the reason.
        return all(_agrees(model, losses, shared, rows) for rows in batches)
    return False


def _propose(
    model: torch.nn.Module,
    losses: BatchLosses,
    batches: Sequence[Sequence[Mapping[str, Any]]],
    cache: FrozenCache | None,
) -> Iterator[SharedWork]:
    """Yield what to try, the best first."""
    if not batches:
        return
    try:
        stretches = find_stretches(model, lambda: losses.of_public(model, batches[0]))
    except Exception:
        return
    invocations = [losses.invocation] if losses.collator.suffix_rule is not None else []
    has_decoder = getattr(getattr(unwrap_model(model), "config", None), "is_encoder_decoder", False)
    kept = stretches[:1] if has_decoder else stretches
    fixed_shapes = losses.collator.has_fixed_shapes
    for invocation in [*invocations, *([None] if stretches else [])]:
        for rows in _propose_rows(losses, kept, cache, is_split=invocation is not None):
            yield SharedWork(model, stretches, invocation=invocation, fixed_shapes=fixed_shapes, rows=rows)


def _propose_rows(
    losses: BatchLosses, stretches: tuple[Stretch, ...], cache: FrozenCache | None, *, is_split: bool
) -> Iterator[RowWork | None]:
    """Yield how to keep rows from step to step.

    First without the keys of layers that need not run again, then with them, and then, for a loss that adds tokens to
    those of a row, keys alone. Of a decoder with an encoder nothing is kept: its tokens are not those of `input_ids`.
    """
    if cache is None:
        yield None
        return
    passed_over = len(stretches[0].layers) if is_split and len(stretches) == 1 else 0
    for kept, count in dict.fromkeys([(stretches, passed_over), (stretches, 0), *([((), 0)] if is_split else [])]):
        store = RowStore(torch.empty(TRIAL_BYTES, dtype=torch.uint8))
        parts = {"collator": losses.collator, "prepare": losses.prepare, "dtype": cache.dtype}
        parts["rows_per_step"] = cache.rows_per_step // cache.processes
        yield RowWork(kept, **parts, store=store, passed_over=count)


def _agrees(model: torch.nn.Module, losses: BatchLosses, shared: SharedWork, rows: Sequence[Mapping[str, Any]]) -> bool:
    trained = dict(enumerate(parameter for parameter in model.parameters() if parameter.requires_grad))
    directions = Gaussian(seed=0, sizes=[parameter.numel() for parameter in trained.values()])
    # A few of each kind: made-up rows end with a short one and one of another length.
    batch = losses.build_public_batch(rows if len(rows) <= TRIED_ROWS else [*rows[: TRIED_ROWS - 2], *rows[-2:]])

    def evaluate(form: BatchLosses, points: Sequence[float] = POINTS) -> Iterator[torch.Tensor]:
        for distance in points:
            with shifted(trained, directions, {0: distance}):
                yield form(model, batch)

    sharing = replace(losses, shared=shared)
    is_exact = describe_reduced_precision(model) is None and (shared.rows is None or shared.rows.is_exact)
    tolerance = ROUNDING if is_exact else REDUCED_ROUNDING
    alone = list(evaluate(sharing))
    are_close = functools.partial(torch.allclose, rtol=tolerance, atol=tolerance, equal_nan=True)
    for _ in range(1 if shared.rows is None else 2):  # In a second step the rows have been seen before.
        with shared.opened(batch.micro_batches):
            if not all(map(_are_equal, alone, evaluate(sharing))):
                return False
    # One point is enough here: what is kept at one gave the same losses at the other, in every bit.
    return all(map(are_close, alone[-1:], evaluate(losses, POINTS[-1:])))


def _choose_points(
    model: torch.nn.Module,
    losses: BatchLosses,
    shared: SharedWork,
    rows: Sequence[Mapping[str, Any]],
    longest_row: int,
) -> int | None:
    """Return how many probe points to evaluate in one pass after a prefix; `None` for one.

    Each is a copy of what is trained, and all of them together take no more memory than what is kept for a step. A loss
    that reads a row's end evaluates the end of a prompt. Answers may be as long as a row, and each point has its own
    activations, so that these are bounded by public lengths. Of several points at once nobody can tell whether rounding
    flips what changes in jumps.
    """
    if losses.loss.is_piecewise_constant:
        return None
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    points = min(POINTS_AFTER_PREFIX, shared.room // max(1, sum(parameter.nbytes for parameter in trained)))
    if not losses.collator.suffix_rule.ends_together:
        longest = max(losses.collator.padded_lengths, default=longest_row)
        points = min(points, TOKENS_PER_PASS // (longest * losses.collator.micro_batch_size)) if longest else 1
    return points if points > 1 and _batches_points(model, losses, shared, rows) else None


def _batches_points(
    model: torch.nn.Module, losses: BatchLosses, shared: SharedWork, rows: Sequence[Mapping[str, Any]]
) -> bool:
    """Return whether several probe points can be evaluated in one pass after a prefix."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not is_copied(model, trained):
        return False
    sharing = replace(losses, shared=shared)
    stacked = at_stacks(sharing, model, {parameter: torch.stack([parameter] * 2) for parameter in trained})
    try:
        found = stacked.of_public(model, rows)
    except Exception:
        return False
    expected = sharing.of_public(model, rows)[:, None].expand_as(found)
    return torch.allclose(found, expected, rtol=REDUCED_ROUNDING, atol=REDUCED_ROUNDING, equal_nan=True)


def _are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.nan_to_num(), other.nan_to_num())
