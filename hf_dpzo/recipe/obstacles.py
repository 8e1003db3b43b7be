"""What is in the way of a recipe's run and can be seen before its model is loaded, which may take minutes."""

from collections.abc import Callable, Iterator
from pathlib import Path

from transformers.utils import is_gguf_available

from hf_dpzo.arguments.training_args import ZOTrainingArguments
from hf_dpzo.models.hub import open_repository, refuse_token
from hf_dpzo.models.precision import build_loading_options
from hf_dpzo.recipe.recipe import Recipe
from hf_dpzo.trainer.trackers import refuse_missing_trackers
from hf_dpzo.trajectory.earlier_runs import read_earlier_runs
from hf_dpzo.trajectory.finding import refuse_folder


def list_obstacles(recipe: Recipe, args: ZOTrainingArguments) -> list[str]:
    """Return one sentence for each thing that is in the way: an occupied folder, a missing tracker, library or token.

    Nothing is written, and neither model nor rows are read.
    """
    return [str(error) for check in _list_checks(recipe, args) if (error := _try(check)) is not None]


def refuse_obstacles(recipe: Recipe, args: ZOTrainingArguments) -> None:
    """Raise the error of the first thing that is in the way of the run; see `list_obstacles`."""
    for check in _list_checks(recipe, args):
        check()


def open_hub_repository(args: ZOTrainingArguments) -> None:
    """Open, as stock does it only after the model is loaded, the repository that the run pushes to, if it pushes.

    Raises:
        ValueError: the Hub cannot be reached, or does not allow it.
    """
    if args.push_to_hub and args.process_index == 0:
        name = args.hub_model_id or Path(args.output_dir).absolute().name
        open_repository(name, private=args.hub_private_repo)


def parse_resume_flag(flag: str | None) -> str | bool:
    """Return the path to resume from, or whether to resume, as the scripts of `transformers` read this flag.

    >>> parse_resume_flag(None), parse_resume_flag("True"), parse_resume_flag("out/checkpoint-5")
    (False, True, 'out/checkpoint-5')
    """
    return {"none": False, "false": False, "true": True}.get(str(flag).lower(), flag)


def _list_checks(recipe: Recipe, args: ZOTrainingArguments) -> Iterator[Callable[[], object]]:
    yield lambda: refuse_folder(Path(args.output_dir), parse_resume_flag(args.resume_from_checkpoint))
    yield lambda: refuse_missing_trackers(args)
    yield lambda: args.push_to_hub and refuse_token()
    yield lambda: refuse_missing_libraries(recipe)
    yield lambda: read_earlier_runs(args.earlier_runs or (), unit_column=args.privacy_unit_column)


def refuse_missing_libraries(recipe: Recipe) -> None:
    """Raise `ValueError` if a library is missing that reads the recipe's base model, before stock says so at length."""
    build_loading_options(recipe.dtype, recipe.quantization)
    if recipe.gguf_file is not None and not is_gguf_available():
        raise ValueError(
            f"gguf_file={recipe.gguf_file}: reading it needs gguf, which is missing or too old; pip install "
            "'hf_dpzo[demo]', or name a model in safetensors."
        )


def _try(check: Callable[[], object]) -> Exception | None:
    try:
        check()
    except (OSError, ValueError) as error:
        return error
    return None
