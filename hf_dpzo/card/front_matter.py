"""The YAML at the head of a stranger's card, looked at before anything is made of it."""

from collections import Counter
from collections.abc import Iterator

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK


# A card's own takes one or two kilobytes, and four levels. PyYAML takes minutes for what is deep.
MAX_FRONT_MATTER_BYTES, MAX_FRONT_MATTER_DEPTH = 1 << 16, 20


def parse_card(text: str) -> ModelCard:
    r"""Return the card that `text` is, unless its head could be read in two ways, or unfolds into more than it is.

    >>> parse_card("---\nlicense: mit\n---\ntext").data.license
    'mit'
    >>> parse_card("---\nlicense: mit\nlicense: other\n---\ntext")
    Traceback (most recent call last):
    ValueError: README.md: its metadata have license twice, of which readers take different ones; remove one.
    """
    found = REGEX_YAML_BLOCK.search(text)
    if found is None:
        raise ValueError("README.md: it has no metadata at its head; take it anew.")
    block = found.group(2)
    if len(block) > MAX_FRONT_MATTER_BYTES:
        raise ValueError(
            f"README.md: its metadata have {len(block)} bytes, and may have {MAX_FRONT_MATTER_BYTES}; shorten them."
        )
    try:
        _check_events(yaml.parse(block, Loader=yaml.SafeLoader))
        _refuse_duplicate_names(yaml.compose(block, Loader=yaml.SafeLoader))
        return ModelCard(text)
    except (yaml.YAMLError, TypeError) as error:
        raise ValueError(f"README.md: its metadata are no YAML ({' '.join(str(error).split()):.100}).") from None


def _check_events(events: Iterator[yaml.Event]) -> None:
    depth = 0
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("README.md: its metadata refer to other parts of themselves; write them out.")
        starts = isinstance(event, yaml.SequenceStartEvent | yaml.MappingStartEvent)
        depth += starts - isinstance(event, yaml.SequenceEndEvent | yaml.MappingEndEvent)
        if depth > MAX_FRONT_MATTER_DEPTH:
            raise ValueError(f"README.md: its metadata have more than {MAX_FRONT_MATTER_DEPTH} levels; flatten them.")


def _refuse_duplicate_names(node: yaml.Node | None) -> None:
    if isinstance(node, yaml.SequenceNode):
        for one in node.value:
            _refuse_duplicate_names(one)
    if isinstance(node, yaml.MappingNode):
        names = [str(key.value) for key, _ in node.value]
        twice = next((name for name, count in Counter(names).items() if count > 1), None)
        if twice is not None:
            raise ValueError(
                f"README.md: its metadata have {twice:.50} twice, of which readers take different ones; remove one."
            )
        for _, value in node.value:
            _refuse_duplicate_names(value)
