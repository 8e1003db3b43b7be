"""Says before training what limits a run, by public rows and public numbers alone."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers.utils import logging

from hf_dpzo.arguments.training_args import ZOTrainingArguments
from hf_dpzo.io.figures import show_figures
from hf_dpzo.methods import METHODS
from hf_dpzo.methods.method import Method
from hf_dpzo.models.unwrap import find_adapter_parameters
from hf_dpzo.privacy.limits import RunLimits, list_equal_times
from hf_dpzo.privacy.mechanism import NoisySum
from hf_dpzo.zo.directions import Directions
from hf_dpzo.zo.shift import shifted


logger = logging.get_logger(__name__)


# A head whose coefficients are as many times those of an adapter leaves little of them in a step.
DROWNING_RATIO = 10.0


# The part of the names of a head's parameters that PEFT copies.
PEFT_HEAD = "modules_to_save"


# The public rows that are looked at, those from which they are taken, and the directions along which they are.
SEEN_ROWS, SEEN_AMONG, SEEN_DIRECTIONS = 8, 256, 2


# The number of directions along which an objective is tried.
TRIED_DIRECTIONS = 2


def measure_quotients(
    parameters: Mapping[int, torch.Tensor],
    *,
    evaluate: Callable[[], torch.Tensor],
    directions: Directions,
    smoothing: float,
) -> torch.Tensor | None:
    """Return the central difference quotients of public rows, float64 `[rows, directions]`; `None` if rows fail.

    Args:
        parameters: what moves, by its numbers among the directions'.
        evaluate: a function that returns the losses of the rows where the parameters are, `[rows]`.
        directions: the directions of the run.
        smoothing: the distance of a probe point.
    """
    columns = []
    for direction in range(SEEN_DIRECTIONS):
        ends = []
        for distance in (smoothing, -smoothing):
            with shifted(parameters, directions, {direction: distance}):
                ends.append(evaluate().double())
        columns.append((ends[0] - ends[1]) / (2 * smoothing))
    quotients = torch.stack(columns, dim=1).cpu()
    finite = quotients[quotients.isfinite().all(dim=1)]
    return finite if len(finite) else None


def find_limits(quotients: torch.Tensor, method: Method, *, sampling_rate: float, steps: int) -> RunLimits | None:
    """Return what limits a run of `method` whose rows are like public ones; `None` for one without noise."""
    if not isinstance(method.mechanism, NoisySum):
        return None
    count = method.estimator.num_directions
    return RunLimits.of_public(
        quotients, method.mechanism, num_directions=count, sampling_rate=sampling_rate, steps=steps
    )


def report_limits(limits: RunLimits, args: ZOTrainingArguments, method: Method, *, rows: str, num_units: int) -> None:
    """Log what limits a run in one message: as a warning if something should be done about it.

    Args:
        limits: what was found.
        args: the arguments of the run.
        method: its method.
        rows: what the rows were, such as "8 made-up rows".
        num_units: the number of units of privacy.
    """
    told = describe_limits(limits, args, method, rows=rows, num_units=num_units)
    (logger.warning if limits.needs_attention else logger.info)(told)


def describe_limits(limits: RunLimits, args: ZOTrainingArguments, method: Method, *, rows: str, num_units: int) -> str:
    """Return what limits a run as two sentences; see `report_limits`."""
    return f"{describe_noise(limits, args, method, num_units=num_units)} {describe_clipping(limits, method, rows=rows)}"


def warn_of_both_factors(model: torch.nn.Module) -> None:
    """Warn where both matrices of LoRA are trained, as PEFT leaves them. A user may want it so."""
    if any(".lora_A." in name for name, parameter in model.named_parameters() if parameter.requires_grad):
        logger.warning(
            "lora_A: both matrices of LoRA are trained, and together they diverged at learning rates that suit lora_B; "
            "make the adapter by seeded_peft_model(..., freeze_a=True), or leave lora_freeze_a out of a recipe."
        )


def warn_of_drowned_adapter(
    model: torch.nn.Module,
    parameters: Mapping[int, torch.Tensor],
    measure: Callable[[Mapping[int, torch.Tensor]], float],
) -> None:
    """Warn where the coefficients of a head are many times those of the adapter beside it, by public rows.

    Args:
        model: the model.
        parameters: what is trained, by its numbers among the directions'.
        measure: a function that returns the spread of the coefficients where some of the parameters alone move.
    """
    added = find_adapter_parameters(model)
    adapter = {index: parameter for index, parameter in parameters.items() if parameter in added}
    head = {index: parameter for index, parameter in parameters.items() if parameter not in added}
    if not adapter or not head:
        return
    small, large = measure(adapter), measure(head)
    if small > 0 and large >= DROWNING_RATIO * small:
        scale = json.dumps({PEFT_HEAD: float(f"{small / large:.1g}")})
        logger.warning(
            f"perturbation_scales: the coefficients of the head are {show_figures(large / small)} times those of the "
            f"adapter beside it, which is drowned; set perturbation_scales={scale} to even them, and a clip_norm that "
            "fits."
        )


def warn_of_flat_objective(losses: torch.Tensor, *, moves: bool, smoothing: float) -> None:
    """Warn, by public rows, of an objective that training could not follow.

    Args:
        losses: the losses of public rows, `[rows]`.
        moves: whether any of them differs between the two probe points of a direction.
        smoothing: the distance of the probe points.
    """
    count = len(losses)
    if count > 1 and bool((losses == losses[0]).all()):
        logger.warning(
            f"per_example_loss={losses[0].item():g}: it is the same on all {count} public rows, so that there may be "
            "nothing to learn from; choose a denser objective, such as token_f1 for exact_match, or a prompt that the "
            "model answers now and then."
        )
    if not moves:
        logger.warning(
            f"smoothing={smoothing:g}: on {count} public rows the objective is the same at both probe points of "
            f"{TRIED_DIRECTIONS} directions, so that training would follow noise alone; raise smoothing, or choose a "
            "denser objective."
        )


def describe_noise(limits: RunLimits, args: ZOTrainingArguments, method: Method, *, num_units: int) -> str:
    """Return a sentence on the noises of a coefficient, and what the same time would buy."""
    size, count = args.resolve_batch_size(num_units), method.estimator.num_directions
    given = f"expected_batch_size={size}"
    if not limits.sampling:
        return f"{given}: all {args.unit_name_plural} are in each step, so that its noise is that of privacy alone."
    noises = f"the sampling noise of a coefficient is {show_figures(limits.ratio)} times the privacy noise"
    if not limits.rows_limit:
        return f"{given}: {noises}."
    steps = round(limits.coefficients / size / count)
    options = list_equal_times(batch_size=size, num_directions=count, steps=steps, num_units=num_units)
    bought = [_describe_option(option, size, method) for option in options]
    remedy = "raise it, or the steps or the directions, for as long as time allows"
    same = f"; the same time buys {', or '.join(bought)}" if bought else ""
    return f"{given}: {noises}, so rows or directions, not epsilon, limit this run; {remedy}{same}."


def _describe_option(option: tuple[int, int, int], size: int, method: Method) -> str:
    rows, directions, steps = option
    if rows != size:
        return f"{steps} steps of {rows}"
    by = "" if type(method) is METHODS["aggzo"] else " by method=aggzo"
    return f"{steps} steps along {directions} directions{by}"


def describe_clipping(limits: RunLimits, method: Method, *, rows: str) -> str:
    """Return a sentence on how many public rows would be clipped, and which clip norm would fit."""
    clip_norm: Any = getattr(method, "clip_norm", None)
    told = f"At clip_norm={clip_norm:g}, {limits.clipped:.0%} of {rows} would be clipped at the start"
    if limits.clip_fits:
        return f"{told}."
    fitting = float(f"{clip_norm * limits.spread:.2g}")
    return f"{told}; their spread is {fitting:g}, a clip norm that would {_describe_gain(limits)}."


def _describe_gain(limits: RunLimits) -> str:
    return "keep more than signs" if limits.spread > 1 else "add less noise for the same epsilon"
