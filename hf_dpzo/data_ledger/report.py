"""The report of a ledger for a data protection officer: one HTML file, without scripts, that prints on paper."""

import math
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from hf_dpzo._version import __version__
from hf_dpzo.card.model_card import format_percent
from hf_dpzo.data_ledger.pictures import draw_attack, draw_spending
from hf_dpzo.data_ledger.summary import Summary, UnitSummary
from hf_dpzo.data_ledger.total import Total
from hf_dpzo.io.files import write_atomically
from hf_dpzo.privacy.accounting import account_for_group
from hf_dpzo.privacy.rounding import round_up


TEMPLATE = Path(__file__).parent.parent / "templates" / "data_report.html"


# Numbers of rows of one person, if the unit is a row.
GROUPS = (2, 4)


def write_report(summary: Summary, path: Path) -> None:
    """Write the report of `summary` to `path`. Whatever its names hold is shown as text.

    With matplotlib it has pictures, which are part of the file.
    """
    write_atomically(path, render_report(summary, path).encode())


def render_report(summary: Summary, path: Path) -> str:
    """Return the report of `summary` as HTML, for a file at `path`."""
    return _template().render(
        summary=summary,
        units=[_describe_unit(unit, summary, path) for unit in summary.units],
        made_at=datetime.now(UTC).strftime("%d %B %Y, %H:%M UTC"),
        version=__version__,
    )


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {
        "epsilon": _show_epsilon,
        "percent": format_percent,
        "plain": _show_plainly,
        "short": _shorten,
    }
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def _describe_unit(unit: UnitSummary, summary: Summary, path: Path) -> dict[str, Any]:
    pictures = {"spending": None, "attack": None}
    if any(line.run.counts for line in unit.lines):
        pictures = _draw(unit, summary, path)
    return {"summary": unit, "groups": _list_groups(unit.total), **pictures}


def _draw(unit: UnitSummary, summary: Summary, path: Path) -> dict[str, Markup | None]:
    """Draw the pictures, which hold no text of a ledger but numbers; none without matplotlib."""
    total = unit.total
    try:
        spending = Markup(draw_spending(unit, summary.entries.budget, path))
        attack = None
        if math.isfinite(total.epsilon):
            attack = Markup(draw_attack([("with all that was released", total)], path))
    except ValueError:
        return {"spending": None, "attack": None}
    return {"spending": spending, "attack": attack}


def _list_groups(total: Total) -> list[tuple[int, float]]:
    if total.unit_column is not None or not math.isfinite(total.epsilon) or not total.releases:
        return []
    found = ((size, account_for_group(total.releases, size=size, delta=total.delta)) for size in GROUPS)
    return [(size, epsilon) for size, epsilon in found if math.isfinite(epsilon)]


def _show_epsilon(epsilon: float) -> str:
    """Format an epsilon, rounded up so that it stays an upper bound.

    >>> _show_epsilon(1.82791), _show_epsilon(math.inf)
    ('1.83', 'none holds')
    """
    return f"{round_up(epsilon, 2):g}" if math.isfinite(epsilon) else "none holds"


def _show_plainly(text: str) -> str:
    """Return `text` without characters that change how others are shown."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _shorten(folder: str) -> str:
    """Return the last two parts of a path.

    >>> _shorten("/home/team/models/notes")
    'models/notes'
    """
    return "/".join(folder.replace("\\", "/").strip("/").split("/")[-2:])
