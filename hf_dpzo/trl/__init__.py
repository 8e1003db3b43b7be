"""TRL's SFTTrainer, RewardTrainer and DPOTrainer, with private steps.

Imports `arguments` and `trainer`.
"""

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from hf_dpzo.trl.dpo import ZODPOConfig, ZODPOTrainer
    from hf_dpzo.trl.reward import ZORewardConfig, ZORewardTrainer
    from hf_dpzo.trl.sft import ZOSFTConfig, ZOSFTTrainer


__all__ = ["ZODPOConfig", "ZODPOTrainer", "ZORewardConfig", "ZORewardTrainer", "ZOSFTConfig", "ZOSFTTrainer"]

_LAZY_IMPORTS = {
    "ZODPOConfig": "dpo",
    "ZODPOTrainer": "dpo",
    "ZORewardConfig": "reward",
    "ZORewardTrainer": "reward",
    "ZOSFTConfig": "sft",
    "ZOSFTTrainer": "sft",
}


def __getattr__(name: str) -> Any:
    # TRL is imported on first use, and only what is used of it: each of its trainers takes seconds to import.
    if name not in _LAZY_IMPORTS:
        raise AttributeError(f"module 'hf_dpzo.trl' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"hf_dpzo.trl.{_LAZY_IMPORTS[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name != "trl":
            raise
        raise ModuleNotFoundError(
            f"{name}: it is one of TRL's trainers, and TRL is not installed; pip install hf_dpzo[trl].", name="trl"
        ) from error
