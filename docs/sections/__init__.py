"""The parts of the reference pages that are made from the code when the site is built.

A page says `<!-- generated: NAME -->` where a part belongs, which nobody sees where the page is read without the site.
"""

import re
from collections.abc import Callable

from sections.api import build_api
from sections.cli import build_cli
from sections.fields import build_added_arguments, build_inherited_arguments, build_recipe_fields, build_refusals
from sections.log_format import build_log_format
from sections.schemas import build_header_schema, build_parts_schema, build_privacy_schema


SECTIONS: dict[str, Callable[[], str]] = {
    "api": build_api,
    "cli": build_cli,
    "recipe fields": build_recipe_fields,
    "added arguments": build_added_arguments,
    "refused arguments": build_refusals,
    "inherited arguments": build_inherited_arguments,
    "log format": build_log_format,
    "log header": build_header_schema,
    "parts": build_parts_schema,
    "privacy.json": build_privacy_schema,
}


def fill(page: str) -> str:
    """Return `page` with the parts that are made from the code.

    Raises:
        KeyError: it asks for a part that nothing makes.
    """
    return re.sub(r"^<!-- generated: (.+) -->$", lambda match: SECTIONS[match[1]](), page, flags=re.MULTILINE)
