"""What the Hub refuses or does not answer, in one sentence, and whether this user may write there."""

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx


# What the client raises of its own. Some of these are neither `ValueError` nor `OSError`.
HUB_ERRORS = (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, httpx.HTTPError)


_UNAUTHORIZED, _FORBIDDEN, _MISSING = 401, 403, 404


def explain_hub_error(error: Exception, *, writes: bool = True) -> str:
    """Return the reason and the remedy of one of `HUB_ERRORS`, as the end of a sentence.

    Args:
        error: the error.
        writes: whether it was to write; otherwise it was to read.

    >>> explain_hub_error(httpx.ConnectError("[Errno -2] Name or service not known"))
    'the Hub cannot be reached (ConnectError); check the network, and try again'
    """
    status = find_status(error)
    may = "run hf auth login, or name a repository and a branch that you may write to"
    if not writes:
        may = "check the name, or run hf auth login if it asks for that"
    if isinstance(error, HFValidationError):
        return "it is no name of a repository; name user/model"
    if isinstance(error, LocalTokenNotFoundError):
        return f"there is no access token of the Hub; {may}"
    if status is None:
        return f"the Hub cannot be reached ({type(error).__name__}); check the network, and try again"
    if status == _UNAUTHORIZED:
        return f"the Hub does not take this token; {may}"
    if status == _FORBIDDEN:
        return f"this token may not {'write there' if writes else 'read it'}; {may}"
    if status == _MISSING:
        return f"the Hub shows no such repository; {may}"
    return f"{next(iter(str(error).splitlines()), type(error).__name__).strip().rstrip('.')}; {may}"


def find_status(error: Exception) -> int | None:
    """Return the status by which the Hub answered; `None` if it did not."""
    return getattr(getattr(error, "response", None), "status_code", None)


def refuse_token() -> None:
    """Raise `ValueError` unless the Hub can be reached, and takes the token of this user for writing.

    Nothing is written. A token with rights to single repositories is taken: whether they suffice shows when a
    repository is opened.
    """
    if get_token() is None:
        raise ValueError("push_to_hub=True: there is no access token of the Hub; run hf auth login, or set HF_TOKEN.")
    try:
        user = HfApi().whoami()
    except HUB_ERRORS as error:
        if find_status(error) not in (None, _UNAUTHORIZED):  # It may write to a repository, and not say whose it is.
            return
        fault = explain_hub_error(error)
    else:
        if user.get("auth", {}).get("accessToken", {}).get("role") != "read":
            return
        fault = "this token may only read; run hf auth login with one that may write"
    raise ValueError(f"push_to_hub=True: {fault}, or set push_to_hub=False and publish later by hf-dpzo push-log.")


def open_repository(name: str, *, private: bool | None) -> str:
    """Return the full name of a repository to push to, which is made if it is not there, as stock makes it.

    Raises:
        ValueError: the Hub cannot be reached, or does not allow it.
    """
    try:
        return HfApi().create_repo(name, private=private, exist_ok=True).repo_id
    except HUB_ERRORS as error:
        fault = explain_hub_error(error)
    raise ValueError(f"hub_model_id={name}: {fault}.")
