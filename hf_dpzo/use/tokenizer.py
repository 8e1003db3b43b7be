"""The tokenizer beside a published model, read without trust in its files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_dpzo.card.sources import LocalFolder, Source, SourceError
from hf_dpzo.card.use import CHAT_TEMPLATE_FILE
from hf_dpzo.io.files import refuse_links
from hf_dpzo.io.foreign import one_sentence


TOKENIZER_CONFIG_FILE = "tokenizer_config.json"


# Files that tokenizers of transformers are read from; others are not looked at.
TOKENIZER_FILES = (
    "tokenizer.json",
    TOKENIZER_CONFIG_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "target.spm",
    CHAT_TEMPLATE_FILE,
)


# The largest file of a tokenizer, in bytes: ten times the largest that is known.
MAX_TOKENIZER_BYTES = 1 << 28


# The arguments of a tokenizer that lead to code.
_CODE = ("auto_map", "custom_pipelines")


def holds_tokenizer(source: Source) -> bool:
    """Return whether a tokenizer was published beside the model."""
    return TOKENIZER_CONFIG_FILE in source.sizes


def load_published_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """Load the tokenizer beside a model.

    Guarantee: no code of the repository runs, and no file but those of the tokenizer beside the model is opened.

    Raises:
        SourceError: it names code or another file, or it cannot be read.
    """
    names = [name for name in TOKENIZER_FILES if name in source.sizes]
    folder = source.fetch(dict.fromkeys(names, MAX_TOKENIZER_BYTES))
    if isinstance(source, LocalFolder):
        refuse_links(*(folder / name for name in names))
    _refuse_strange_settings(source.read_json(TOKENIZER_CONFIG_FILE))
    with one_sentence(f"{TOKENIZER_CONFIG_FILE}: the tokenizer cannot be read", SourceError, remedy="take it anew"):
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)


def _refuse_strange_settings(settings: Any) -> None:
    """Raise `SourceError` for settings that name code, or a file: transformers would open it, wherever it is."""
    if not isinstance(settings, Mapping):
        raise SourceError(f"{TOKENIZER_CONFIG_FILE}: it holds no settings; take it anew.")
    for name, value in settings.items():
        if name in _CODE and value:
            raise SourceError(f"{TOKENIZER_CONFIG_FILE}: {name} names code, and none is run; remove it.")
        names_file = name.endswith(("_file", "_path")) and name != "name_or_path"
        if value and (names_file or (isinstance(value, str) and Path(value).is_absolute() and Path(value).exists())):
            raise SourceError(
                f"{TOKENIZER_CONFIG_FILE}: {name[:100]!a} names a file, and only those beside it are opened; remove it."
            )
