"""The learning rate that is chosen where a user sets none, by public numbers alone."""

import math
from collections.abc import Sequence

from hf_dpzo.methods.method import Method
from hf_dpzo.privacy.mechanism import LaplaceSum, NoisySum
from hf_dpzo.zo.updates import Adam, Momentum, NormalizedSGD, Update


# The rate of a run without noise, whose coefficients may be of any size: the largest one that suits all parameters.
NOISELESS_RATE = 1e-4


# The rate that earlier versions took where a user set none.
EARLIER_DEFAULT = 1e-3


def choose_learning_rate(method: Method, *, steps: int, update: Update) -> float:
    """Return the rate at which the noise of a whole run moves a parameter as far as a probe point is away from it.

    A walk of `steps` steps along K directions goes `sqrt(steps * K)` times as far as one coefficient's noise does. That
    distance is the one at which losses are compared anyway, whatever the scale of the losses and of the clip norm; like
    the first step of DoG (Ivgi, Hinder and Carmon 2023), it takes no gradient to know. The rates of all recipes, which
    were tuned from 5e-5 to 20, lie within a factor of four of it.

    Args:
        method: the method, with its noise.
        steps: the number of steps of the run.
        update: the rule that turns coefficients into an update.

    >>> from hf_dpzo.methods import AggZO
    >>> head = AggZO(
    ...     noise_multiplier=17.8, expected_batch_size=7930, num_directions=128, clip_norm=0.035, smoothing=0.1
    ... )
    >>> round(choose_learning_rate(head, steps=80, update=Update()), 1)
    12.6
    """
    distance = method.smoothing / math.sqrt(steps)
    if isinstance(update, Adam):  # Each coordinate moves by about the rate.
        return _round(distance)
    distance /= math.sqrt(method.estimator.num_directions)
    if isinstance(update, NormalizedSGD):  # Its coefficients have a spread of one.
        return _round(distance)
    mechanism = method.mechanism
    if not isinstance(mechanism, NoisySum) or mechanism.noise_multiplier == 0:
        return NOISELESS_RATE
    noise = mechanism.noise_scale * mechanism.unit * (math.sqrt(2) if isinstance(mechanism, LaplaceSum) else 1.0)
    return _round(distance / noise * (1 - update.momentum if isinstance(update, Momentum) else 1.0))


def is_earlier_default(rates: Sequence[float], *, warmup_steps: int) -> bool:
    """Return whether a run whose log begins with `rates` took the default of earlier versions.

    Args:
        rates: the learning rate of each step that was taken.
        warmup_steps: the number of steps in which the rate rises to the one that was set.

    >>> is_earlier_default([1e-3, 5e-4], warmup_steps=0), is_earlier_default([0.0, 5e-4], warmup_steps=2)
    (True, True)
    """
    step = min(warmup_steps, len(rates) - 1)
    factor = step / warmup_steps if warmup_steps else 1.0
    return step >= 0 and factor > 0 and math.isclose(rates[step] / factor, EARLIER_DEFAULT, rel_tol=1e-9)


def _round(rate: float) -> float:
    """Return the rate with three digits, as a user would set it."""
    return float(f"{rate:.3g}")
