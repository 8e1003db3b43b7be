"""What the folder of a merged or exported model says of itself: its promise, its base model, and how it is opened."""

import json
from pathlib import Path
from typing import Any

import yaml

from hf_dpzo.card.files import CARD_FILE, RECIPE_FILE
from hf_dpzo.card.opening import OPENED_TASKS, Opening, format_opening
from hf_dpzo.card.use import RECIPE_SCHEMA, name_publicly
from hf_dpzo.io.files import replace_all
from hf_dpzo.models.history import get_origin
from hf_dpzo.recipe.recipe import Recipe
from hf_dpzo.recipe.saved import describe_use
from hf_dpzo.use.model import TrainedModel


# What stands for the folder in the code that opens it, wherever it will lie.
PLACE = "FOLDER_OR_REPOSITORY"


# A claim in a sentence. What it rests on is in the card of the run.
_PROMISE = (
    "It was trained by a run whose card states ({epsilon}, {delta})-differential privacy. Nothing else was done with "
    "the training data, so the same holds for it. The card, and the log by which it is checked, are published with the "
    "run itself."
)


def describe_folder(
    trained: TrainedModel, folder: Path, *, how: str, library: str, opening: Opening | None, note: str = ""
) -> None:
    """Write into `folder` what the model promises, what its base model is, and how it is opened.

    Args:
        trained: the model that was saved there.
        folder: the folder.
        how: what became of the model, in words.
        library: the library that opens it, by its name on the Hub.
        opening: how that library opens a model that writes; `None` for another one.
        note: what else a user has to know, in sentences.
    """
    origin, recipe = get_origin(trained.model), trained.recipe
    claim = None if origin is None else origin[1]
    promise = "The run that trained it states no guarantee." if claim is None else _PROMISE.format(**claim)
    data: dict[str, Any] = {"library_name": library}
    parts = [f"# A model {how}", promise]
    files = {}
    if recipe is not None:
        if recipe.model_revision is not None:
            data["base_model"] = recipe.model_name_or_path
        parts.append(f"Its base model is `{_name_base(recipe)}`. `{RECIPE_FILE}` says what it reads and answers.")
        used = {"schema": RECIPE_SCHEMA, **describe_use(recipe, trained.tokenizer)}
        files[RECIPE_FILE] = f"{json.dumps(used, indent=2)}\n".encode()
        # Which prompts activate an adapter is said in the card of its run.
        if opening is not None and recipe.task in OPENED_TASKS and recipe.adapter != "activated-lora":
            data["pipeline_tag"] = "text-generation"
            code = format_opening(opening, place=PLACE, task=recipe.task)
            parts.append(f"## Use it\n\n```python\n{code}\n```")
    parts += [note] if note else []
    text = "\n\n".join([f"---\n{yaml.safe_dump(data)}---", *parts])
    files[CARD_FILE] = f"{text}\n".encode()
    replace_all({folder / name: content for name, content in files.items()})


def _name_base(recipe: Recipe) -> str:
    """Return the name of the base model; of a folder of this machine its last part alone."""
    name = name_publicly(recipe.model_name_or_path, recipe.model_revision)
    revision = "" if recipe.model_revision is None else f" ({recipe.model_revision})"
    return "/".join(filter(None, (name, recipe.gguf_file))) + revision
