"""The guarantee, written beside the log: `privacy.json` for machines, `README.md` for people, a picture, the recipe.

The card is a function of `privacy.json`, of the names of the files beside it, and of this version's template. So a
reader who has these can write it again.
"""

import json
import re
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_dpzo.card.declarations import Declarations
from hf_dpzo.card.files import CARD_FILE, RECIPE_FILE, STATEMENT_FILE, is_weights_file
from hf_dpzo.card.front_matter import CardError, list_tags, parse_card, select_metadata
from hf_dpzo.card.parts import describe_parts
from hf_dpzo.card.schema import check_statement
from hf_dpzo.card.statement import build_statement
from hf_dpzo.card.use import delete_recipe, format_recipe, format_use
from hf_dpzo.io.files import read_plain, replace_all
from hf_dpzo.methods import METHODS
from hf_dpzo.plots import PICTURE_FILE, draw_training
from hf_dpzo.privacy.rounding import round_up


TAGS = ("zeroth-order", "hf-dpzo")


# A run without noise does not get it, so that a search for private models does not find it.
PRIVATE_TAG = "differential-privacy"


PRIVATE_TAGS = (PRIVATE_TAG, *TAGS)


TEMPLATE = Path(__file__).parent.parent / "templates" / "model_card.md"


PICTURE_ALT_TEXT = "epsilon over the steps, and what was measured on public data"


# Metadata that follow from the statement. Others, such as a license, stay as the user set them.
_OWN_METADATA = {"base_model", "library_name", "pipeline_tag", "model_name", "model-index", "differential_privacy"}


def write_card(
    folder: str | Path,
    declarations: Declarations,
    metadata: Mapping[str, Any] | None = None,
    *,
    pictured: bool = True,
    durably: bool = True,
) -> None:
    """Write `privacy.json`, `README.md` and, with matplotlib, a picture into `folder`.

    Args:
        folder: the folder of the log, and of its weights, if there are any.
        declarations: facts that the log cannot tell.
        metadata: metadata for the head of the card, such as a license.
        pictured: whether to draw the picture, which takes many times as long as the rest. An old picture is deleted in
            either case.
        durably: whether to wait until everything but the picture is on disk.
    """
    folder = Path(folder)
    statement = check_statement(build_statement(folder, declarations))
    picture = draw_training(statement) if pictured else None
    (folder / PICTURE_FILE).unlink(missing_ok=True)
    if picture is not None:
        replace_all({folder / PICTURE_FILE: picture}, durably=False)
    files = {path.name for path in folder.iterdir()}
    data = {
        STATEMENT_FILE: f"{json.dumps(statement, indent=2, allow_nan=False)}\n".encode(),
        CARD_FILE: str(render_card(statement, files, metadata)).encode(),
    }
    if "recipe" in statement["training"]:
        data[RECIPE_FILE] = format_recipe(statement).encode()
    else:
        delete_recipe(folder)
    replace_all({folder / name: content for name, content in data.items()}, durably=durably)


def render_card(
    statement: Mapping[str, Any], files: Collection[str], metadata: Mapping[str, Any] | None = None
) -> ModelCard:
    """Render the card of `statement`.

    Args:
        statement: the content of `privacy.json`.
        files: the names of the files beside the card. They tell whether there are weights and a picture.
        metadata: metadata for the head of the card, such as a license.
    """
    name = statement["reproducibility"]["base_model"]["name"].split("/")[-1] or "Model"
    title = f"{name}, fine-tuned by {statement['mechanism']['method']}"
    holds_weights = any(is_weights_file(name) for name in files)
    text = _template().render(
        card_data=build_card_data(statement, title, metadata or {}).to_yaml(),
        statement=sanitize_text(statement),
        title=sanitize_text(title),
        citation=METHODS[statement["mechanism"]["method"]].paper.citation,
        repository=sanitize_text(statement["reproducibility"]["repository"]) or "FOLDER_OR_REPOSITORY",
        holds_weights=holds_weights,
        picture=PICTURE_FILE if PICTURE_FILE in files else None,
        picture_alt=PICTURE_ALT_TEXT if statement["evaluation"]["history"] else "epsilon over the steps",
        percent=format_percent,
        parts=describe_parts(sanitize_text(statement.get("parts", []))),
        use=format_use(statement, holds_weights=holds_weights) if "recipe" in statement["training"] else None,
    )
    return ModelCard(text)


@cache
def _template() -> jinja2.Template:
    """Return the template, cached because compiling it takes longer than rendering it."""
    return jinja2.Template(TEMPLATE.read_text(encoding="utf-8"))


def format_percent(share: float) -> str:
    """Format `share`, an upper bound, in percent, rounded up so that it stays an upper bound.

    >>> format_percent(0.58314), format_percent(0.5)
    ('58.4 %', '50.0 %')
    """
    return f"{round_up(100 * share, digits=1):.1f} %"


def sanitize_text(value: Any) -> Any:
    """Return `value` with every string in it as one line of plain text, without markup that a stranger may have put in.

    >>> sanitize_text({"a": ["# **x** <b> | [y](z)", 2]})
    {'a': ['# x &lt;b> / [y] (z)', 2]}
    """
    if isinstance(value, Mapping):
        return {sanitize_text(name): sanitize_text(item) for name, item in value.items()}
    if isinstance(value, list):
        return [sanitize_text(item) for item in value]
    if not isinstance(value, str):
        return value
    line = " ".join("".join(character if character.isprintable() else " " for character in value).split())
    line = line.replace("**", "").replace("|", "/").replace("`", "'").replace("](", "] (")
    return re.sub(r"<(?=[a-zA-Z/!?])", "&lt;", line)


def build_card_data(statement: Mapping[str, Any], title: str, metadata: Mapping[str, Any]) -> ModelCardData:
    """Build the metadata that the Hub shows and searches."""
    private = statement["status"] == "differentially_private"
    training, base = statement["training"], statement["reproducibility"]["base_model"]
    own = PRIVATE_TAGS if private else TAGS
    data = ModelCardData(
        base_model=base["name"] if base["revision"] is not None else None,  # Only a model from the Hub has a revision.
        library_name="peft" if training["trained"] == "adapter" else "transformers",
        pipeline_tag=training["task"],
        # PEFT's tags with a colon name the base model, which base_model tells the Hub.
        tags=[*own, *(tag for tag in list_tags(metadata) if tag not in PRIVATE_TAGS and ":" not in tag)],
        model_name=title,
        eval_results=_build_eval_results(statement) or None,
        **{name: value for name, value in metadata.items() if name not in {*_OWN_METADATA, "tags"}},
    )
    if private:
        data.differential_privacy = summarize_claim(statement)
    return data


def summarize_claim(statement: Mapping[str, Any]) -> dict[str, Any]:
    """Return the claim, shortened for the head of the card."""
    claim = statement["claim"]
    pure = statement["accounting"]["epsilon_pure"]
    summary = {name: claim[name] for name in ("epsilon", "delta", "unit", "neighboring_relation")}
    return summary if pure is None else {**summary, "pure_epsilon": pure}


def _build_eval_results(statement: Mapping[str, Any]) -> list[EvalResult]:
    training = statement["training"]
    return [
        EvalResult(
            task_type=training["task"] or "other",
            dataset_type="evaluation-rows",
            dataset_name="evaluation rows",
            metric_type=name.removeprefix("eval_"),
            metric_name=name,
            metric_value=value,
        )
        for name, value in statement["evaluation"]["metrics"].items()
    ]


def read_metadata(folder: Path) -> dict[str, Any]:
    """Return the metadata at the head of the card in `folder`; empty if there is no card, or it cannot be read.

    Raises:
        LinkError: the card is a link.
    """
    try:
        text = read_plain(folder / CARD_FILE).decode()
        return select_metadata(parse_card(text).data.to_dict())
    except (OSError, UnicodeDecodeError, CardError):
        return {}
