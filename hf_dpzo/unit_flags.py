"""Checks the flags that say what a unit of privacy is, and how its rows are kept apart."""

from transformers import TrainingArguments

from hf_dpzo.values import as_list, whole


def check_units(args: TrainingArguments) -> None:
    """Coerce and check `privacy_unit_column`, `max_rows_per_unit` and `padded_lengths`."""
    args.max_rows_per_unit = whole("max_rows_per_unit", args.max_rows_per_unit)
    if args.max_rows_per_unit is not None and args.privacy_unit_column is None:
        raise ValueError(
            f"max_rows_per_unit={args.max_rows_per_unit}: each row is its own unit; set privacy_unit_column too."
        )
    if args.privacy_unit_column is not None and args.max_rows_per_unit is None:
        args.max_rows_per_unit = 8
    lengths = [whole("padded_lengths", length) for length in as_list("padded_lengths", args.padded_lengths)]
    if lengths != sorted(set(lengths)):
        raise ValueError(f"padded_lengths={args.padded_lengths}: lengths must grow; sort them, each once.")
    args.padded_lengths = lengths or None
