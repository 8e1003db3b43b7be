"""Differentially private zeroth-order fine-tuning for the Hugging Face Trainer."""

import importlib
from typing import TYPE_CHECKING, Any

from hf_dpzo._requirements import check_requirements
from hf_dpzo._version import __version__


if TYPE_CHECKING:
    from hf_dpzo.arguments.training_args import ZOTrainingArguments
    from hf_dpzo.card.repository import from_trajectory
    from hf_dpzo.losses import PerExampleLoss, Prompt
    from hf_dpzo.models.feature_classifier import FeatureClassifier
    from hf_dpzo.models.public_texts import PUBLIC_TEXTS
    from hf_dpzo.models.seeded import seeded_peft_model
    from hf_dpzo.trainer.seq2seq import ZOSeq2SeqTrainer, ZOSeq2SeqTrainingArguments
    from hf_dpzo.trainer.trainer import ZOTrainer
    from hf_dpzo.trajectory.log import Trajectory
    from hf_dpzo.trajectory.replay import replay_onto
    from hf_dpzo.verification.verify import verify


__all__ = [
    "PUBLIC_TEXTS",
    "FeatureClassifier",
    "PerExampleLoss",
    "Prompt",
    "Trajectory",
    "ZOSeq2SeqTrainer",
    "ZOSeq2SeqTrainingArguments",
    "ZOTrainer",
    "ZOTrainingArguments",
    "__version__",
    "from_trajectory",
    "replay_onto",
    "seeded_peft_model",
    "verify",
]

check_requirements()


_LAZY_IMPORTS = {
    "FeatureClassifier": "models.feature_classifier",
    "PUBLIC_TEXTS": "models.public_texts",
    "PerExampleLoss": "losses",
    "Prompt": "losses",
    "Trajectory": "trajectory.log",
    "ZOSeq2SeqTrainer": "trainer.seq2seq",
    "ZOSeq2SeqTrainingArguments": "trainer.seq2seq",
    "ZOTrainer": "trainer.trainer",
    "ZOTrainingArguments": "arguments.training_args",
    "from_trajectory": "card.repository",
    "replay_onto": "trajectory.replay",
    "seeded_peft_model": "models.seeded",
    "verify": "verification.verify",
}


def __getattr__(name: str) -> Any:
    # Names are imported on first use: transformers takes seconds to import, and planning a budget needs none of it.
    if name not in _LAZY_IMPORTS:
        raise AttributeError(f"module 'hf_dpzo' has no attribute {name!r}")
    return getattr(importlib.import_module(f"hf_dpzo.{_LAZY_IMPORTS[name]}"), name)
