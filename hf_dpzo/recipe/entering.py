"""What a recipe does with the ledger of its data: it is asked before a model is loaded, and knows rows as they are."""

from pathlib import Path

import datasets

from hf_dpzo.arguments.training_args import ZOTrainingArguments
from hf_dpzo.data_ledger.data_ledger import DataLedger
from hf_dpzo.data_ledger.notice import announce_ledger
from hf_dpzo.data_ledger.place import refuse_place
from hf_dpzo.data_ledger.total import describe_epsilon
from hf_dpzo.privacy.ledger import Budget
from hf_dpzo.recipe.recipe import Recipe
from hf_dpzo.recipe.tables import load_tables
from hf_dpzo.trainer.entering import build_wish
from hf_dpzo.trainer.trainer import ZOTrainer
from hf_dpzo.trajectory.log import LOG_FILE


def refuse_beyond_budget(args: ZOTrainingArguments, budget: Budget, units: int) -> None:
    """Raise `BudgetExceededError` if a new run over `units` would pass the budget of their ledger. Nothing is entered.

    Where the ledger is and what it holds is said first, so that a mistyped path shows. A run that goes on is in its
    ledger already, and a new ledger has no budget. Only the first process looks.
    """
    if args.privacy_ledger is None or args.process_index > 0:
        return
    path = Path(args.privacy_ledger).expanduser()
    refuse_place(path, output_dir=Path(args.output_dir))
    announce_ledger(path, unit_column=args.privacy_unit_column)
    if not path.exists() or (Path(args.output_dir) / LOG_FILE).exists():
        return
    DataLedger(path).refuse(build_wish(args, budget, units))


def load_ledger_rows(recipe: Recipe, args: ZOTrainingArguments) -> datasets.Dataset | None:
    """Return the training rows as they are in their file, whatever becomes of them; `None` without a ledger."""
    if args.privacy_ledger is None:
        return None
    return load_tables(recipe, unit_column=args.privacy_unit_column)[0]


def report_ledger(trainer: ZOTrainer) -> list[tuple[str, str]]:
    """Return lines that say what all runs on the data come to, by their ledger; none without one."""
    facts = trainer.data_ledger_facts
    if facts is None:
        return []
    return [("runs on these data", str(facts["runs"])), describe_epsilon(facts["epsilon"])]
