"""What a run will promise, cost and take, told before its first look at a private row."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from hf_dpzo.card.claim import FALSE_ALARMS
from hf_dpzo.card.model_card import format_percent
from hf_dpzo.data_ledger.total import describe_epsilon
from hf_dpzo.io.figures import show_figures
from hf_dpzo.privacy.accounting import MAX_EPSILON, account_for_group
from hf_dpzo.privacy.interpretation import detection_rate, group_attacks, membership_accuracy
from hf_dpzo.privacy.ledger import Budget
from hf_dpzo.privacy.rounding import round_up


# The numbers of rows of a person for which it is said what a run promises.
PERSONS = (1, 2, 4)


@dataclass(frozen=True, kw_only=True)
class Promise:
    """What a run promises a person with some rows. Each number is an upper bound, rounded up.

    Args:
        rows: the number of the person's rows, or 1 for a user with all of theirs.
        epsilon: epsilon at the plan's delta; infinite where no bound is known.
        membership: how often the best guess whether the person took part is right, from even odds.
        detection: the share of people that an attacker detects at 1 % false alarms.
    """

    rows: int
    epsilon: float
    membership: float
    detection: float

    @classmethod
    def of(cls, budget: Budget, rows: int) -> Self:
        """Return what `budget` promises a person with `rows` rows.

        >>> from hf_dpzo.privacy import GaussianQuery
        >>> query = GaussianQuery(noise_multiplier=2.0, sampling_rate=1.0)
        >>> promise = Promise.of(Budget(query=query, planned_steps=1, delta=1e-5), 1)
        >>> round(promise.epsilon, 1), round(promise.membership, 2), promise.detection < 0.1
        (2.0, 0.6, True)
        """
        releases, delta = budget.claimed_releases, budget.delta
        if rows == 1:
            epsilon = budget.guarantee().epsilon
            membership = membership_accuracy(releases, delta=delta)
            detection = detection_rate(releases, delta=delta, false_alarms=FALSE_ALARMS)
        else:
            epsilon = account_for_group(releases, size=rows, delta=delta)
            membership, detection = group_attacks(releases, size=rows, delta=delta, false_alarms=FALSE_ALARMS)
        bounds = {"membership": min(1.0, round_up(membership)), "detection": min(1.0, round_up(detection))}
        return cls(rows=rows, epsilon=round_up(epsilon) if epsilon <= MAX_EPSILON else epsilon, **bounds)


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What a run will promise, cost and take. Nothing in it depends on a private row, but for their number.

    Args:
        method: the name of the method.
        units: the number of units of privacy, which is public.
        unit: what a unit is, row or user.
        rows: the number of rows; `None` where users are the units, whose rows are not public.
        batch_size: the number of units in a step on average.
        steps: the number of steps.
        evaluated: the number of rows that all steps evaluate, on average, at each of their probe points.
        passes: the number of probe points of a step.
        trials: the number of runs that epsilon covers.
        delta: the delta of the promises; `None` without privacy.
        noise_multiplier: the noise's scale over the sensitivity; `None` without privacy.
        promises: what the run promises, by the number of rows of a person; empty without privacy.
        noise_share: the noise on a coefficient, its standard deviation over the largest signal that a step can have,
            which all rows of a batch give together where they agree; `None` without privacy.
        clipped: the share of public or made-up rows that would be clipped at the start, if that is known.
        limits: what limits the run, in words, if that is known.
        ledger: where the ledger of the data is, and what it holds so far; `None` without one.
        ledger_runs: the number of runs in the ledger of the data, with this one; `None` without a ledger.
        ledger_epsilon: epsilon of all of them together; `None` without a ledger, or if one of them adds no noise.
        log_bytes: the size of the log of the whole run; `None` if the run would be refused.
        seconds_before: the seconds that loading and checking took, and will take again.
        seconds_reading: the seconds in which what is computed once of each row is computed.
        seconds_per_step: the seconds of a step; `None` if the run would be refused.
        memory_bytes: the peak memory of model, rows and a step, without Python and its libraries.
        tried: the rows that this was tried on.
        refusals: what training would refuse, a sentence each.
        missing: libraries that are not there, and what they are for.
    """

    method: str
    units: int
    unit: str
    rows: int | None
    batch_size: int
    steps: int
    evaluated: int
    passes: int
    trials: int
    sampling_rate: float
    delta: float | None = None
    noise_multiplier: float | None = None
    pure_epsilon: float | None = None
    promises: tuple[Promise, ...] = ()
    noise_share: float | None = None
    clipped: float | None = None
    limits: str | None = None
    ledger: str | None = None
    ledger_runs: int | None = None
    ledger_epsilon: float | None = None
    log_bytes: int | None = None
    seconds_before: float = 0.0
    seconds_reading: float = 0.0
    seconds_per_step: float | None = None
    memory_bytes: int | None = None
    tried: str | None = None
    refusals: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def seconds(self) -> float | None:
        """The seconds of the whole run, without evaluation; `None` if it would be refused."""
        if self.seconds_per_step is None:
            return None
        return self.seconds_before + self.seconds_reading + self.steps * self.seconds_per_step

    def as_json(self) -> Mapping[str, Any]:
        """Return the plan as JSON, with an epsilon of `null` where no bound is known."""
        plan = {**asdict(self), "seconds": self.seconds}
        for promise in plan["promises"]:
            promise["epsilon"] = promise["epsilon"] if promise["epsilon"] <= MAX_EPSILON else None
        return plan

    def as_lines(self) -> list[tuple[str, str]]:
        """Return the plan as lines of a table, a name and a value each."""
        return [
            *self._describe_rows(),
            *self._describe_privacy(),
            *self._describe_ledger(),
            *self._describe_work(),
            *(("would be refused", sentence) for sentence in self.refusals),
            *(("not installed", sentence) for sentence in self.missing),
        ]

    def _describe_rows(self) -> list[tuple[str, str]]:
        users = [] if self.unit == "row" else [("users", str(self.units))]
        return [
            ("method", self.method),
            *users,
            *([] if self.rows is None else [("rows", str(self.rows))]),
            (f"{self.unit}s in a step, on average", str(self.batch_size)),
            ("sampling rate", f"{self.sampling_rate:.6g}"),
            ("steps", str(self.steps)),
        ]

    def _describe_privacy(self) -> list[tuple[str, str]]:
        if self.delta is None:
            return [("privacy", "none: the method adds no noise")]
        lines = [("noise multiplier", f"{self.noise_multiplier:.6g}")]
        for promise in self.promises:
            lines += self._describe_promise(promise)
        if self.pure_epsilon is not None:
            lines.append(("pure epsilon", f"{round_up(self.pure_epsilon):g} (delta 0)"))
        share = f"{show_figures(100 * self.noise_share, 3)} % of the largest possible signal"
        return [*lines, ("runs that epsilon covers", str(self.trials)), ("noise of a step", share)]

    def _describe_ledger(self) -> list[tuple[str, str]]:
        place = [] if self.ledger is None else [("ledger", self.ledger)]
        if self.ledger_runs is None:
            return place
        return [
            *place,
            ("runs on these data, with this one", str(self.ledger_runs)),
            describe_epsilon(self.ledger_epsilon),
        ]

    def _describe_promise(self, promise: Promise) -> list[tuple[str, str]]:
        if self.unit == "user":
            who = "a user"
        else:
            who = f"a person with {promise.rows} {'row' if promise.rows == 1 else 'rows'}"
        if promise.epsilon > MAX_EPSILON:
            return [(f"epsilon of {who}", "no bound is known")]
        words = (
            f"whether they took part is guessed right {format_percent(promise.membership)} of the time at most; at 1 % "
            f"false alarms, {format_percent(promise.detection)} are detected"
        )
        return [(f"epsilon of {who}", f"{promise.epsilon:g} at delta {self.delta:g}: {words}")]

    def _describe_work(self) -> list[tuple[str, str]]:
        settings = "setting" if self.passes == 1 else "settings"
        work = f"{self.evaluated} in all steps, each with {self.passes} nearby {settings} of the weights"
        lines = [(f"{self.unit}s evaluated, on average", work)]
        if self.limits is not None:
            lines.append(("what limits it", self.limits))
        if self.seconds_per_step is not None:
            run = f"{self.seconds:.0f}, of which {self.seconds_before:.0f} before the first step"
            reading = f" and {self.seconds_reading:.0f} to read the rows once" if self.seconds_reading else ""
            lines += [
                ("seconds of a step", f"{show_figures(self.seconds_per_step)}, tried on {self.tried}"),
                ("seconds of the run", f"{run}{reading}; evaluation comes on top"),
                ("memory", f"{self.memory_bytes / 2**20:.0f} MiB, besides Python and its libraries"),
            ]
        if self.log_bytes is not None:
            lines.append(("size of the log", f"{self.log_bytes / 1000:.1f} KB"))
        return lines
