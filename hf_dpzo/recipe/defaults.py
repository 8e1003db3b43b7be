"""The training arguments that a task chooses where neither its recipe nor a flag sets them."""

import argparse
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from hf_dpzo.methods import DPZO, METHODS, AggZO, PrivateMethod, Projected, scaled_clip_norm
from hf_dpzo.methods.method import list_parameters
from hf_dpzo.zo.spsa import DIFFERENCES


# Methods that clip all coefficients of a row as one vector, so that more directions cost no privacy.
JOINTLY_CLIPPED = (AggZO, Projected)


# How far noise may carry an adapter; see `most_noise`. Rates that were tuned for adapters go one to three times as far.
MOST_NOISE_OF_ADAPTERS = 4


@dataclass(frozen=True, kw_only=True)
class TrainingDefaults:
    """Values of training arguments that were measured to suit one kind of task. Those that are `None` stay stock's.

    Args:
        method: the method.
        expected_batch_size: the rows of a batch on average, or `all`.
        num_directions: K, for the methods whose directions are clipped jointly. The others keep their own.
        clip: the largest difference quotient of one example along one direction, which is about its spread. The clip
            norm of each method follows from it.
        smoothing: the distance from the parameters to a probe point, in directions.
        learning_rate: the learning rate of `update=sgd`.
        most_noise: how far the noise of a whole run may carry a parameter, in distances of a probe point. Where it
            would go further, the learning rate is lowered.
        max_steps: the number of steps, unless a number of epochs is given.
    """

    method: str | None = None
    expected_batch_size: int | str | None = None
    num_directions: int | None = None
    clip: float | None = None
    smoothing: float | None = None
    learning_rate: float | None = None
    most_noise: float = math.inf
    max_steps: int | None = None

    def choose(self, values: argparse.Namespace, given: Collection[str]) -> dict[str, Any]:
        """Return the arguments that are not among the `given` ones, whose values are in `values`, and suit these.

        >>> defaults = TrainingDefaults(method="aggzo", num_directions=64, clip=0.4, max_steps=60)
        >>> defaults.choose(argparse.Namespace(update="sgd"), given=())
        {'method': 'aggzo', 'max_steps': 60, 'num_directions': 64, 'clip_norm': 0.05}
        >>> defaults.choose(argparse.Namespace(update="sgd", num_directions=16), given={"num_directions"})["clip_norm"]
        0.1
        """
        chosen: dict[str, Any] = {}
        for name in ("method", "expected_batch_size", "smoothing", "learning_rate", "max_steps"):
            chosen[name] = getattr(self, name)
        if "num_train_epochs" in given:
            del chosen["max_steps"]
        if values.update != "sgd":  # Its rates are of another size.
            del chosen["learning_rate"]
        method = METHODS.get(values.method if "method" in given or self.method is None else self.method)
        if method is not None:
            chosen |= self._choose_directions(method, values, given)
        return {name: value for name, value in chosen.items() if value is not None and name not in given}

    def _choose_directions(
        self, method: type, values: argparse.Namespace, given: Collection[str]
    ) -> dict[str, int | float | None]:
        """Return the number of directions of `method`, and the clip norm that goes with it."""
        takes_more = issubclass(method, JOINTLY_CLIPPED)
        count = self.num_directions if takes_more else None
        if "num_directions" in given:
            count = max(values.num_directions, 1)  # What is wrong with it is said later.
        clip = self.clip
        if "clip_norm" not in list_parameters(method) or not issubclass(method, PrivateMethod):
            clip = None
        elif takes_more and clip is not None:
            clip = scaled_clip_norm(clip, count or method.num_directions)
        elif issubclass(method, DPZO) and clip is not None:  # It bounds the difference, not its quotient.
            smoothing = values.smoothing if "smoothing" in given else (self.smoothing or method.smoothing)
            difference = DIFFERENCES[values.difference or "central"]
            clip *= difference(smoothing=smoothing, num_directions=1).span
        return {"num_directions": count, "clip_norm": clip}


def describe_defaults(chosen: dict[str, Any]) -> str:
    """Return what was chosen as a line of a report.

    >>> describe_defaults({"num_directions": 64, "clip_norm": 0.05, "expected_batch_size": "all"})
    'num_directions=64, clip_norm=0.05, expected_batch_size=all'
    """
    return ", ".join(f"{name}={_round(value)}" for name, value in chosen.items())


def _round(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) and math.isfinite(value) else value
