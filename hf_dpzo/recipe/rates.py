"""The learning rate that a task chose, lowered where the noise of a run is too much for it."""

from itertools import islice
from pathlib import Path

from hf_dpzo.arguments.rates import choose_learning_rate
from hf_dpzo.arguments.training_args import ZOTrainingArguments
from hf_dpzo.methods import Method
from hf_dpzo.privacy.ledger import Budget
from hf_dpzo.recipe.recipe import Recipe
from hf_dpzo.trajectory.header import TrajectoryError
from hf_dpzo.trajectory.log import Trajectory


def lower_learning_rate(recipe: Recipe, args: ZOTrainingArguments, method: Method, budget: Budget) -> None:
    """Lower the learning rate that the task of `recipe` chose, if the noise of its run is too much for it.

    A run that goes on keeps the rate that it began with.
    """
    rate = recipe.chosen.get("learning_rate")
    if rate is None or not args.private or _has_begun_with(rate, Path(args.output_dir)):
        return
    limit = recipe.kind.defaults(recipe).most_noise
    most = limit * choose_learning_rate(method, steps=budget.planned_steps, update=args.update_rule)
    if most < rate:
        args.learning_rate = float(f"{most:.3g}")
        recipe.chosen["learning_rate"] = args.learning_rate


def _has_begun_with(rate: float, folder: Path) -> bool:
    try:
        records = Trajectory.read(folder).records
    except (OSError, TrajectoryError):
        return False
    return any(rate in record.learning_rates for record in islice(records, 1))
