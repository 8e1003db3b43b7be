"""`ZOTrainer`: nine classes, each a layer on the stock Trainer.

Imports everything from `io` to `arguments`.
"""

from hf_dpzo.trainer.trainer import ZOTrainer


__all__ = ["ZOTrainer"]
