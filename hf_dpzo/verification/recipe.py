"""Checks that the recipe beside a model is the one of its log: how a row is written, and what an answer stands for."""

from collections.abc import Mapping
from typing import Any

from hf_dpzo.card.files import RECIPE_FILE
from hf_dpzo.card.sources import Source, SourceError
from hf_dpzo.card.use import CHAT_TEMPLATE_FILE, describe_file_content, fingerprint_text
from hf_dpzo.io.strict_json import compare_json
from hf_dpzo.verification.finding import Finding


def check_recipe(source: Source, expected: Mapping[str, Any]) -> Finding:
    """Compare the recipe's file, and the chat template, with what the log says.

    Args:
        source: the published files.
        expected: the statement that the log leads to, which holds the recipe.
    """
    try:
        content = source.read_json(RECIPE_FILE)
        lines = compare_json(content, describe_file_content(expected))
        wanted = expected["training"]["recipe"].get("chat_template")
        if wanted is not None and CHAT_TEMPLATE_FILE in source.sizes:
            there = fingerprint_text(source.read_text(CHAT_TEMPLATE_FILE))
            lines += compare_json(there, wanted, f"{CHAT_TEMPLATE_FILE} (its SHA-256)")
    except SourceError as error:
        return Finding(name="recipe", holds=False, detail=f"{error!s:.200}")
    if lines:
        detail = f"{RECIPE_FILE} (there) is not what the log says (here): {'; '.join(lines[:3])}"
        return Finding(name="recipe", holds=False, detail=detail)
    return Finding(name="recipe", holds=True, detail="the model is used as the log says that it was trained")
