"""Checks and converts the values of all flags that zeroth-order training adds."""

from transformers import TrainingArguments

from hf_dpzo.arguments.coercion import check_choice, coerce_batch_size, coerce_count, coerce_positive, coerce_scales
from hf_dpzo.arguments.method_args import CHOICE_FLAGS, COUNT_FLAGS, NUMBER_FLAGS, check_method_flags, check_update
from hf_dpzo.arguments.privacy_args import (
    check_canaries,
    check_earlier_runs,
    check_privacy,
    check_privacy_ledger,
    check_report,
    check_trials,
    check_units,
)
from hf_dpzo.frozen.store import CACHE_DTYPES, CACHE_PLACES
from hf_dpzo.methods import METHODS
from hf_dpzo.zo.directions import DIRECTIONS
from hf_dpzo.zo.updates import UPDATES


PARALLEL_MODES = ("examples", "points")


def check_values(args: TrainingArguments) -> None:
    """Coerce and check the fields that `ZOTrainingArguments` adds. YAML reads numbers such as 1e-6 as text."""
    check_choice("method", args.method, METHODS)
    for name in ("target_epsilon", "target_delta", *NUMBER_FLAGS, "learning_rate", "momentum"):
        may_be_zero = name == "anchor_strength" or (name == "noise_multiplier" and METHODS[args.method].allows_no_noise)
        setattr(args, name, coerce_positive(name, getattr(args, name), allow_zero=may_be_zero))
    args.perturbation_scales = coerce_scales(args.perturbation_scales)
    if args.perturbation_scales is not None and args.update == "adam":
        raise ValueError("perturbation_scales: update=adam divides scales out of its steps; choose sgd or momentum.")
    args.expected_batch_size = coerce_batch_size(args.expected_batch_size)
    for name in (*COUNT_FLAGS, "points_per_pass", "canaries", "tuning_runs", "trials"):
        setattr(args, name, coerce_count(name, getattr(args, name)))
    choices_of = {"directions": DIRECTIONS, "update": UPDATES, "parallel": PARALLEL_MODES, **CHOICE_FLAGS}
    choices_of |= {"frozen_cache": CACHE_PLACES, "frozen_cache_dtype": CACHE_DTYPES}
    for name, choices in choices_of.items():
        if getattr(args, name) is not None:
            check_choice(name, getattr(args, name), choices)
    if not isinstance(args.paper_noise, bool):
        raise ValueError(f"paper_noise={args.paper_noise!r}: it must be true or false.")
    check_method_flags(args)
    check_update(args)
    check_units(args)
    check_privacy(args)
    check_trials(args)
    check_earlier_runs(args)
    check_canaries(args)
    check_report(args)
    check_privacy_ledger(args)
