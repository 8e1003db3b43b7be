"""The log of a run that is only rehearsed: it begins as any other one, and nothing of it is written."""

from pathlib import Path
from typing import Any

import torch


class UnwrittenLog:
    """Takes the place of a `RunLog` of a new run until the log would be opened."""

    existing: None = None
    checkpoint: Path | None = None
    num_spent_steps = 0
    was_opened = False

    def restore_start(self, model: torch.nn.Module, *, from_initial: bool) -> None:
        """Do nothing: a new run starts where its model is."""

    def open(self, header: dict[str, Any], model: torch.nn.Module) -> None:
        """Raise `RuntimeError`: a rehearsal ends before."""
        raise RuntimeError("a rehearsal opens no log.")

    def close(self) -> None:
        """Do nothing, since nothing is open."""
