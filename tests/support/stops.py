"""Callbacks that disturb a run."""

import os

import torch
from transformers import TrainerCallback


class Drift(TrainerCallback):
    """Changes the model after a step, where it is `armed`."""

    def __init__(self, armed: bool, *, after: int) -> None:
        self._armed, self._after = armed, after

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        if self._armed and state.global_step == self._after:
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).view(-1)[0] += 1e-3


class Death(TrainerCallback):
    """Ends the process after a step, where it is `armed`."""

    def __init__(self, armed: bool, *, after: int) -> None:
        self._armed, self._after = armed, after

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self._armed and state.global_step == self._after:
            os._exit(1)
