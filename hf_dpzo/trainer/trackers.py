"""Refuses a tracker that cannot report, before anything is loaded for it: stock builds each of them last."""

from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK


def refuse_missing_trackers(args: TrainingArguments) -> None:
    """Raise `ValueError` for a tracker in `report_to` that is not known, not installed, or cannot be built."""
    for name in args.report_to or ():
        reason = _find_reason(name)
        if reason is not None:
            raise ValueError(f"report_to={name}: {reason}; install it, name another tracker, or set report_to=none.")


def _find_reason(name: str) -> str | None:
    """Return why the tracker cannot be built, as stock would build it; `None` if it can."""
    if name not in INTEGRATION_TO_CALLBACK:
        return f"there is no such tracker, only {', '.join(sorted(INTEGRATION_TO_CALLBACK))}"
    try:
        (tracker,) = get_reporting_integration_callbacks([name])
        tracker()
    except Exception as error:  # Each raises what it likes.
        return " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return None
