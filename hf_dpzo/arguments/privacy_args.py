"""Checks the flags that set the privacy of a run, and the number of runs that a guarantee covers."""

import os

from transformers import TrainingArguments

from hf_dpzo.arguments.coercion import coerce_count, coerce_list, coerce_positive
from hf_dpzo.privacy.accounting import check_delta


def check_privacy(args: TrainingArguments) -> None:
    """Raise `ValueError` unless the flags fit together.

    A private run needs a delta, and either a noise multiplier or a target epsilon. Any other run has no target.
    """
    if args.private:
        _check_private(args)
    elif args.target_epsilon is not None or args.target_delta is not None:
        cause = "noise_multiplier=0" if args.noise_multiplier == 0 else f"method={args.method}"
        raise ValueError(
            f"{cause}: without noise no epsilon or delta holds, for random directions hide nothing; remove "
            "target_epsilon and target_delta."
        )


def _check_private(args: TrainingArguments) -> None:
    and_delta = " and from target_delta, which is missing too" if args.target_delta is None else ""
    if (args.target_epsilon is None) == (args.noise_multiplier is None):
        raise ValueError(
            f"target_epsilon={args.target_epsilon}, noise_multiplier={args.noise_multiplier}: give one of the two; the "
            f"other follows from it{and_delta}."
        )
    if args.target_delta is None:
        raise ValueError(
            "target_delta=None: a guarantee needs a delta; choose a tenth of one over the number of rows or users, "
            "such as 1e-5 for 10,000."
        )
    check_delta(args.target_delta)


def check_trials(args: TrainingArguments) -> None:
    """Raise `ValueError` unless a guarantee can cover `trials` runs, and `tuning_runs` are no fewer."""
    if args.trials is None:
        raise ValueError("trials=None: it must be a whole number, this run among them; leave it out for one.")
    if args.trials > 1 and not args.private:
        raise ValueError(f"trials={args.trials}: without noise there is no guarantee to cover them; remove it.")
    if args.tuning_runs is not None and args.tuning_runs < args.trials:
        raise ValueError(
            f"tuning_runs={args.tuning_runs}: trials={args.trials} counts more runs than that; raise it, or remove it."
        )


def check_earlier_runs(args: TrainingArguments) -> None:
    """Coerce and check `earlier_runs`."""
    args.earlier_runs = [str(folder) for folder in coerce_list("earlier_runs", args.earlier_runs)] or None
    if args.earlier_runs is not None and not args.private:
        raise ValueError(
            f"earlier_runs={args.earlier_runs}: without noise there is no guarantee to cover them; remove it."
        )


def check_canaries(args: TrainingArguments) -> None:
    """Raise `ValueError` unless there is a claim to audit with `canaries`, and coins to guess."""
    if args.canaries is not None and not args.private:
        raise ValueError(f"canaries={args.canaries}: without noise there is no claim to audit; remove it.")
    if args.canaries == 1:
        raise ValueError("canaries=1: an audit guesses which of several are in; set 64 or more, or remove it.")


def check_report(args: TrainingArguments) -> None:
    """Coerce and check `report_failed_rows`."""
    args.report_failed_rows = coerce_positive("report_failed_rows", args.report_failed_rows)
    share = args.report_failed_rows
    if share is not None and share > 0.5:
        raise ValueError(f"report_failed_rows={share:g}: it is a share of the budget; set 0.5 or less, such as 0.02.")
    if share is not None and not args.private:
        raise ValueError(f"report_failed_rows={share:g}: without noise there is no budget to pay from; remove it.")


def check_privacy_ledger(args: TrainingArguments) -> None:
    """Coerce and check `privacy_ledger`."""
    if not isinstance(args.privacy_ledger, str | os.PathLike | None):
        raise ValueError(
            f"privacy_ledger={args.privacy_ledger!r}: it is the path of a file beside the data; name one, such as "
            "data.ledger, or remove it."
        )
    args.privacy_ledger = str(args.privacy_ledger or "") or None


def check_units(args: TrainingArguments) -> None:
    """Coerce and check `privacy_unit_column`, `max_rows_per_unit` and `padded_lengths`."""
    args.max_rows_per_unit = coerce_count("max_rows_per_unit", args.max_rows_per_unit)
    if args.max_rows_per_unit is not None and args.privacy_unit_column is None:
        raise ValueError(
            f"max_rows_per_unit={args.max_rows_per_unit}: each row is its own unit; set privacy_unit_column too."
        )
    if args.privacy_unit_column is not None and args.max_rows_per_unit is None:
        args.max_rows_per_unit = 8
    lengths = [coerce_count("padded_lengths", length) for length in coerce_list("padded_lengths", args.padded_lengths)]
    if lengths != sorted(set(lengths)):
        raise ValueError(f"padded_lengths={args.padded_lengths}: lengths must grow; sort them, each once.")
    args.padded_lengths = lengths or None
