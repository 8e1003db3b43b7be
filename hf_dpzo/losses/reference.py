"""What a preference is measured against: the reference of direct preference optimization, which never moves."""

import torch

from hf_dpzo.losses.target_log_probs import TargetLogProbs
from hf_dpzo.models.state import ModelState
from hf_dpzo.models.switching import switched_adapter
from hf_dpzo.models.unwrap import Inputs


class ModelReference:
    """A model beside the trained one. It is set to evaluation mode, and what rows would write into it is undone.

    Args:
        model: the reference model.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model.eval()
        self._log_probs = TargetLogProbs(model)
        self._state = ModelState(model, moving=())

    def __call__(self, model: torch.nn.Module, inputs: Inputs, targets: torch.Tensor) -> torch.Tensor:
        """Return the log-probabilities of the targets, float32 `[batch, tokens - 1]`; zero where there is no target."""
        with torch.no_grad(), self._state.guarded(self._model):
            return self._log_probs(self._model, inputs, targets)


class AdapterReference:
    """The trained model without its adapter, or with a frozen copy of the adapter.

    Args:
        model: the trained model, with its adapter.
        adapter: the name of the frozen copy; `None` for no adapter at all.
    """

    def __init__(self, model: torch.nn.Module, *, adapter: str | None) -> None:
        self._adapted = model
        self._adapter = adapter
        self._log_probs = TargetLogProbs(model)

    def __call__(self, model: torch.nn.Module, inputs: Inputs, targets: torch.Tensor) -> torch.Tensor:
        """Return the log-probabilities of the targets, float32 `[batch, tokens - 1]`; zero where there is no target."""
        with torch.no_grad(), switched_adapter(self._adapted, self._adapter):
            return self._log_probs(model, inputs, targets)
