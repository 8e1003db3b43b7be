"""The questions of a planner, in Python: how much noise, what it guarantees, and what a person with several rows gets.

Each function describes one run, and computes what `hf-dpzo calibrate` and `hf-dpzo epsilon` do: it checks a `Plan`, and
has `account_for_plan` account for it.
"""

from hf_dpzo.privacy.accounting import Guarantee
from hf_dpzo.privacy.planning import Plan, account_for_plan
from hf_dpzo.privacy.queries import GaussianQuery, LaplaceQuery


def calibrate(
    *,
    target_epsilon: float,
    target_delta: float,
    num_rows: int,
    expected_batch_size: int,
    max_steps: int,
    noise: str = "gaussian",
) -> GaussianQuery | LaplaceQuery:
    """Find the least noise with which a run meets a target, and return it as the release of one step.

    The `noise_multiplier` of the result is in units of the sensitivity: the clip norm, or for zoso and zopo sqrt(K)
    clip norms. Gaussian noise is found with the Rényi accountant and lowered with privacy loss distributions. Laplace
    noise follows from a closed form.

    Args:
        target_epsilon: the largest epsilon allowed, at `target_delta`, or for Laplace noise at delta 0.
        target_delta: the delta of the guarantee, well below one over `num_rows`.
        num_rows: the number of rows of training data.
        expected_batch_size: the mean number of rows in a batch; each row joins a batch independently of the others.
        max_steps: the number of steps of the whole run.
        noise: `gaussian` or `laplace`.

    Guarantee: `guarantee` gives the returned noise an epsilon of at most the target, for adding or removing one row.

    Raises:
        ValueError: no run could have this plan, no noise meets the target, or the target promises nothing.

    >>> query = calibrate(
    ...     target_epsilon=2.0, target_delta=1e-5, num_rows=5000, expected_batch_size=64, max_steps=1000
    ... )
    >>> round(query.noise_multiplier, 3), query.sampling_rate
    (1.096, 0.0128)
    """
    plan = Plan(
        noise=noise,
        target_epsilon=target_epsilon,
        target_delta=target_delta,
        num_rows=num_rows,
        expected_batch_size=expected_batch_size,
        max_steps=max_steps,
    )
    return account_for_plan(plan).query


def guarantee(
    *,
    noise_multiplier: float,
    target_delta: float,
    num_rows: int,
    expected_batch_size: int,
    max_steps: int,
    noise: str = "gaussian",
) -> Guarantee:
    """Account for all the steps of a run, and return upper bounds on its epsilon.

    Args:
        noise_multiplier: the noise's standard deviation, or Laplace's b, over the sensitivity: in clip norms, or for
            zoso and zopo in sqrt(K) clip norms.
        target_delta: the delta of the guarantee, well below one over `num_rows`.
        num_rows: the number of rows of training data.
        expected_batch_size: the mean number of rows in a batch; each row joins a batch independently of the others.
        max_steps: the number of steps of the whole run.
        noise: `gaussian` or `laplace`.

    Guarantee: the run is (`epsilon`, `target_delta`)-differentially private for adding or removing one row.

    Raises:
        ValueError: no run could have this plan, or its epsilon is so large that it promises nothing.

    >>> spent = guarantee(
    ...     noise_multiplier=1.0, target_delta=1e-5, num_rows=5000, expected_batch_size=50, max_steps=1000
    ... )
    >>> round(spent.epsilon, 3)
    1.828
    """
    plan = Plan(
        noise=noise,
        noise_multiplier=noise_multiplier,
        target_delta=target_delta,
        num_rows=num_rows,
        expected_batch_size=expected_batch_size,
        max_steps=max_steps,
    )
    return account_for_plan(plan).guarantee


def group_epsilon(
    *,
    rows_per_person: int,
    noise_multiplier: float,
    target_delta: float,
    num_rows: int,
    expected_batch_size: int,
    max_steps: int,
    noise: str = "gaussian",
) -> float:
    """Account for a run from the view of a person who has several of its rows, and return an upper bound on epsilon.

    The rows of a person join a batch independently, so the batch holds a binomial number of them (Ganesh 2024). For
    Laplace noise, the bound holds at delta 0.

    Args:
        rows_per_person: the largest number of rows that one person has, between 1 and 64.
        noise_multiplier: the noise's scale over the sensitivity of one row, as for `guarantee`.
        target_delta: the delta of the guarantee.
        num_rows: the number of rows of training data.
        expected_batch_size: the mean number of rows in a batch.
        max_steps: the number of steps of the whole run.
        noise: `gaussian` or `laplace`.

    Guarantee: the run is (epsilon, `target_delta`)-differentially private for adding or removing all rows of a person.
    Epsilon is infinite where no bound is known.

    Raises:
        ValueError: no run could have this plan, or the epsilon of one row is so large that it promises nothing.

    >>> epsilon = group_epsilon(
    ...     rows_per_person=2,
    ...     noise_multiplier=4.0,
    ...     target_delta=1e-5,
    ...     num_rows=5000,
    ...     expected_batch_size=50,
    ...     max_steps=100,
    ... )
    >>> round(epsilon, 2)
    0.17
    """
    plan = Plan(
        noise=noise,
        noise_multiplier=noise_multiplier,
        target_delta=target_delta,
        num_rows=num_rows,
        expected_batch_size=expected_batch_size,
        max_steps=max_steps,
    )
    return account_for_plan(plan).group_epsilon(rows_per_person)
