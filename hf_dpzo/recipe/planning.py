"""Plans the run of a recipe: what it will promise, cost and take, before any private row is looked at."""

import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hf_dpzo.arguments.training_args import ZOTrainingArguments
from hf_dpzo.recipe.obstacles import list_obstacles
from hf_dpzo.recipe.recipe import Recipe, parse_recipe, read_recipe
from hf_dpzo.recipe.run import build_trainer
from hf_dpzo.trainer.trainer import ZOTrainer
from hf_dpzo.trainer.training_plan import TrainingPlan


# Libraries without which a run is slower or shows less, and what they are for.
USEFUL = {
    "numba": "parameters move several times as fast with it: pip install 'hf_dpzo[fast]'",
    "matplotlib": "cards show the run in a picture with it: pip install 'hf_dpzo[picture]'",
}


def plan(run: str | Path | Mapping[str, Any] | ZOTrainer, flags: Sequence[str] = ()) -> TrainingPlan:
    """Plan a run: what it will promise, cost and take, and what of it would be refused.

    The number of private rows is public. Nothing else of them shows in the plan. Seconds and memory are measured, on
    public rows where the evaluation data are public, and otherwise on made-up ones.

    Args:
        run: the path of a recipe, a mapping of its fields, or a trainer.
        flags: for a recipe, flags that replace its fields, such as `("--max_steps", "10")`.

    Raises:
        ValueError: the recipe is mistaken, or its model or its rows cannot be loaded.
    """
    if isinstance(run, ZOTrainer):
        return _add_missing(run.plan())
    recipe, args = parse_recipe(run, flags) if isinstance(run, Mapping) else read_recipe(run, flags)
    return plan_recipe(recipe, args)


def plan_recipe(recipe: Recipe, args: ZOTrainingArguments) -> TrainingPlan:
    """Plan the run of a recipe; see `plan`."""
    obstacles = tuple(list_obstacles(recipe, args))
    started = time.perf_counter()
    # A plan reports to no tracker, and makes no repository.
    args.report_to, args.push_to_hub, args.push_trajectory = [], False, False
    with _leaving_no_folder(Path(args.output_dir)):
        try:
            trainer = build_trainer(recipe, args)
        except (ImportError, OSError, RuntimeError, ValueError):
            if obstacles:
                raise ValueError(obstacles[0]) from None
            raise
        loading = time.perf_counter() - started
        planned = trainer.plan()
    found = (*obstacles, *planned.refusals)
    return _add_missing(replace(planned, refusals=found, seconds_before=planned.seconds_before + loading))


@contextmanager
def _leaving_no_folder(folder: Path) -> Iterator[None]:
    """Remove `folder`, and those above it, that were not there: stock makes them where a trainer is built.

    Also if the process is told to end, as by a scheduler or a closed terminal's kill.
    """
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    before = None
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
        for place in new:
            with suppress(OSError):  # It was not made, or something else is in it.
                place.rmdir()


def _add_missing(planned: TrainingPlan) -> TrainingPlan:
    missing = tuple(f"{name}: {use}" for name, use in USEFUL.items() if find_spec(name) is None)
    return replace(planned, missing=(*planned.missing, *missing))
