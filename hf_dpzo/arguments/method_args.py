"""The flags that are parameters of methods and of updates, and checks that they go together."""

from typing import Any

from transformers import TrainingArguments

from hf_dpzo.methods import METHODS
from hf_dpzo.methods.method import list_parameters, list_required_parameters
from hf_dpzo.methods.zopo import MASK_SCHEDULES
from hf_dpzo.privacy.mechanism import NOISES
from hf_dpzo.zo.spsa import DIFFERENCES
from hf_dpzo.zo.updates import UPDATES, Adam, Momentum, Update


# Flags that are parameters of methods. Which of them may be given depends on the method.
NUMBER_FLAGS = (
    "smoothing",
    "clip_norm",
    "noise_multiplier",
    "final_smoothing",
    "anchor_strength",
    "pruning_ratio",
    "radius",
)


COUNT_FLAGS = ("num_directions", "num_stages")


CHOICE_FLAGS = {"difference": DIFFERENCES, "noise": NOISES, "mask": MASK_SCHEDULES}


METHOD_FLAGS = (*NUMBER_FLAGS, *COUNT_FLAGS, *CHOICE_FLAGS, "paper_noise")


ADAM_FLAGS = ("adam_beta1", "adam_beta2", "adam_epsilon")


# Parameters that the plan of a run determines, not a flag of that name alone.
PLANNED_PARAMETERS = {"noise_multiplier", "expected_batch_size"}


def check_method_flags(args: TrainingArguments) -> None:
    """Raise `ValueError` for flags that the method does not take, and for missing ones that it needs."""
    parameters = list_parameters(METHODS[args.method])
    for name in METHOD_FLAGS:
        if is_given(getattr(args, name)) and name not in parameters:
            others = ", ".join(sorted(other for other in METHODS if name in list_parameters(METHODS[other])))
            raise ValueError(
                f"{name}={getattr(args, name)}: method={args.method} has no such parameter; "
                f"remove it, or choose a method that has it: {others}."
            )
    for name in list_required_parameters(METHODS[args.method]) - PLANNED_PARAMETERS:
        if getattr(args, name) is None:
            raise ValueError(f"{name}=None: method={args.method} has no default for it; set it.")
    if args.pruning_ratio is not None and args.pruning_ratio > 1:
        raise ValueError(f"pruning_ratio={args.pruning_ratio}: it is a share of coordinates; choose at most 1.")


def check_update(args: TrainingArguments) -> None:
    """Raise `ValueError` for flags that the update does not read, and for values that it cannot use."""
    if args.momentum is not None and (args.update != "momentum" or args.momentum >= 1):
        raise ValueError(
            f"momentum={args.momentum}: it is the share that update=momentum keeps; set that, and less than 1."
        )
    if args.update == "adam" and not (0 <= args.adam_beta1 < 1 and 0 <= args.adam_beta2 < 1 and args.adam_epsilon > 0):
        raise ValueError(
            f"adam_beta1={args.adam_beta1}, adam_beta2={args.adam_beta2}, adam_epsilon={args.adam_epsilon}: the "
            "betas lie in [0, 1), and epsilon above 0; correct them."
        )
    for name in ADAM_FLAGS:
        if args.update != "adam" and getattr(args, name) != TrainingArguments.__dataclass_fields__[name].default:
            raise ValueError(f"{name}={getattr(args, name)}: update=adam alone reads it; set that, or remove this.")
    directions = args.num_directions or METHODS[args.method].num_directions
    if directions < UPDATES[args.update].min_directions:
        raise ValueError(
            f"update={args.update}: num_directions={directions} has no spread to divide by; choose aggzo, or raise "
            "num_directions."
        )


def build_update(args: TrainingArguments) -> Update:
    """Return the update rule that the flags choose, with its parameters."""
    if args.update == "momentum":
        return Momentum() if args.momentum is None else Momentum(momentum=args.momentum)
    if args.update == "adam":
        return Adam(betas=(args.adam_beta1, args.adam_beta2), epsilon=args.adam_epsilon)
    return UPDATES[args.update]()


def is_given(value: Any) -> bool:
    """Return whether a flag was set. One that was not is `None` or `False`."""
    return value is not None and value is not False
