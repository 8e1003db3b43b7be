"""The guarantee, attacked: whether the random directions hide the data, and whether the noise does.

The demonstration takes one step of projected zeroth-order gradient descent on a strongly convex objective, the mean of
`||theta - x||**2 / 2` over the rows x, from an initial theta that everybody knows. An attacker knows all rows, sees
where the step ended, and has to tell whether the last row took part.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from hf_dpzo.methods import Projected
from hf_dpzo.privacy.calibration import calibrate_query
from hf_dpzo.privacy.interpretation import membership_accuracy
from hf_dpzo.privacy.queries import GaussianQuery
from hf_dpzo.step.descent import Descent
from hf_dpzo.zo.directions import DIRECTIONS
from hf_dpzo.zo.optimizer import ZOOptimizer


DIMENSION, ROWS = 2000, 8


EPSILON, DELTA = 1.0, 1e-5


TRIALS = 400


# No coefficient of the demonstration's rows comes near the first; the second cuts most of them.
LOOSE_CLIP_NORM, CLIP = 1e6, 2.0


@dataclass(frozen=True, kw_only=True)
class AttackResult:
    """How well neighbouring data sets were told apart.

    Args:
        directions: the distribution of the directions.
        knows_direction: whether the attacker was told the direction.
        epsilon: what the noise was calibrated for; `None` where there was none.
        accuracy: the share of right guesses, from even odds.
        guesses: how many there were.
        allowed: the most that epsilon and delta allow; `None` where nothing was promised.
    """

    directions: str
    knows_direction: bool
    epsilon: float | None
    accuracy: float
    guesses: int
    allowed: float | None

    @property
    def two_standard_errors(self) -> float:
        """Of the accuracy."""
        return 2 * math.sqrt(self.accuracy * (1 - self.accuracy) / self.guesses)


def attack_inherent_privacy(*, num_trials: int = TRIALS) -> list[AttackResult]:
    """Attack one step without noise, not knowing its direction; then one with noise, knowing it.

    Gupta et al. 2025 show that there are strongly convex objectives on which zeroth-order gradient descent from a fixed
    initialization is not private by its random directions alone. For one step of this one the reason is plain. It moves
    by `w = <g, z> z`, where g is the
    gradient. If z is uniform on a sphere of radius R, then w lies on the sphere through the origin with centre
    `R**2 g / 2`; another data set has another g, and its sphere meets this one in a null set. If z is Gaussian, then w
    has a density that depends on g: it is zero where `<g, w>` is negative, and elsewhere tells the better the more
    dimensions there are. Signs say `<g, z>` and z up to a sign.

    Args:
        num_trials: steps for each of the two data sets and each distribution.
    """
    rows = np.random.default_rng(0).normal(size=(ROWS, DIMENSION)) + 1.0
    query = calibrate_query(
        GaussianQuery(noise_multiplier=1.0, sampling_rate=1.0), steps=1, target_epsilon=EPSILON, target_delta=DELTA
    )
    allowed = membership_accuracy(((query, 1),), delta=DELTA)
    findings = []
    for epsilon, noise_multiplier, clip_norm in ((None, 0.0, LOOSE_CLIP_NORM), (EPSILON, query.noise_multiplier, CLIP)):
        for name in DIRECTIONS:
            accuracy = _measure_accuracy(name, rows, num_trials, noise_multiplier=noise_multiplier, clip_norm=clip_norm)
            findings.append(
                AttackResult(
                    directions=name,
                    knows_direction=epsilon is not None,
                    epsilon=epsilon,
                    accuracy=accuracy,
                    guesses=2 * num_trials,
                    allowed=None if epsilon is None else allowed,
                )
            )
    return findings


def _measure_accuracy(name: str, rows: np.ndarray, trials: int, *, noise_multiplier: float, clip_norm: float) -> float:
    method = Projected(
        radius=1e6, noise_multiplier=noise_multiplier, clip_norm=clip_norm, expected_batch_size=ROWS, smoothing=1e-2
    )
    right = 0
    for trial in range(trials):
        for with_last in (False, True):
            moved = _take_step(name, rows if with_last else rows[:-1], method, step=trial)
            if noise_multiplier == 0:
                scores = [_likelihood(name, moved, _gradient(some)) for some in (rows[:-1], rows)]
            else:
                z = (
                    DIRECTIONS[name](seed=0, sizes=[DIMENSION])
                    .values(index=0, step=trial, direction=0)
                    .double()
                    .numpy()
                )
                seen = float(moved @ z) / float(z @ z)
                scores = [-abs(seen - _clipped_mean(some, z, clip_norm)) for some in (rows[:-1], rows)]
            right += (scores[1] > scores[0]) == with_last
    return right / (2 * trials)


def _take_step(name: str, rows: np.ndarray, method: Projected, *, step: int) -> np.ndarray:
    """Take one step from zero, by the parts that train models, and return how far it went, per learning rate."""
    model = torch.nn.Linear(DIMENSION, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    optimizer = ZOOptimizer([model.weight], directions=DIRECTIONS[name], seed=0, lr=1.0, constraint=method.constraint)
    optimizer.begin_stage()
    descent = Descent(model=model, optimizer=optimizer, method=method, planned_steps=step + 1)
    data = torch.from_numpy(rows)
    with descent.walk(step) as walk, torch.no_grad():
        losses = [(model.weight.double() - data).square().sum(dim=1) / 2 for _ in walk]
    coefficients = descent.estimator(step).coefficients(torch.stack(losses, dim=1))
    optimizer.receive(step=step, coefficients=method.mechanism.release(coefficients).coefficients)
    optimizer.step()
    return -model.weight.detach().double().numpy()[0]


def _gradient(rows: np.ndarray) -> np.ndarray:
    """The gradient at zero, of the sum of losses over the expected batch size."""
    return -rows.sum(axis=0) / ROWS


def _clipped_mean(rows: np.ndarray, z: np.ndarray, clip_norm: float) -> float:
    return float(np.clip(-rows @ z, -clip_norm, clip_norm).sum()) / ROWS


def _likelihood(name: str, w: np.ndarray, gradient: np.ndarray) -> float:
    """How well `w = <gradient, z> z` can be, over all z: larger is likelier."""
    if name == "sphere":
        centre = DIMENSION * gradient / 2
        return -abs(np.linalg.norm(w - centre) - np.linalg.norm(centre))
    if name == "rademacher":
        return -abs(abs(gradient @ np.sign(w)) - np.abs(w).mean())
    along = gradient @ w  # <gradient, z>**2
    return -math.inf if along <= 0 else -(w @ w) / (2 * along) - DIMENSION / 2 * math.log(along)
