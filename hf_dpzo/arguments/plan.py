"""Plans a run: chooses its method, its noise and its budget by the arguments."""

import copy
import math
from typing import TYPE_CHECKING, Any

from hf_dpzo.arguments.method_args import ADAM_FLAGS, METHOD_FLAGS, is_given
from hf_dpzo.arguments.report_plan import plan_report
from hf_dpzo.data.sampling import steps_per_epoch
from hf_dpzo.methods import METHODS, Method, PrivateMethod
from hf_dpzo.privacy.accounting import check_delta, check_epsilon
from hf_dpzo.privacy.calibration import calibrate_query
from hf_dpzo.privacy.clipping import MAX_ROWS
from hf_dpzo.privacy.ledger import Budget
from hf_dpzo.privacy.queries import Releases
from hf_dpzo.trajectory.earlier_runs import read_earlier_runs


if TYPE_CHECKING:
    from hf_dpzo.arguments.training_args import ZOTrainingArguments


# Flags that must not change after a run was planned from them.
PLANNED_FLAGS = (
    "method",
    "target_epsilon",
    "target_delta",
    "expected_batch_size",
    "directions",
    "perturbation_scales",
    "seed",
    "max_steps",
    "num_train_epochs",
    "privacy_unit_column",
    "max_rows_per_unit",
    "trials",
    "earlier_runs",
    "report_failed_rows",
    "canaries",
    # The budget does not depend on it, but the isolation of rows was measured with it.
    "points_per_pass",
    # The budget does not depend on them, but the optimizer is built with them, and the card states them.
    "learning_rate",
    "update",
    "momentum",
    *ADAM_FLAGS,
    *METHOD_FLAGS,
)


def plan_run(args: "ZOTrainingArguments", num_units: int) -> tuple[Method, Budget]:
    """Plan a run over `num_units` units of privacy. See `ZOTrainingArguments.plan`."""
    batch_size = args.resolve_batch_size(num_units)
    _check_batch_size(args, batch_size, num_units)
    sampling_rate = args.sampling_rate(num_units)
    earlier: Releases = ()
    report: Releases = ()
    steps = _count_planned_steps(args, sampling_rate)
    parameters = {name: getattr(args, name) for name in METHOD_FLAGS if is_given(getattr(args, name))}
    if issubclass(METHODS[args.method], PrivateMethod):
        parameters["expected_batch_size"] = batch_size
    if args.private:
        check_delta(args.target_delta, num_rows=num_units)
        earlier = read_earlier_runs(args.earlier_runs or (), unit_column=args.privacy_unit_column).releases
        parameters["noise_multiplier"] = _choose_noise_multiplier(args, parameters, sampling_rate, steps, earlier)
    method = METHODS[args.method](**parameters)
    method.check_plan(steps)
    query = method.mechanism.query(sampling_rate)
    if args.report_failed_rows is not None:
        counted = {"steps": steps, "trials": args.trials, "delta": args.target_delta, "earlier": earlier}
        counted["expected_batch_size"] = batch_size
        report = plan_report(query, share=args.report_failed_rows, **counted)
    delta = args.target_delta if args.private else None
    budget = Budget(query=query, planned_steps=steps, delta=delta, trials=args.trials, earlier=earlier, report=report)
    if budget.private:
        check_epsilon(budget.guarantee())
    return method, budget


def replan_run(
    args: "ZOTrainingArguments", num_units: int, *, target_epsilon: float | None = None, max_steps: int | None = None
) -> Budget:
    """Return the budget of the same run with another target, or another number of steps. `args` stay as they are."""
    changed = copy.copy(args)
    changed.target_epsilon = args.target_epsilon if target_epsilon is None else target_epsilon
    changed.max_steps = args.max_steps if max_steps is None else max_steps
    return plan_run(changed, num_units)[1]


def _check_batch_size(args: "ZOTrainingArguments", batch_size: int, num_units: int) -> None:
    if not 0 < batch_size <= num_units:
        raise ValueError(
            f"expected_batch_size={args.expected_batch_size}: the training data have {num_units} "
            f"{args.unit_name_plural}; lower it."
        )
    if batch_size > MAX_ROWS // 2:
        raise ValueError(f"expected_batch_size={batch_size}: sums are exact for up to {MAX_ROWS // 2}; lower it.")


def _count_planned_steps(args: "ZOTrainingArguments", sampling_rate: float) -> int:
    if args.max_steps > 0:
        return args.max_steps
    # Rounded up, as Trainer.set_initial_training_values does.
    return math.ceil(args.num_train_epochs * steps_per_epoch(sampling_rate))


def _choose_noise_multiplier(
    args: "ZOTrainingArguments", parameters: dict[str, Any], sampling_rate: float, steps: int, earlier: Releases
) -> float:
    if args.noise_multiplier is not None:
        return args.noise_multiplier
    unscaled = METHODS[args.method](**{**parameters, "noise_multiplier": 1.0})
    return calibrate_query(
        unscaled.mechanism.query(sampling_rate),
        steps=steps * args.trials,
        target_epsilon=args.target_epsilon * (1 - (args.report_failed_rows or 0)),
        target_delta=args.target_delta,
        earlier=earlier,
    ).noise_multiplier
