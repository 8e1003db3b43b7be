"""The names of the files that are published."""

import re
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_dpzo.trajectory.initial import INITIAL_FILE
from hf_dpzo.trajectory.log import LOG_FILE
from hf_dpzo.trajectory.parts import PARTS_FILE


CARD_FILE, STATEMENT_FILE = "README.md", "privacy.json"


# What the model needs to be used, as the log has it, for people and programs that read no log.
RECIPE_FILE = "recipe.json"


# What is read of a run's folder to publish it, or to write its card anew.
READ_FILES = (LOG_FILE, INITIAL_FILE, PARTS_FILE, STATEMENT_FILE, CARD_FILE)


# The suffixes of saved models, tokenizers and cards. No pickle has one, nor the state of a generator or a Trainer.
PUBLIC_SUFFIXES = {".jinja", ".json", ".md", ".model", ".png", ".safetensors", ".txt", ".zo"}


# The files of an earlier model: transformers would load them instead of the new ones, or beside them, and the parts of
# another run are none of this one's.
STALE_PATTERNS = ("*.safetensors*", "*.bin", "*.pt", "*.pth", "*.pkl", "*.h5", "*config.json", PARTS_FILE, RECIPE_FILE)


def is_public_file(path: Path) -> bool:
    """Return whether a file may be published, by its suffix. A link may not, because it may lead to any file."""
    return path.is_file() and not path.is_symlink() and path.suffix in PUBLIC_SUFFIXES


MODEL_CONFIG_FILE, ADAPTER_CONFIG_FILE = CONFIG_FILES = ("config.json", "adapter_config.json")


def is_weights_file(name: str) -> bool:
    """Return whether a file of that name holds weights."""
    return name.endswith(".safetensors") and "/" not in name and name != INITIAL_FILE


def split_checkpoint(folder: str) -> str | None:
    """Return the checkpoint, by the names that the Trainer gives them, that `folder` is or is in; `None` if it is none.

    >>> split_checkpoint("checkpoint-10"), split_checkpoint("checkpoint-10/adapter"), split_checkpoint("other")
    ('checkpoint-10', 'checkpoint-10', None)
    """
    first = folder.split("/")[0]
    return first if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", first) else None
