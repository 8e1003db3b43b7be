"""The names of the files that are published."""

from pathlib import Path

from hf_dpzo.trajectory.initial import INITIAL_FILE


CARD_FILE, STATEMENT_FILE = "README.md", "privacy.json"


# What saving a model, a tokenizer and a card makes. No pickle is among it, and no state of a generator or a Trainer.
PUBLIC_SUFFIXES = {".jinja", ".json", ".md", ".model", ".png", ".safetensors", ".txt", ".zo"}


# Of an earlier model: they would be loaded in place of these, or beside them.
STALE_PATTERNS = ("*.safetensors*", "*.bin", "*.pt", "*.pth", "*.pkl", "*.h5", "*config.json")


def is_public_file(path: Path) -> bool:
    """Whether a file may be published: it is one that saving makes."""
    return path.is_file() and path.suffix in PUBLIC_SUFFIXES


CONFIG_FILES = ("config.json", "adapter_config.json")


def is_weights_file(name: str) -> bool:
    """Whether a file of that name holds weights."""
    return name.endswith(".safetensors") and "/" not in name and name != INITIAL_FILE
