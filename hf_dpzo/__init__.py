"""Differentially private zeroth-order fine-tuning for the Hugging Face Trainer."""

import importlib
from typing import TYPE_CHECKING, Any

from hf_dpzo._version import __version__


if TYPE_CHECKING:
    from hf_dpzo.methods import scaled_clip_norm
    from hf_dpzo.prompting import Prompt
    from hf_dpzo.trainer import ZOTrainer
    from hf_dpzo.training_args import ZOTrainingArguments


__all__ = ["Prompt", "ZOTrainer", "ZOTrainingArguments", "__version__", "scaled_clip_norm"]

_HOMES = {
    "Prompt": "prompting",
    "ZOTrainer": "trainer",
    "ZOTrainingArguments": "training_args",
    "scaled_clip_norm": "methods",
}


def __getattr__(name: str) -> Any:
    # Transformers takes seconds to import, and planning a budget needs none of it.
    if name not in _HOMES:
        raise AttributeError(f"module 'hf_dpzo' has no attribute {name!r}")
    return getattr(importlib.import_module(f"hf_dpzo.{_HOMES[name]}"), name)
