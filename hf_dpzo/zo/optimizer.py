"""The zeroth-order optimizer: a real `torch.optim.Optimizer`, which the stock training loop can step."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from hf_dpzo.distributed.sharding import gather_full_tensor
from hf_dpzo.zo.constraints import Constraint
from hf_dpzo.zo.directions import Directions
from hf_dpzo.zo.mask import Mask
from hf_dpzo.zo.philox import CHUNK_SIZE
from hf_dpzo.zo.updates import SGD, Update
from hf_dpzo.zo.walk import THETA, ProbePoint, Walk


class ZOOptimizer(torch.optim.Optimizer):
    """Moves parameters along replayed directions: `theta -= lr * (sum_k coefficient_k z_k + weight_decay * theta)`.

    There is no backpropagation. The training step hands over the released coefficients by `receive()`, and `step()`
    applies them once, in the way of `update` and within `constraint`. Weight decay is decoupled from the update.

    Args:
        params: the parameters or parameter groups. Their order gives the directions' parameter numbers.
        directions: the class of the directions.
        seed: the run's public seed.
        lr: the learning rate, per unit of a coefficient.
        weight_decay: the factor by which theta is added to the estimated gradient, as in MeZO.
        update: the way that coefficients move the parameters; by default `SGD`.
        constraint: the limits to where the parameters may go; by default none.

    >>> from hf_dpzo.zo.directions import Rademacher
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
        self._directions_class = directions
        self._seed = seed
        self._update = update or SGD()
        self._constraint = constraint or Constraint()
        self._origin: list[torch.Tensor] | None = None
        self._pending: tuple[int, Sequence[float]] | None = None
        self._planned_decays = self._list_decays()
        self._logged_rates: list[float] = []
        # The step and the probe point at which a walk has left the parameters; `None` at theta.
        self._displacement: tuple[int, ProbePoint] | None = None
        # Whether the parameters may differ from what a whole number of steps gives, if only by rounding.
        self.is_midstep = False
        self.stage: int | None = None
        self.rate_factor = 1.0
        self._scales: tuple[float, ...] | None = None
        self._set_mask(None)

    def parameters(self) -> list[torch.Tensor]:
        """Return the parameters in the order of the directions.

        They are read from the groups each time, because wrappers replace the tensors.
        """
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def scale_directions(self, scales: Sequence[float]) -> None:
        """Scale each parameter's part of every direction, and so its probe points and its updates alike.

        The parameters then move as `theta_j = scales[j] * phi_j` do where phi moves without scales. Call it before the
        first stage begins.

        Args:
            scales: the factor of each parameter, in the order of the directions.

        Raises:
            RuntimeError: a stage has begun.
        """
        if self.stage is not None:
            raise RuntimeError(f"stage={self.stage}: it has begun with other scales; set them before the first step.")
        self._scales = tuple(scales)
        self._set_mask(None)

    @torch.no_grad()
    def begin_stage(self, *, number: int = 0, rate_factor: float = 1.0, mask: Mask | None = None) -> None:
        """Begin a stage, which has its own learning rate, mask and anchor. Moments start again from zero.

        Call it before the first step too, even if the run has only one stage.

        Args:
            number: the stage's number, from 0.
            rate_factor: the factor on the learning rate.
            mask: the coordinates that may move; by default all.
        """
        self.stage = number
        self.rate_factor = rate_factor
        self._set_mask(mask)
        self._origin = self._constraint.capture_origin(self.parameters(), self._origin)

    def swept_checksums(self) -> dict[torch.Tensor, int]:
        """Return the checksums of the parameters that the last sweep has taken, and nothing has written to since."""
        return self.directions.swept.find(self.parameters())

    @property
    def pending_coefficients(self) -> Sequence[float]:
        """The coefficients that wait for the next `step()`, one for each direction; empty if none do."""
        return () if self._pending is None else self._pending[1]

    def state_dict(self) -> dict[str, Any]:
        """Return the parameter groups alone, because moments follow from the run's log."""
        return {**super().state_dict(), "state": {}}

    def __getstate__(self) -> dict[str, Any]:
        """Return all attributes, so that a copy goes on as this one would; torch leaves out those of subclasses."""
        return self.__dict__.copy()

    def receive(self, *, step: int, coefficients: Sequence[float]) -> None:
        """Keep the released coefficients of a step until the next `step()`.

        Args:
            step: the step that released them, from 0.
            coefficients: one for each direction.

        Raises:
            RuntimeError: the coefficients of an earlier step were never applied.
        """
        if self._pending is not None:
            raise RuntimeError(f"step={step}: the coefficients of step {self._pending[0]} were never applied.")
        if self._list_decays() != self._planned_decays:
            raise RuntimeError(
                f"weight_decay={self._list_decays()[0]:g}: it was changed since the run began, and the log has the one "
                "before; set it before training."
            )
        self._pending = (step, tuple(coefficients))
        self._logged_rates = [group["lr"] for group in self.param_groups]

    @contextmanager
    def follow(self, walk: Walk, *, step: int) -> Iterator[Walk]:
        """Enter `walk` for the body of a `with` statement, and remember where it leaves the parameters.

        That is theta, or the walk's last point. From the last point, `step()` does the way back and the update in one
        sweep, which rounds once. If the body raises, the parameters go back to theta, and count as in the middle of a
        step: the log may hold that step by then.

        Args:
            walk: the walk, through the probe points of `step`.
            step: the step, from 0.
        """
        self.is_midstep = True
        try:
            with walk:
                yield walk
        except BaseException:
            self._leave(walk, step)
            self.settle()
            raise
        self._leave(walk, step)
        self.is_midstep = not walk.is_exact

    def _leave(self, walk: Walk, step: int) -> None:
        self._displacement = None if walk.at == THETA else (step, walk.at)

    @torch.no_grad()
    def settle(self) -> None:
        """Bring the parameters back to theta, if a walk left them at a probe point."""
        if self._displacement is None:
            return
        step, point = self._displacement
        self._displacement = None
        parameters = self.parameters()
        weights = [{point.direction: -point.position}] * len(parameters)
        self.directions.add_all_(parameters, step=step, weights=weights)

    def finish(self) -> None:
        """End a step that was interrupted.

        Apply the coefficients that were received, or else go back to theta, up to rounding.
        """
        if self._pending is not None and self._rates_are_logged:
            self.step()
        else:
            self.settle()

    def read_settled(self, index: int, coordinates: torch.Tensor) -> torch.Tensor:
        """Return the values that coordinates of a parameter have at theta, wherever a walk has left the parameters.

        Args:
            index: the parameter's number.
            coordinates: the numbers of the coordinates, int64 `[coordinates]`.
        """
        values = gather_full_tensor(self.parameters()[index].detach()).view(-1)[coordinates]
        if self._displacement is not None:
            step, point = self._displacement
            stop = int(coordinates.max()) + 1 if len(coordinates) else 0
            z = self.directions.values(index=index, step=step, direction=point.direction, stop=stop)
            values.add_(z[coordinates.cpu()].mul_(-point.position).to(values.device))
        return values

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Apply the coefficients that were received, once.

        Raises:
            RuntimeError: none were received, no stage has begun, or the learning rate changed in between.
        """
        if self._pending is None:
            raise RuntimeError("nothing was received: a zeroth-order optimizer steps after ZOTrainer.training_step.")
        if self.stage is None:
            raise RuntimeError("no stage has begun: call begin_stage before the first step.")
        if not self._rates_are_logged:
            raise RuntimeError(
                f"step={self._pending[0]}: the learning rate changed between its release and its update, and the log "
                "has the one before; change it in on_step_end."
            )
        self.is_midstep = True
        step, coefficients = self._pending
        self._pending = None
        rates = [self._compute_rate(group) for group in self.param_groups for _ in group["params"]]
        if not self._is_pure_move or (self._displacement is not None and self._displacement[0] != step):
            self.settle()
        self._constraint.pull_(self.parameters(), self._origin, rates)
        self._apply_weight_decay_(rates)
        scaled = self._update.scale(coefficients)
        if self._inner is None:
            self._move_(step, scaled, rates)
        else:
            self._step_inner_(step, scaled)
        self._constraint.project_(self.parameters(), self._origin)
        self.is_midstep = False

    def _set_mask(self, mask: Mask | None) -> None:
        sizes = [parameter.numel() for parameter in self.parameters()]
        self.directions = self._directions_class(seed=self._seed, sizes=sizes, mask=mask, scales=self._scales)
        self._inner = self._update.build_inner_optimizer([{"params": group["params"]} for group in self.param_groups])
        if self._inner is not None:
            self.state = self._inner.state

    def _list_decays(self) -> list[float]:
        return [group["weight_decay"] for group in self.param_groups]

    @property
    def _rates_are_logged(self) -> bool:
        return [group["lr"] for group in self.param_groups] == self._logged_rates

    @property
    def _is_pure_move(self) -> bool:
        """Whether `step()` only moves along the directions, so that a walk's way back can be part of the move."""
        decays = any(group["lr"] * group["weight_decay"] for group in self.param_groups)
        return self._inner is None and not decays and not self._constraint.has_pull

    def _compute_rate(self, group: dict[str, Any]) -> float:
        return group["lr"] * self.rate_factor

    def _apply_weight_decay_(self, rates: Sequence[float]) -> None:
        decays = [group["weight_decay"] for group in self.param_groups for _ in group["params"]]
        for index, (parameter, rate, decay) in enumerate(zip(self.parameters(), rates, decays, strict=True)):
            share = rate * decay
            if share != 0 and self.directions.mask is None:
                parameter.mul_(1 - share)
            elif share != 0:
                for chunk, piece in enumerate(parameter.view(-1).split(CHUNK_SIZE)):
                    mask = torch.from_numpy(self.directions.mask.unpack_chunk(index, chunk)).to(piece.device)
                    piece.sub_(piece * mask, alpha=share)

    def _move_(self, step: int, coefficients: Sequence[float], rates: Sequence[float]) -> None:
        displacement = self._displacement
        self._displacement = None
        weights = [{k: -rate * coefficient for k, coefficient in enumerate(coefficients)} for rate in rates]
        if displacement is not None:
            _, point = displacement
            for own in weights:
                own[point.direction] -= point.position
        self.directions.add_all_(self.parameters(), step=step, weights=weights)

    def _step_inner_(self, step: int, coefficients: Sequence[float]) -> None:
        weights = dict(enumerate(coefficients))
        for index, parameter in enumerate(self.parameters()):
            parameter.grad = torch.zeros_like(parameter)
            self.directions.add_(parameter.grad, index=index, step=step, weights=weights)
        for own, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            inner["params"], inner["lr"] = own["params"], self._compute_rate(own)
        self._inner.step()
        for parameter in self.parameters():
            parameter.grad = None
