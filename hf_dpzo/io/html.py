"""Tables that notebooks show."""

import html
from collections.abc import Iterable


def format_html_table(rows: Iterable[tuple[str, object]], *, caption: str) -> str:
    """Return `rows` of a name and a value as a table in HTML, with all text escaped.

    >>> format_html_table([("epsilon", "<2")], caption="Budget")
    '<table><caption>Budget</caption><tr><th>epsilon</th><td>&lt;2</td></tr></table>'
    """
    cells = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>" for name, value in rows)
    return f"<table><caption>{html.escape(caption)}</caption>{cells}</table>"
