"""What libraries warn of though whoever runs a command can do nothing about it."""

import logging
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


# What stock logs in each run with a chat model's tokenizer.
_TOKENIZER_LOGGER, _TOKENIZER_MESSAGE = "transformers.trainer_utils", "The tokenizer has new PAD/BOS/EOS tokens"


@contextmanager
def quiet_warnings() -> Iterator[None]:
    """Ignore these warnings inside the context, and no others."""
    logger = logging.getLogger(_TOKENIZER_LOGGER)
    with warnings.catch_warnings():
        for message, kind in _USELESS:
            warnings.filterwarnings("ignore", message=message, category=kind)
        logger.addFilter(_is_useful)
        try:
            yield
        finally:
            logger.removeFilter(_is_useful)


def _is_useful(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_TOKENIZER_MESSAGE)
