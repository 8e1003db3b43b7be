"""Runs a recipe from beginning to end: load, evaluate, train, evaluate, save."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from hf_dpzo.arguments.training_args import ZOTrainingArguments
from hf_dpzo.auditing.coins import Coins
from hf_dpzo.privacy.rounding import round_up
from hf_dpzo.recipe.defaults import describe_defaults
from hf_dpzo.recipe.entering import load_ledger_rows, refuse_beyond_budget, report_ledger
from hf_dpzo.recipe.invocation import find_ending
from hf_dpzo.recipe.lengths import find_longest_row
from hf_dpzo.recipe.loading import load_model, load_rows, load_tokenizer
from hf_dpzo.recipe.obstacles import open_hub_repository, parse_resume_flag, refuse_obstacles
from hf_dpzo.recipe.places import PATH_FIELDS
from hf_dpzo.recipe.rates import lower_learning_rate
from hf_dpzo.recipe.recipe import Recipe, parse_recipe
from hf_dpzo.recipe.saved import describe_use
from hf_dpzo.recipe.tables import refuse_missing_files
from hf_dpzo.recipe.untouched import measure_untouched
from hf_dpzo.trainer.trainer import ZOTrainer
from hf_dpzo.trajectory.going_on import trains_first_factor
from hf_dpzo.trajectory.header import TrajectoryError
from hf_dpzo.trajectory.known_bases import remember_base
from hf_dpzo.trajectory.log import Trajectory


# What is said of missing cells, whether rows have any or not.
MISSING = {
    "empty": "no text; a row without text or label is left out",
    "skip": "its row is left out",
    "refuse": "refused",
}


def run_recipe(
    recipe: Recipe, args: ZOTrainingArguments, *, announce: Callable[[], None] | None = None
) -> list[tuple[str, str]]:
    """Train as the recipe says, save the model to `args.output_dir`, and return the lines of a short report.

    Only the first process returns lines; the others return none.

    Args:
        recipe: the recipe.
        args: its training arguments.
        announce: called before the model is loaded, which takes long, after what can be refused without it.
    """
    refuse_obstacles(recipe, args)
    trainer = build_trainer(recipe, args, announce=announce)
    trainer.create_model_card(dataset=recipe.data)
    before = _measure_before(trainer, recipe)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=parse_resume_flag(args.resume_from_checkpoint))
    seconds = time.perf_counter() - started
    if trainer.is_world_process_zero():
        _remember_base(recipe, Path(args.output_dir))
    after = _measure_metric(trainer, recipe)
    trainer.save_model()
    trainer.accelerator.end_training()
    if not trainer.is_world_process_zero():
        return []
    name = recipe.kind.metric_name
    return [
        *([("chosen by the task", describe_defaults(recipe.chosen))] if recipe.chosen else []),
        *([] if before is None else [before, (f"{name} after", after)]),
        *_report_guarantee(trainer),
        *report_ledger(trainer),
        *([] if trainer.failed_rows is None else [("rows that fail", str(trainer.failed_rows))]),
        ("a missing cell", MISSING[recipe.if_missing]),
        ("tokens of a row, at most", str(recipe.max_length)),
        *([("audit", "passed")] if args.audit else []),
        *([("canaries", f"{args.canaries}; hf-dpzo audit --run {args.output_dir}")] if args.canaries else []),
        *([("processes", str(args.world_size))] if args.world_size > 1 else []),
        ("steps", str(trainer.state.global_step)),
        ("seconds of training", f"{seconds:.0f}"),
        (recipe.kind.name_trained(recipe), args.output_dir),
    ]


def _remember_base(recipe: Recipe, folder: Path) -> None:
    """Keep where a base model that is a folder is, so that the run's model can be used here without being told."""
    place = Path(recipe.model_name_or_path).expanduser()
    if place.is_dir():
        remember_base(Trajectory.read(folder), str(place.resolve() / (recipe.gguf_file or "")))


def build_trainer(
    recipe: Recipe, args: ZOTrainingArguments, *, announce: Callable[[], None] | None = None
) -> ZOTrainer:
    """Load everything that the recipe names, and build the trainer from it.

    Whether LoRA's first matrix is frozen follows from the log of the run in `args.output_dir`, if the recipe does not
    say: that was not the default in earlier versions.
    """
    if recipe.lora_freeze_a is None:
        recipe.lora_freeze_a = not _trains_a(Path(args.output_dir))
    if args.padded_lengths and recipe.max_length > args.padded_lengths[-1]:
        raise ValueError(
            f"padded_lengths={args.padded_lengths}: rows may have max_length={recipe.max_length} tokens, and longer "
            "ones would contribute nothing; raise the last length, or lower max_length."
        )
    refuse_missing_files(recipe)
    if args.device.type == "cpu":
        args.dataloader_pin_memory = False  # There is nothing to pin for, as torch would warn.
    tokenizer = load_tokenizer(recipe)
    train, evaluation = load_rows(recipe, tokenizer, kept_column=args.privacy_unit_column)
    units = len(args.build_units(train))
    method, budget = args.plan(units)  # What is wrong with delta or noise for so many rows is an error here.
    lower_learning_rate(recipe, args, method, budget)
    refuse_beyond_budget(args, budget, units)
    open_hub_repository(args)
    if announce is not None:
        announce()
    model = load_model(recipe, tokenizer, seed=args.seed)
    longest = find_longest_row(model, recipe, tokenizer)
    if longest < recipe.max_length:
        recipe.max_length = longest
        train, evaluation = load_rows(recipe, tokenizer, kept_column=args.privacy_unit_column)
    trainer = ZOTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        data_collator=recipe.kind.build_collator(tokenizer, model),
        compute_metrics=recipe.kind.compute_metrics,
        per_example_loss=recipe.kind.build_loss(recipe, model, tokenizer),
    )
    trainer.recipe_flags = recipe.movable_flags
    trainer.ledger_rows = load_ledger_rows(recipe, args)
    trainer.used_recipe = describe_use(recipe, tokenizer)
    trainer.longest_row = recipe.max_length
    trainer.row_ending = find_ending(recipe, tokenizer)
    return trainer


def rebuild_trainer(folder: Path, flags: Sequence[str] = ()) -> ZOTrainer:
    """Build the trainer of the recipe that the run with canaries in `folder` was made from, to audit it.

    Args:
        folder: the folder of the run.
        flags: flags that replace fields of the recipe, such as the path of data that were moved.

    Raises:
        ValueError: there is no run with canaries, or no recipe is kept with them, or what it names was moved.
    """
    if not folder.is_dir():
        raise ValueError(f"run={folder}: there is no such folder; name the output_dir of a run with canaries.")
    if Trajectory.read(folder).header["rows"].get("canaries") is None:
        raise ValueError(
            f"run={folder}: it had no canaries, and an audit guesses which canaries a run had; train with canaries=64, "
            "or attack its mechanism by hf-dpzo audit and its recipe."
        )
    kept = Coins.load(folder).recipe
    if not kept:
        raise ValueError(
            f"run={folder}: Python code made it, not a recipe; build the same trainer there and call its audit_run()."
        )
    # What the task would choose today is not what the run had.
    quiet = ["--output_dir", str(folder), "--push_to_hub", "false", "--report_to", "none", "--privacy_ledger="]
    recipe, args = parse_recipe({}, [*kept, *quiet, *flags], is_complete=True)
    for name in PATH_FIELDS:
        path = getattr(recipe, name)
        if path and Path(path).is_absolute() and not Path(path).exists():
            raise ValueError(f"{name}={path}: it is not there any more; add --{name}= and where it is now.")
    return build_trainer(recipe, args)


def _trains_a(folder: Path) -> bool:
    """Return whether the run in `folder`, if there is one, trains the first matrix of LoRA."""
    try:
        return trains_first_factor(Trajectory.read(folder).header)
    except (OSError, TrajectoryError):
        return False


def _measure_before(trainer: ZOTrainer, recipe: Recipe) -> tuple[str, str] | None:
    """Return what the metric is before training, and its name in the report: by label words if a head is new."""
    name, kind = recipe.kind.metric_name, recipe.kind
    if trainer.eval_dataset is None:
        return None
    if not (kind.has_new_head and recipe.words):
        return f"{name} before", _measure_metric(trainer, recipe)
    metrics = measure_untouched(
        recipe,
        trainer.processing_class,
        batch_size=trainer.args.per_device_eval_batch_size,
        unit_column=trainer.args.privacy_unit_column,
    )
    return f"{name} of the untouched model", f"{metrics[kind.metric.removeprefix('eval_')]:.4f}"


def _measure_metric(trainer: ZOTrainer, recipe: Recipe) -> str | None:
    if trainer.eval_dataset is None:
        return None
    metrics = trainer.evaluate()
    return f"{metrics[recipe.kind.metric]:.4f}"


def _report_guarantee(trainer: ZOTrainer) -> list[tuple[str, str]]:
    if not trainer.budget.private:
        return [("privacy", "none: the method adds no noise")]
    guarantee = trainer.budget.guarantee()
    return [
        ("epsilon", f"{round_up(guarantee.epsilon):g}"),
        ("delta", f"{trainer.budget.delta:g}"),
        *([("trials that epsilon covers", str(trainer.args.trials))] if trainer.args.trials > 1 else []),
        *([] if guarantee.pure is None else [("pure epsilon", f"{round_up(guarantee.pure):g} (delta 0)")]),
    ]
