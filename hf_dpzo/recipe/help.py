"""The list of a recipe's fields for the command line, in groups, without those that are always refused."""

import argparse
import copy
from collections.abc import Iterator
from dataclasses import fields

from transformers import TrainingArguments

from hf_dpzo.arguments.training_args import ZOTrainingArguments
from hf_dpzo.arguments.unsupported import ALWAYS_REFUSED
from hf_dpzo.recipe.flags import FieldParser
from hf_dpzo.recipe.recipe import Recipe


# Each group begins with the field that is named here, in the order in which fields are defined.
RECIPE_GROUPS = {"model_name_or_path": "model", "data": "data", "template": "texts, labels and task"}


PRIVACY_FIELDS = {
    *("target_epsilon", "target_delta", "noise_multiplier", "noise", "paper_noise", "privacy_unit_column"),
    *("max_rows_per_unit", "trials", "tuning_runs", "earlier_runs", "report_failed_rows", "audit", "canaries"),
    *("eval_data_is_public", "privacy_ledger"),
}


# The fields of the stock Trainer that most recipes set.
COMMON_FIELDS = {
    *("output_dir", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "seed"),
    *("per_device_train_batch_size", "per_device_eval_batch_size", "eval_strategy", "eval_steps", "logging_steps"),
    *("save_strategy", "save_steps", "save_total_limit", "resume_from_checkpoint", "report_to", "push_to_hub"),
    *("hub_model_id", "hub_private_repo", "push_trajectory", "use_cpu", "expected_batch_size"),
}


COMMON_GROUP, STOCK_GROUP = "steps, evaluation, saving and publishing", "more, as in transformers"


# In the order of the help.
GROUPS = (*RECIPE_GROUPS.values(), "method", "privacy", COMMON_GROUP, STOCK_GROUP)


def list_fields() -> Iterator[tuple[str, argparse.Action]]:
    """Yield the group and the flag of each field of a recipe that is not always refused, in the order of the help."""
    group, stock = "", {entry.name for entry in fields(TrainingArguments)}
    actions = {action.dest: action for action in FieldParser((Recipe, ZOTrainingArguments))._actions}
    found: list[tuple[str, argparse.Action]] = []
    for entry in fields(Recipe):
        group = RECIPE_GROUPS.get(entry.name, group)
        if entry.name in actions:
            found.append((group, actions[entry.name]))
    for entry in fields(ZOTrainingArguments):
        if entry.name in actions and entry.name not in ALWAYS_REFUSED:
            own = "privacy" if entry.name in PRIVACY_FIELDS else "method"
            group = COMMON_GROUP if entry.name in COMMON_FIELDS else STOCK_GROUP if entry.name in stock else own
            found.append((group, actions[entry.name]))
    yield from sorted(found, key=lambda one: GROUPS.index(one[0]))


def format_help() -> str:
    """Return the list of all fields of a recipe, in groups."""
    parser = argparse.ArgumentParser(
        prog="hf-dpzo train",
        usage="hf-dpzo train RECIPE.yaml [--FIELD VALUE ...] [--without FIELD,FIELD]",
        description="Fine-tune the model that a recipe names. A flag replaces a field; --without leaves fields out.",
        add_help=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=120),
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name, action in list_fields():
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        shown = copy.copy(action)
        shown.option_strings = action.option_strings[:1]  # Without the spelling with hyphens, which is taken too.
        groups[name]._add_action(shown)
    return parser.format_help()
