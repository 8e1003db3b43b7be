"""The boundary around parsers of other libraries, which read what a stranger wrote and may raise anything."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_sentence(fault: str, error_class: type[ValueError], *passed: type[ValueError], remedy: str) -> Iterator[None]:
    r"""Turn every error inside into an `error_class` of one short sentence in ASCII.

    No list of exception types is complete: YAML alone raises six of them for a value that is not of the type it names.

    Args:
        fault: the beginning of the sentence, such as "README.md: its metadata cannot be read".
        error_class: the class to raise. An error of this class passes unchanged.
        passed: other classes of errors that pass unchanged, because they are such sentences already.
        remedy: what to do about it.

    >>> with one_sentence("README.md: it cannot be read", ValueError, remedy="take it anew"):
    ...     {}["a\n"]
    Traceback (most recent call last):
    ValueError: README.md: it cannot be read (KeyError: "'a\\n'"); take it anew.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (error_class, *passed)):
            raise
        raise error_class(f"{fault} ({describe_error(error)}); {remedy}.") from error


def describe_error(error: Exception, *, limit: int = 120) -> str:
    r"""Return an error's type and the first line of what it says, in printable ASCII.

    >>> describe_error(ValueError("x\x1b[2J\nsecond line"))
    "ValueError: 'x\\x1b[2J'"
    """
    try:
        line = next(iter(str(error).splitlines()), "")
    except Exception:  # An error of a stranger's making may not even say what it is.
        line = ""
    return f"{type(error).__name__}: {line[:limit]!a}"
