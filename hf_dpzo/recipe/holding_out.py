"""Holds rows out, for evaluation or to train on fewer, so that one row more or less moves no more than one other."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import pyarrow as pa

from hf_dpzo.data.cells import is_missing, to_number, to_text


_CHUNK_ROWS = 1000


def hold_out(
    rows: datasets.Dataset,
    *,
    count: int | None,
    share: float | None,
    seed: int,
    unit_column: str | None,
    columns: Sequence[str],
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Return the training rows and those that are held out, each in their order.

    A row's place is a keyed hash of what it holds in `columns`, without missing cells. Those of the smallest hashes are
    held out.

    Args:
        rows: all rows.
        count: how many to hold out; with `unit_column`, how many units, with all of their rows.
        share: in place of `count`, the share of rows to hold out, between 0 and 1; about as many are.
        seed: the public key of the hash.
        unit_column: the column that says to which unit of privacy a row belongs; `None` if each row is a unit.
        columns: the columns that are used. Others may number the rows, so that one row more would change all.

    Guarantee: with `share`, no row moves another one. With `count`, of which exactly as many are held out, one row or
    unit more or less changes the training rows by one row or unit: by itself, or by the one whose place it takes. So
    neighbouring data sets stay neighbours.

    Raises:
        ValueError: there are not more rows or units than `count`, or `share` leaves one side empty.
    """
    by_unit = share is None and unit_column is not None
    places = _find_places(rows.select_columns([unit_column] if by_unit else [*columns]), key=str(seed))
    if share is not None:
        chosen = _choose_share(places, share)
    elif unit_column is None:
        chosen = _choose_smallest(places, count)
    else:
        held_out = {*sorted({*places})[:count]}
        chosen = [place in held_out for place in places]
    if not any(chosen) or all(chosen):
        asked = f"eval_rows={count}" if share is None else f"eval_share={share}"
        advice = "hold out one row at least, and not all"
        if by_unit:
            advice = f"it counts units of {unit_column} with all of their rows, so hold out fewer, or set eval_share"
        raise ValueError(f"{asked}: it leaves no row on one side; {advice}.")
    held, kept = ([index for index, held in enumerate(chosen) if held is side] for side in (True, False))
    return rows.select(kept), rows.select(held)


def take_share(rows: datasets.Dataset, *, share: float, seed: int, columns: Sequence[str]) -> datasets.Dataset:
    """Return about `share` of the training rows, in their order.

    Args:
        rows: the training rows, without those that are held out.
        share: the share of rows to train on, between 0 and 1.
        seed: the public key of the hash by which they are chosen, apart from that of `hold_out`.
        columns: the columns that are used.

    Guarantee: no row moves another one.

    Raises:
        ValueError: no row is left.
    """
    chosen = _choose_share(_find_places(rows.select_columns([*columns]), key=f"{seed} train"), share)
    if not any(chosen):
        raise ValueError(f"train_share={share}: it leaves no row to train on; raise it.")
    return rows.select([index for index, taken in enumerate(chosen) if taken])


def _choose_share(places: list[bytes], share: float) -> list[bool]:
    limit = round(share * 2**64)
    return [int.from_bytes(place[:8], "big") < limit for place in places]


def _choose_smallest(places: list[bytes], count: int) -> list[bool]:
    """Return for each place whether it is among the `count` smallest; of equal ones, the first are."""
    chosen = {*sorted(range(len(places)), key=places.__getitem__)[: max(0, count)]}
    return [index in chosen for index in range(len(places))]


def _find_places(rows: datasets.Dataset, *, key: str) -> list[bytes]:
    """Return the keyed hash of each row."""
    key = key.encode()[:64]
    return [hashlib.blake2b(content, key=key, digest_size=16).digest() for content in _iterate_contents(rows)]


def _iterate_contents(rows: datasets.Dataset) -> Iterator[bytes]:
    """Yield what each row holds, in a form that neither types of columns nor missing cells change."""
    for table in rows.with_format("arrow").iter(_CHUNK_ROWS):
        for row in pa.table(table).to_pylist():
            yield json.dumps(_normalize(row), sort_keys=True).encode()


def _normalize(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _normalize(item) for name, item in value.items() if not is_missing(item)}
    if isinstance(value, list):
        return [_normalize(item) for item in value]
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    try:
        text = to_text(value, "")
    except ValueError:
        return repr(value)
    # A program may write 1 as 1.0 because a cell of another row is missing.
    number = to_number(text)
    return text if number is None else to_text(number, "")
