"""The update, as a real `torch.optim.Optimizer` that the stock training loop can step."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from hf_dpzo.perturbation import Directions


class ZOOptimizer(torch.optim.Optimizer):
    """Moves parameters along replayed directions: `theta -= lr * (sum_k coefficient_k z_k + weight_decay * theta)`.

    There are no gradients. The training step stages the coefficients that were released, and `step()` applies them
    once.

    Args:
        params: parameters or parameter groups. Their order is the order of the directions' parameter numbers.
        directions: the class of the directions.
        seed: the run's public seed.
        lr: learning rate, per unit of coefficient.
        weight_decay: how much of theta is added to the estimated gradient, as in MeZO.

    >>> from hf_dpzo.perturbation import Rademacher
    >>> theta = torch.nn.Parameter(torch.zeros(3))
    >>> optimizer = ZOOptimizer([theta], directions=Rademacher, seed=0, lr=0.5)
    >>> optimizer.stage(step=0, coefficients=[2.0])
    >>> optimizer.step()
    >>> theta.abs().tolist()
    [1.0, 1.0, 1.0]
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        *,
        directions: type[Directions],
        seed: int,
        lr: float,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.directions = directions(seed=seed, sizes=[parameter.numel() for parameter in self.parameters()])
        self._staged: tuple[int, Sequence[float]] | None = None

    def parameters(self) -> list[torch.Tensor]:
        """The parameters in the order of the directions. Read anew each time: wrappers exchange the objects."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @property
    def staged(self) -> Sequence[float]:
        """The coefficients that wait for the next `step()`; empty when there are none."""
        return () if self._staged is None else self._staged[1]

    def stage(self, *, step: int, coefficients: Sequence[float]) -> None:
        """Keep the released coefficients of `step`, one for each direction, for the next `step()`."""
        if self._staged is not None:
            raise RuntimeError(f"step={step}: the coefficients of step {self._staged[0]} were never applied.")
        self._staged = (step, tuple(coefficients))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Apply what was staged."""
        if self._staged is None:
            raise RuntimeError("nothing was staged: a zeroth-order optimizer steps after ZOTrainer.training_step.")
        (step, coefficients), self._staged = self._staged, None
        index = 0
        for group in self.param_groups:
            weights = {k: -group["lr"] * coefficient for k, coefficient in enumerate(coefficients)}
            for parameter in group["params"]:
                if group["weight_decay"] != 0:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                self.directions.add_(parameter, index=index, step=step, weights=weights)
                index += 1
