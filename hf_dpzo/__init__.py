"""Differentially private zeroth-order fine-tuning for the Hugging Face Trainer."""

import importlib
from typing import TYPE_CHECKING, Any

from hf_dpzo._version import __version__


if TYPE_CHECKING:
    from hf_dpzo.initial import seeded_peft_model
    from hf_dpzo.log_repository import from_trajectory
    from hf_dpzo.methods import scaled_clip_norm
    from hf_dpzo.prompting import Prompt
    from hf_dpzo.replay import replay_onto
    from hf_dpzo.trainer import ZOTrainer
    from hf_dpzo.training_args import ZOTrainingArguments
    from hf_dpzo.trajectory import Trajectory
    from hf_dpzo.verification import verify


__all__ = [
    "Prompt",
    "Trajectory",
    "ZOTrainer",
    "ZOTrainingArguments",
    "__version__",
    "from_trajectory",
    "replay_onto",
    "scaled_clip_norm",
    "seeded_peft_model",
    "verify",
]

_HOMES = {
    "Prompt": "prompting",
    "Trajectory": "trajectory",
    "ZOTrainer": "trainer",
    "ZOTrainingArguments": "training_args",
    "from_trajectory": "log_repository",
    "replay_onto": "replay",
    "seeded_peft_model": "initial",
    "scaled_clip_norm": "methods",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:
    # Transformers takes seconds to import, and planning a budget needs none of it.
    if name not in _HOMES:
        raise AttributeError(f"module 'hf_dpzo' has no attribute {name!r}")
    return getattr(importlib.import_module(f"hf_dpzo.{_HOMES[name]}"), name)
