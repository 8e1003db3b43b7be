"""The result of one check of a verification."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of one check.

    Args:
        name: the name of what was checked.
        holds: whether it is as it should be; `None` where the check could not decide.
        detail: one sentence that says what was found.
    """

    name: str
    holds: bool | None
    detail: str
