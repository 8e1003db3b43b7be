"""The base classes of the methods: what each method declares, and the defaults."""

from abc import ABC, abstractmethod
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from typing import ClassVar

from hf_dpzo.privacy.mechanism import GaussianSum, Mechanism
from hf_dpzo.zo.constraints import Constraint
from hf_dpzo.zo.pruning import DataFreePruning
from hf_dpzo.zo.spsa import DIFFERENCES, FiniteDifference


@dataclass(frozen=True, kw_only=True)
class Paper:
    """The publication that a method comes from.

    Args:
        title: the title of the paper.
        authors: the authors' last names, with commas and a last `and` between them.
        venue: the conference or journal, and the year.
        url: the address of the paper.

    >>> paper = Paper(title="A title", authors="Doe, Roe and Poe", venue="A venue 2024", url="https://example.org")
    >>> paper.citation.splitlines()[0]
    '@misc{doe2024,'
    """

    title: str
    authors: str
    venue: str
    url: str

    @property
    def citation(self) -> str:
        """The paper's entry for a bibliography, in BibTeX."""
        key = f"{self.authors.split(',')[0].lower()}{self.venue.split()[-1]}"
        authors = self.authors.replace(", ", " and ")
        fields = {"title": self.title, "author": authors, "howpublished": self.venue, "url": self.url}
        return ",\n  ".join([f"@misc{{{key}", *(f"{name} = {{{value}}}" for name, value in fields.items())]) + "\n}"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stretch of steps with settings of its own.

    Args:
        number: the stage's number, from 0.
        smoothing: mu in this stage.
        rate_factor: the factor on the learning rate in this stage.
    """

    number: int
    smoothing: float
    rate_factor: float


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A training method: the choice of the parts that a step uses.

    A subclass is a frozen dataclass. Its fields are the parameters that the method takes, and no others.

    Args:
        smoothing: mu, the distance from theta to a probe point, in units of a direction.
        difference: `central`, or `forward`, which costs K + 1 forward passes instead of 2K.
    """

    paper: ClassVar[Paper]
    num_directions: ClassVar[int] = 1
    # Whether a noise multiplier of zero is allowed, for a run without privacy.
    allows_no_noise: ClassVar[bool] = False

    smoothing: float = 1e-3
    difference: str = "central"

    @property
    def estimator(self) -> FiniteDifference:
        """The estimator of each example's coefficients."""
        return DIFFERENCES[self.difference](smoothing=self.smoothing, num_directions=self.num_directions)

    @cached_property
    @abstractmethod
    def mechanism(self) -> Mechanism:
        """The mechanism that releases the coefficients."""

    def stage(self, step: int, planned_steps: int) -> Stage:
        """Return the stage that a step belongs to. By default there is only one stage.

        Args:
            step: the step, from 0.
            planned_steps: the number of steps that the run plans.
        """
        return Stage(number=0, smoothing=self.smoothing, rate_factor=1.0)

    @property
    def constraint(self) -> Constraint:
        """The constraint on where the parameters may go. By default they may go anywhere."""
        return Constraint()

    def pruning(self, stage: int) -> DataFreePruning | None:
        """Return the rule that chooses the coordinates to train as `stage` begins, or `None` for no new choice.

        By default no stage makes a choice, and all coordinates are trained.
        """
        return None

    @property
    def clipped(self) -> str:
        """The quantity of each row that the clip norm bounds, in words."""
        return "nothing"

    @property
    def noise_unit(self) -> str:
        """The unit of the noise multiplier, in words."""
        return "none"

    @property
    def covers_replace_one(self) -> bool:
        """Whether the noise is twice what was calibrated, which replacing a row requires."""
        return False

    def check_plan(self, planned_steps: int) -> None:  # noqa: B027
        """Raise `ValueError` if the method cannot take `planned_steps` steps. By default it can take any number."""


@dataclass(frozen=True, kw_only=True)
class PrivateMethod(Method):
    """A method that clips each row and adds noise to the sum; by default, it clips a row's coefficients as one vector.

    Args:
        smoothing: mu, the distance from theta to a probe point, in units of a direction.
        difference: `central`, or `forward`, which costs K + 1 forward passes instead of 2K.
        clip_norm: C, the largest norm of one example's coefficients.
        noise_multiplier: the noise's scale, divided by the sensitivity.
        expected_batch_size: the public constant that the sum is divided by.
    """

    noise_multiplier: float
    expected_batch_size: int
    clip_norm: float = 1.0

    @cached_property
    def mechanism(self) -> Mechanism:
        """The Gaussian mechanism on the sum of jointly clipped rows."""
        return GaussianSum(
            clip_norm=self.clip_norm,
            noise_multiplier=self.noise_multiplier,
            expected_batch_size=self.expected_batch_size,
        )

    @property
    def clipped(self) -> str:
        """The quantity that the clip norm bounds, in words: by default a row's coefficients, as one vector."""
        return "coefficient" if self.num_directions == 1 else f"{self.num_directions} coefficients, jointly"

    @property
    def noise_unit(self) -> str:
        """The unit of the noise multiplier, in words: by default the sensitivity of one vector."""
        return "clip norms"


def list_parameters(method: type[Method]) -> frozenset[str]:
    """Return the names of the parameters that `method` takes.

    >>> from hf_dpzo.methods import MeZO
    >>> sorted(list_parameters(MeZO))
    ['difference', 'num_directions', 'smoothing']
    """
    return frozenset(field.name for field in fields(method))


def list_required_parameters(method: type[Method]) -> frozenset[str]:
    """Return the names of the parameters of `method` that have no default."""
    return frozenset(field.name for field in fields(method) if field.default is MISSING)
