"""What one check of a verification found."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check found.

    Args:
        name: what was checked.
        holds: whether it is as it should be; `None` where that could not be told.
        detail: one sentence.
    """

    name: str
    holds: bool | None
    detail: str
