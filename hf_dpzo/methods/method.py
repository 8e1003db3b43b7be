"""What every method says about itself."""

from dataclasses import dataclass, fields
from typing import ClassVar, Protocol

from hf_dpzo.estimator import CentralDifference
from hf_dpzo.mechanism import Mechanism


@dataclass(frozen=True, kw_only=True)
class Paper:
    """Where a method was published."""

    title: str
    authors: str
    venue: str
    url: str


class Method(Protocol):
    """The parts of a method. Its dataclass fields are the parameters that it takes, and no others.

    A method with a `noise_multiplier` is private; one without is not.
    """

    paper: ClassVar[Paper]

    @property
    def estimator(self) -> CentralDifference:
        """How per-example coefficients are estimated."""

    @property
    def mechanism(self) -> Mechanism:
        """How they are released."""


def parameters_of(method: type[Method]) -> frozenset[str]:
    """The names of the parameters that `method` takes.

    >>> from hf_dpzo.methods import MeZO
    >>> sorted(parameters_of(MeZO))
    ['num_directions', 'smoothing']
    """
    return frozenset(field.name for field in fields(method))


def is_private(method: type[Method]) -> bool:
    """Whether `method` adds noise."""
    return "noise_multiplier" in parameters_of(method)
