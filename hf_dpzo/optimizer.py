"""The update, as a real `torch.optim.Optimizer` that the stock training loop can step."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from hf_dpzo.constraints import Constraint
from hf_dpzo.mask import Mask
from hf_dpzo.perturbation import Directions
from hf_dpzo.stream import CHUNK
from hf_dpzo.updates import SGD, Update


class ZOOptimizer(torch.optim.Optimizer):
    """Moves parameters along replayed directions: `theta -= lr * (sum_k coefficient_k z_k + weight_decay * theta)`.

    There is no backpropagation. The training step hands over the coefficients that were released, and `step()` applies
    them once, in the way of `update` and within `constraint`. Weight decay is decoupled from the update.

    Args:
        params: parameters or parameter groups. Their order is the order of the directions' parameter numbers.
        directions: the class of the directions.
        seed: the run's public seed.
        lr: learning rate, per unit of coefficient.
        weight_decay: how much of theta is added to the estimated gradient, as in MeZO.
        update: what becomes of the coefficients.
        constraint: where the parameters may go.

    >>> from hf_dpzo.perturbation import Rademacher
    >>> theta = torch.nn.Parameter(torch.zeros(3))
    >>> optimizer = ZOOptimizer([theta], directions=Rademacher, seed=0, lr=0.5)
    >>> optimizer.begin_stage()
    >>> optimizer.receive(step=0, coefficients=[2.0])
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
        update: Update | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self._kind, self._seed = directions, seed
        self._update, self._constraint = update or SGD(), constraint or Constraint()
        self._origin: list[torch.Tensor] | None = None
        self._received: tuple[int, Sequence[float]] | None = None
        self._logged_rates: list[float] = []
        self.stage: int | None = None
        self.rate_factor = 1.0
        self._restrict(None)

    def parameters(self) -> list[torch.Tensor]:
        """The parameters in the order of the directions. Read anew each time: wrappers exchange the objects."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def begin_stage(self, *, number: int = 0, rate_factor: float = 1.0, mask: Mask | None = None) -> None:
        """Begin a stage, and the first one too, with its own learning rate, mask and anchor. Moments start anew.

        Args:
            number: of the stage, from 0.
            rate_factor: what the learning rate is multiplied by.
            mask: the coordinates that may move; by default all.
        """
        self.stage, self.rate_factor = number, rate_factor
        self._restrict(mask)
        self._origin = self._constraint.origin(self.parameters(), self._origin)

    @property
    def received(self) -> Sequence[float]:
        """The coefficients that wait for the next `step()`; empty when there are none."""
        return () if self._received is None else self._received[1]

    def state_dict(self) -> dict[str, Any]:
        """The parameter groups alone. Moments follow from the log of the run."""
        return {**super().state_dict(), "state": {}}

    def receive(self, *, step: int, coefficients: Sequence[float]) -> None:
        """Keep the released coefficients of `step`, one for each direction, for the next `step()`."""
        if self._received is not None:
            raise RuntimeError(f"step={step}: the coefficients of step {self._received[0]} were never applied.")
        self._received = (step, tuple(coefficients))
        self._logged_rates = [group["lr"] for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Apply what was received."""
        if self._received is None:
            raise RuntimeError("nothing was received: a zeroth-order optimizer steps after ZOTrainer.training_step.")
        if self.stage is None:
            raise RuntimeError("no stage has begun: call begin_stage before the first step.")
        if [group["lr"] for group in self.param_groups] != self._logged_rates:
            raise RuntimeError(
                f"step={self._received[0]}: the learning rate changed between its release and its update, and the log "
                "has the one before; change it in on_step_end."
            )
        (step, coefficients), self._received = self._received, None
        rates = [self._rate(group) for group in self.param_groups for _ in group["params"]]
        self._constraint.pull_(self.parameters(), self._origin, rates)
        self._decay_(rates)
        scaled = self._update.scaled(coefficients)
        if self._inner is None:
            self._move_(step, scaled, rates)
        else:
            self._move_by_inner_(step, scaled)
        self._constraint.project_(self.parameters(), self._origin)

    def _restrict(self, mask: Mask | None) -> None:
        sizes = [parameter.numel() for parameter in self.parameters()]
        self.directions = self._kind(seed=self._seed, sizes=sizes, mask=mask)
        self._inner = self._update.inner([{"params": group["params"]} for group in self.param_groups])
        if self._inner is not None:
            self.state = self._inner.state  # One state, so that saving this optimizer saves it.

    def _rate(self, group: dict[str, Any]) -> float:
        return group["lr"] * self.rate_factor

    def _decay_(self, rates: Sequence[float]) -> None:
        decays = [group["weight_decay"] for group in self.param_groups for _ in group["params"]]
        for index, (parameter, rate, decay) in enumerate(zip(self.parameters(), rates, decays, strict=True)):
            share = rate * decay
            if share != 0 and self.directions.mask is None:
                parameter.mul_(1 - share)
            elif share != 0:
                for chunk, piece in enumerate(parameter.view(-1).split(CHUNK)):
                    mask = torch.from_numpy(self.directions.mask.chunk(index, chunk)).to(piece.device)
                    piece.sub_(piece * mask, alpha=share)

    def _move_(self, step: int, coefficients: Sequence[float], rates: Sequence[float]) -> None:
        for index, (parameter, rate) in enumerate(zip(self.parameters(), rates, strict=True)):
            weights = {k: -rate * coefficient for k, coefficient in enumerate(coefficients)}
            self.directions.add_(parameter, index=index, step=step, weights=weights)

    def _move_by_inner_(self, step: int, coefficients: Sequence[float]) -> None:
        weights = dict(enumerate(coefficients))
        for index, parameter in enumerate(self.parameters()):
            parameter.grad = torch.zeros_like(parameter)
            self.directions.add_(parameter.grad, index=index, step=step, weights=weights)
        for own, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            inner["params"], inner["lr"] = own["params"], self._rate(own)
        self._inner.step()
        for parameter in self.parameters():
            parameter.grad = None
