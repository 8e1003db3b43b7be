"""One step of MeZO as its authors published it (Malladi et al. 2023; `large_models/trainer.py` of their repository).

Written for this benchmark after their code: directions are drawn by the global generator, which is seeded anew for each
of four walks over the parameters, and every walk makes new tensors, three of a parameter's size at once.
"""

import random
from collections.abc import Mapping

import torch

from hf_dpzo.losses.per_example import PerExampleLoss


class MezoTwin:
    """Moves the parameters of `model` that require gradients.

    Args:
        model: what is trained.
        learning_rate: of the update.
        eps: the distance to a probe point, in directions.
    """

    def __init__(self, model: torch.nn.Module, *, learning_rate: float, eps: float) -> None:
        self._model, self._learning_rate, self._eps = model, learning_rate, eps

    def step(self, loss: PerExampleLoss, inputs: Mapping[str, torch.Tensor]) -> None:
        """Take one step on the mean loss of a batch."""
        seed = random.randrange(1_000_000_000)
        self._perturb(seed, +1)
        plus = self._forward(loss, inputs)
        self._perturb(seed, -2)
        minus = self._forward(loss, inputs)
        projected_grad = ((plus - minus) / (2 * self._eps)).item()
        self._perturb(seed, +1)
        self._update(seed, projected_grad)

    def _forward(self, loss: PerExampleLoss, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        self._model.eval()
        with torch.inference_mode():
            return loss(self._model, inputs).mean()

    def _perturb(self, seed: int, scaling: float) -> None:
        torch.manual_seed(seed)
        for parameter in self._parameters():
            parameter.data = parameter.data + scaling * self._draw(parameter) * self._eps

    def _update(self, seed: int, projected_grad: float) -> None:
        torch.manual_seed(seed)
        for parameter in self._parameters():
            parameter.data = parameter.data - self._learning_rate * (projected_grad * self._draw(parameter))

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self._model.parameters() if parameter.requires_grad]

    @staticmethod
    def _draw(parameter: torch.nn.Parameter) -> torch.Tensor:
        data = parameter.data
        return torch.normal(mean=0, std=1, size=data.size(), device=data.device, dtype=data.dtype)
