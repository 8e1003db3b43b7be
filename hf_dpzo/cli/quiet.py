"""What libraries warn of though whoever runs a command can do nothing about it."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


# Beginnings of messages, as regular expressions, and their kinds. Each goes when the library no longer says it.
_USELESS = (
    # PEFT asks a model of transformers for a name that is going away.
    ("`is_gradient_checkpointing` is deprecated", FutureWarning),
    # PEFT looks for the vocabulary of a base that is named by package://, or that is not on the Hub.
    ("Could not find a config file in .* - will assume that the vocabulary was not modified", UserWarning),
)


@contextmanager
def quiet_warnings() -> Iterator[None]:
    """Ignore these warnings inside the context, and no others."""
    with warnings.catch_warnings():
        for message, kind in _USELESS:
            warnings.filterwarnings("ignore", message=message, category=kind)
        yield
