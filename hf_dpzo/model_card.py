"""The guarantee, written down beside the log: `privacy.json` for machines, `README.md` for people, and a picture.

The card is a function of `privacy.json` and of what lies beside it, so whoever has these can write it again.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_dpzo.declared import Declared
from hf_dpzo.methods import METHODS
from hf_dpzo.schema import check_statement
from hf_dpzo.statement import privacy_statement
from hf_dpzo.training_picture import PICTURE_FILE, draw_training
from hf_dpzo.weights import is_weights


CARD_FILE, STATEMENT_FILE = "README.md", "privacy.json"
TAGS = ("zeroth-order", "hf-dpzo")
# Not for a run without noise, which must not be found by it.
PRIVATE_TAG = "differential-privacy"
PRIVATE_TAGS = (PRIVATE_TAG, *TAGS)
TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
PICTURE_IN_WORDS = "epsilon over the steps, and what was measured on public data"
# Metadata that follow from the statement. Any other, such as a license, stays as somebody set it.
_OWN = {"base_model", "datasets", "library_name", "pipeline_tag", "model_name", "model-index", "differential_privacy"}


def write_card(folder: str | Path, declared: Declared, metadata: Mapping[str, Any] | None = None) -> None:
    """Write `privacy.json`, `README.md` and, with matplotlib, a picture into `folder`, which holds the log.

    Args:
        folder: of the log, and of weights that belong to it, if there are any.
        declared: what the log can not tell.
        metadata: for the head of the card, such as a license; besides those that the card there has.
    """
    folder = Path(folder)
    statement = check_statement(privacy_statement(folder, declared))
    text = json.dumps(statement, indent=2, allow_nan=False)
    (folder / STATEMENT_FILE).write_text(f"{text}\n", encoding="utf-8")
    draw_training(statement, folder / PICTURE_FILE)
    kept = {**metadata_of(folder), **(metadata or {})}
    files = {path.name for path in folder.iterdir()}
    rendered(statement, files, kept).save(folder / CARD_FILE)


def rendered(
    statement: Mapping[str, Any], files: Collection[str], metadata: Mapping[str, Any] | None = None
) -> ModelCard:
    """Return the card that `statement` asks for, beside `files` that may be weights, or a picture."""
    name = statement["reproducibility"]["base_model"]["name"].split("/")[-1] or "Model"
    title = f"{name}, fine-tuned by {statement['mechanism']['method']}"
    return ModelCard.from_template(
        card_data(statement, title, metadata or {}),
        template_path=str(TEMPLATE),
        statement=statement,
        title=title,
        citation=METHODS[statement["mechanism"]["method"]].paper.citation,
        repository=statement["reproducibility"]["repository"] or "FOLDER_OR_REPOSITORY",
        holds_weights=any(is_weights(name) for name in files),
        picture=PICTURE_FILE if PICTURE_FILE in files else None,
        picture_alt=PICTURE_IN_WORDS,
    )


def card_data(statement: Mapping[str, Any], title: str, metadata: Mapping[str, Any]) -> ModelCardData:
    """Return the metadata that the Hub shows and searches."""
    private = statement["status"] == "differentially_private"
    training, base = statement["training"], statement["reproducibility"]["base_model"]
    own = PRIVATE_TAGS if private else TAGS
    data = ModelCardData(
        base_model=base["name"] if base["revision"] is not None else None,  # Which what came from the Hub has.
        datasets=[name for name in training["dataset"] if on_hub(name)] or None,
        library_name="peft" if training["trained"] == "adapter" else "transformers",
        pipeline_tag=training["task"],
        tags=[*own, *(tag for tag in metadata.get("tags") or () if tag not in PRIVATE_TAGS and ":" not in tag)],
        model_name=title,
        eval_results=_results(statement) or None,
        **{name: value for name, value in metadata.items() if name not in {*_OWN, "tags"}},
    )
    if private:
        data.differential_privacy = in_short(statement)
    return data


def in_short(statement: Mapping[str, Any]) -> dict[str, Any]:
    """The claim, for the head of the card."""
    claim, pure = statement["claim"], statement["accounting"]["epsilon_pure"]
    found = {name: claim[name] for name in ("epsilon", "delta", "unit", "neighboring_relation")}
    return found if pure is None else {**found, "pure_epsilon": pure}


def on_hub(name: str) -> bool:
    """Whether `name` could be of a repository on the Hub.

    >>> on_hub("org/name"), on_hub("package://name/file.csv"), on_hub("/a/folder")
    (True, False, False)
    """
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def _results(statement: Mapping[str, Any]) -> list[EvalResult]:
    training = statement["training"]
    data = training["dataset"][0].split("/")[-1] if training["dataset"] else "evaluation rows"
    return [
        EvalResult(
            task_type=training["task"] or "other",
            dataset_type=data,
            dataset_name=data,
            metric_type=name.removeprefix("eval_"),
            metric_name=name,
            metric_value=value,
        )
        for name, value in statement["evaluation"]["metrics"].items()
    ]


def metadata_of(folder: Path) -> dict[str, Any]:
    """The metadata at the head of the card in `folder`, if there is one."""
    path = folder / CARD_FILE
    return ModelCard.load(path).data.to_dict() if path.is_file() else {}
