"""What a run has spent, and what it may spend.

The ledger records every release when it happens. Every epsilon that is shown, logged or written to a card is computed
from the ledger, together with the planned steps that are still to come.
"""

import math
from numbers import Integral
from typing import Self

from hf_dpzo.io.html import format_html_table
from hf_dpzo.privacy.accounting import Guarantee, account
from hf_dpzo.privacy.queries import NonPrivateQuery, Query, Releases
from hf_dpzo.privacy.rounding import round_up


class BudgetExceededError(RuntimeError):
    """Raised before a step that the planned budget does not cover.

    >>> from hf_dpzo.privacy import Budget, GaussianQuery
    >>> query = GaussianQuery(noise_multiplier=1.0, sampling_rate=0.01)
    >>> budget = Budget(query=query, planned_steps=1, delta=1e-5)
    >>> budget.spend()
    >>> try:
    ...     budget.spend()
    ... except BudgetExceededError as error:
    ...     print(str(error).partition(";")[0])
    steps=1: the budget was planned for 1 steps, of which 0 are left
    """


class Ledger:
    """The releases of a run, in order. Equal releases in a row are counted together.

    >>> from hf_dpzo.privacy.queries import GaussianQuery
    >>> ledger = Ledger()
    >>> for _ in range(3):
    ...     ledger.append(GaussianQuery(noise_multiplier=1.0, sampling_rate=0.01))
    >>> len(ledger), len(ledger.releases)
    (3, 1)
    """

    def __init__(self, releases: Releases = ()) -> None:
        self._releases = list(releases)

    def append(self, query: Query, count: int = 1) -> None:
        """Record `count` releases of `query`."""
        if self._releases and self._releases[-1][0] == query:
            self._releases[-1] = (query, self._releases[-1][1] + count)
        elif count:
            self._releases.append((query, count))

    @property
    def releases(self) -> Releases:
        """The pairs of a query and the number of times that it ran in a row."""
        return tuple(self._releases)

    def __len__(self) -> int:
        return sum(count for _, count in self._releases)


# What a budget is planned with.
_PLAN = ("query", "planned_steps", "delta", "trials", "earlier", "report")


class Budget:
    """A plan of `planned_steps` releases of one query, and the ledger of those that happened.

    Args:
        query: what one step releases.
        planned_steps: the number of steps that the noise was chosen for. No further step is taken.
        delta: the delta at which epsilon is stated; `None` for a run without privacy.
        trials: the number of such runs on the same rows, this one among them. The stated epsilon covers all of them.
        earlier: what earlier runs on the same rows released. The stated epsilon covers that too.
        report: what all of these runs together release at their ends next to their steps, which is covered from the
            beginning, whether a run comes to its end or not.

    Guarantee: the stated epsilon covers every choice that the releases may lead to: when to stop, and which of the
    checkpoints and trials to publish.

    Raises:
        ValueError: `planned_steps` or `trials` is not a whole number of 1 or more, or `delta` is missing although there
            is noise, or given although there is none.

    >>> from hf_dpzo.privacy import GaussianQuery
    >>> budget = Budget(query=GaussianQuery(noise_multiplier=1.0, sampling_rate=0.01), planned_steps=500, delta=1e-5)
    >>> budget.spend()
    >>> round(budget.running_epsilon(), 2), round(budget.guarantee().epsilon, 2)
    (0.48, 1.33)
    """

    def __init__(
        self,
        *,
        query: Query,
        planned_steps: int,
        delta: float | None,
        trials: int = 1,
        earlier: Releases = (),
        report: Releases = (),
    ) -> None:
        if planned_steps < 1:
            raise ValueError(f"planned_steps={planned_steps}: a budget is for at least one step; set max_steps.")
        if not (isinstance(planned_steps, Integral) and isinstance(trials, Integral)):
            raise ValueError(
                f"planned_steps={planned_steps}, trials={trials}: steps and runs are counted whole; set max_steps and "
                "trials to whole numbers."
            )
        if trials < 1:
            raise ValueError(f"trials={trials}: this run is one of them; set 1 or more.")
        if (delta is None) != isinstance(query, NonPrivateQuery):
            raise ValueError(f"delta={delta}: {type(query).__name__} does not go with it; plan the run anew.")
        self.query = query
        self.planned_steps = planned_steps
        self.delta = delta
        self.trials = trials
        self.earlier = earlier
        self.report = report
        self.ledger = Ledger()
        self.closed = False

    @property
    def private(self) -> bool:
        """Whether an epsilon can be stated, because there is noise."""
        return self.delta is not None

    def require_steps(self, steps: int = 1) -> None:
        """Raise `BudgetExceededError` unless the plan has `steps` steps left. Call it before data are touched."""
        left = 0 if self.closed else self.planned_steps - len(self.ledger)
        if steps > left:
            raise BudgetExceededError(
                f"steps={steps}: the budget was planned for {self.planned_steps} steps, of which {left} are left; "
                "plan all the steps of a run at once, with max_steps."
            )

    def spend(self) -> None:
        """Record one release of the planned query."""
        self.require_steps()
        self.ledger.append(self.query)

    def copy_unspent(self) -> Self:
        """Return a budget with the same plan, of which nothing is spent."""
        return type(self)(**{name: getattr(self, name) for name in _PLAN})

    def has_same_plan(self, other: Self) -> bool:
        """Return whether `other` plans the same releases, and states the same for them."""
        return all(getattr(self, name) == getattr(other, name) for name in _PLAN)

    def close(self) -> None:
        """Allow no more steps."""
        self.closed = True

    @property
    def claimed_releases(self) -> Releases:
        """The releases that the guarantee covers: in the ledger, planned, of other trials and earlier runs, reports.

        A run may stop, or a checkpoint or a trial may be chosen, because of what the releases showed. A guarantee for
        the whole plan of all trials covers every such choice. A guarantee for the steps taken so far would not.
        """
        whole = Ledger(self.ledger.releases)
        whole.append(self.query, count=self.planned_steps - len(self.ledger) + self._other_trial_steps)
        for query, count in (*self.earlier, *self.report):
            whole.append(query, count)
        return whole.releases

    @property
    def claimed_steps(self) -> int:
        """The number of steps of this run and of all other trials."""
        return self.trials * self.planned_steps

    def guarantee(self) -> Guarantee:
        """Return the guarantee to state, which covers all claimed releases."""
        return account(self.claimed_releases, delta=self._stated_delta)

    def _repr_html_(self) -> str:
        rows = [("planned steps", self.planned_steps), ("steps taken", len(self.ledger))]
        if self.trials > 1:
            rows.append(("runs that epsilon covers", self.trials))
        if not self.private:
            return format_html_table([*rows, ("privacy", "none: there is no noise")], caption="Budget")
        rows += [
            ("noise multiplier", f"{self.query.noise_multiplier:.6g}"),
            ("sampling rate", f"{self.query.sampling_rate:.6g}"),
            ("epsilon spent so far", f"{round_up(self.running_epsilon()):g}"),
            ("epsilon of the plan", f"{round_up(self.guarantee().epsilon):g}"),
            ("delta", f"{self.delta:g}"),
        ]
        return format_html_table(rows, caption="Budget")

    def running_epsilon(self) -> float:
        """Return an upper bound on the epsilon spent so far, for logs.

        The accountants may take seconds. So steps are rounded up to a twentieth of the plan, and the accountants run
        about twenty times in a run, however often this is called. All steps of other trials count as taken.
        """
        stride = math.ceil(self.planned_steps / 20)
        steps = min(self.planned_steps, math.ceil(len(self.ledger) / stride) * stride)
        steps += self._other_trial_steps
        releases = (*(((self.query, steps),) if steps else ()), *self.earlier, *self.report)
        return account(releases, delta=self._stated_delta).epsilon

    @property
    def _other_trial_steps(self) -> int:
        return (self.trials - 1) * self.planned_steps

    @property
    def _stated_delta(self) -> float:
        if self.delta is None:
            raise ValueError("a run without noise has no epsilon: choose a private method, such as dpzero.")
        return self.delta
