"""Proposes the numbers of a recipe that people get wrong, by public rows, and says why beside each of them."""

import argparse
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hf_dpzo.arguments.training_args import ZOTrainingArguments
from hf_dpzo.io.figures import show_figures
from hf_dpzo.methods.method import Method
from hf_dpzo.recipe.flags import name_flag
from hf_dpzo.recipe.loading import load_rows, load_tokenizer
from hf_dpzo.recipe.recipe import AS_WRITTEN, Recipe, parse_recipe, read_recipe
from hf_dpzo.recipe.run import build_trainer
from hf_dpzo.recipe.shipped import locate_recipe
from hf_dpzo.recipe.spelling import UnreadableYAMLError, read_yaml
from hf_dpzo.recipe.tables import refuse_missing_files
from hf_dpzo.trainer.trainer import ZOTrainer
from hf_dpzo.trainer.tuning import CLIP_SHARE, RateFound, SmoothingFound, Tuner, list_public_rows


# Fields that choose among private rows, and do not go with another file.
OF_PRIVATE_ROWS = (
    "where",
    "eval_rows",
    "eval_share",
    "train_share",
    "eval_split",
    "eval_data",
    "train_split",
    "data_config",
    "privacy_unit_column",
    "max_rows_per_unit",
    "canaries",
    "earlier_runs",
)


# The number of rows to measure: of a head on features, whose rows are read once, more.
MEASURED_ROWS, MEASURED_FEATURES = 16, 128


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A number of a recipe, and why.

    Args:
        name: the field.
        value: the proposed value.
        reason: what was measured, in a line.
    """

    name: str
    value: float
    reason: str


def tune(path: str | Path, flags: Sequence[str] = (), *, public: str | None = None) -> list[Proposal]:
    """Return proposals for the smoothing, the clip norm and the learning rate of a recipe, by public rows.

    No private row is looked at: the private rows' number alone decides how much noise the public runs have.

    Args:
        path: the path of the recipe.
        flags: flags that replace its fields.
        public: a file of public rows in the recipe's format; `None` for public evaluation rows, or for made-up ones.

    Raises:
        ValueError: the recipe would be refused, or its losses do not change along any direction.
    """
    recipe, args = read_recipe(path, flags)
    refuse_missing_files(recipe, public=public)
    with tempfile.TemporaryDirectory() as folder:
        tuner, told = _build_tuner(recipe, args, public, Path(folder) / "run")
        return list(_propose(tuner, told))


def _build_tuner(recipe: Recipe, args: ZOTrainingArguments, public: str | None, folder: Path) -> tuple[Tuner, str]:
    """Return what measures, and what the rows are by which it does."""
    if public is None:
        trainer = _rehearse(recipe, args, folder)
        method, budget, units = trainer.method, trainer.budget, trainer._num_units
        rows, told = trainer._list_timed_rows(_count_rows(trainer))
    else:
        private, _ = load_rows(recipe, load_tokenizer(recipe), kept_column=args.privacy_unit_column)
        units = len(args.build_units(private))
        method, budget = args.plan(units)
        trainer = _rehearse(*_replace_rows(recipe, public, method), folder)
        rows = list_public_rows(trainer, _count_rows(trainer))
        told = f"rows of {Path(public).name}"
    parts = {"method": method, "sampling_rate": args.sampling_rate(units), "planned_steps": budget.planned_steps}
    return Tuner(trainer=trainer, rows=rows, **parts), f"{len(rows)} {told}"


def _count_rows(trainer: ZOTrainer) -> int:
    return MEASURED_ROWS if trainer._table is None else MEASURED_FEATURES


def _replace_rows(recipe: Recipe, public: str, method: Method) -> tuple[Recipe, ZOTrainingArguments]:
    """Return the recipe and its arguments for the rows of the file `public`, all of them in each step."""
    kept, drops = [], False
    for argument in recipe.flags:
        name = name_flag(argument)
        drops = name in OF_PRIVATE_ROWS if name is not None else drops
        if not drops:
            kept.append(argument)
    return parse_recipe({}, [*kept, "--data", public, "--expected_batch_size", "all"], is_complete=True)


def _rehearse(recipe: Recipe, args: ZOTrainingArguments, folder: Path) -> ZOTrainer:
    args.output_dir, args.report_to, args.push_to_hub, args.push_trajectory = str(folder), [], False, False
    trainer = build_trainer(recipe, args)
    refusal = trainer.rehearse()
    if refusal is not None:
        raise ValueError(refusal)
    return trainer


def _propose(tuner: Tuner, told: str) -> Iterator[Proposal]:
    found = tuner.find_smoothing()
    yield Proposal(name="smoothing", value=found.smoothing, reason=f"{_explain_smoothing(found)}, by {told}")
    spread = tuner.measure_spread(found.smoothing)
    clip_norm = None
    if spread:
        clip_norm = float(f"{CLIP_SHARE * spread:.2g}")
        reason = f"half of {show_figures(spread)}, the spread of what it bounds in a row, by {told}"
        yield Proposal(name="clip_norm", value=clip_norm, reason=reason)
    rate = tuner.find_rate(found.smoothing, clip_norm)
    yield Proposal(name="learning_rate", value=rate.rate, reason=f"{_explain_rate(rate)}, by {told}")


def _explain_smoothing(found: SmoothingFound) -> str:
    change = found.changes[found.smoothing]
    larger = next((smoothing for smoothing in found.changes if smoothing > found.smoothing), None)
    beyond = "" if larger is None else f", and from there to {larger:g} by {found.changes[larger]:.1%}"
    return f"from a third of it, quotients of losses change by {change:.1%}{beyond}"


def _explain_rate(found: RateFound) -> str:
    after = ", ".join(f"{rate:g}: {loss:.4g}" for rate, loss in found.losses.items())
    runs = f"the loss is {found.before:.4g}, and after {found.steps} steps with the noise of this run {after}"
    if found.rate == found.best:
        return runs
    return f"{runs}; at {found.rate:g} the noise of the whole run goes as far as at {found.best:g} that of these steps"


def write_proposals(path: str | Path, flags: Sequence[str], proposals: Sequence[Proposal]) -> str:
    """Return the text of the recipe at `path` with what `flags` replace in it, and with `proposals` and their reasons.

    Its other lines stay as they are, with their comments, if each field that changes has a line of its own.
    """
    text = locate_recipe(path).read_text(encoding="utf-8")
    values = _apply_flags(read_yaml(text, as_written=AS_WRITTEN), read_recipe(path, flags), flags)
    values |= {one.name: one.value for one in proposals}
    reasons = {one.name: one.reason for one in proposals}
    edited = text
    for name in dict.fromkeys([*map(name_flag, flags), *reasons]):
        if name in values:
            edited = _replace_line(edited, _write_field(name, values[name], reasons.get(name)), name)
    try:
        is_right = read_yaml(edited, as_written=AS_WRITTEN) == values
    except UnreadableYAMLError:
        is_right = False
    return edited if is_right else "".join(f"{_write_field(*one, reasons.get(one[0]))}\n" for one in values.items())


def _apply_flags(values: dict[str, Any], parsed: tuple[Recipe, ZOTrainingArguments], flags: Sequence[str]) -> dict:
    """Return the fields of a recipe after `flags`, from which it was `parsed`, were applied."""
    given = {name for name in map(name_flag, flags) if name not in (None, "without")}
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--without", default="")
    dropped = parser.parse_known_args(flags)[0].without.split(",")
    kept = {name: value for name, value in values.items() if name not in dropped}
    recipe, args = parsed
    return kept | {name: getattr(recipe if name in vars(recipe) else args, name) for name in sorted(given)}


def _write_field(name: str, value: Any, reason: str | None = None) -> str:
    """Return a line of YAML, with `reason` as a comment.

    >>> _write_field("clip_norm", 0.5, "half of 1")
    'clip_norm: 0.5 # half of 1'
    """
    written = yaml.safe_dump({name: value}, default_flow_style=True, width=10_000, allow_unicode=True)
    return f"{written.strip()[1:-1]}{'' if reason is None else f' # {reason}'}"


def _replace_line(text: str, line: str, name: str) -> str:
    """Return YAML with `line` in the place of the one of the field `name`, or at the end if it has none."""
    replaced, count = re.subn(rf"(?m)^{name}[ \t]*:.*$", lambda _: line, text)
    return replaced if count else f"{text.rstrip()}\n{line}\n"
