"""The names of the files that are published."""

from pathlib import Path

from hf_dpzo.trajectory.initial import INITIAL_FILE


CARD_FILE, STATEMENT_FILE = "README.md", "privacy.json"


# The suffixes of saved models, tokenizers and cards. No pickle has one, nor the state of a generator or a Trainer.
PUBLIC_SUFFIXES = {".jinja", ".json", ".md", ".model", ".png", ".safetensors", ".txt", ".zo"}


# The files of an earlier model: transformers would load them instead of the new ones, or beside them.
STALE_PATTERNS = ("*.safetensors*", "*.bin", "*.pt", "*.pth", "*.pkl", "*.h5", "*config.json")


def is_public_file(path: Path) -> bool:
    """Return whether a file may be published, by its suffix."""
    return path.is_file() and path.suffix in PUBLIC_SUFFIXES


CONFIG_FILES = ("config.json", "adapter_config.json")


def is_weights_file(name: str) -> bool:
    """Return whether a file of that name holds weights."""
    return name.endswith(".safetensors") and "/" not in name and name != INITIAL_FILE
