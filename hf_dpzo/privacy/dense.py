"""dp-accounting's privacy loss distributions, composed in a shorter way and read without warnings: the same results."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from dp_accounting.pld import PLDAccountant, pld_pmf


# From so many releases on, dp-accounting itself goes on with a dense distribution, unless it has a single point.
_MANY = 64


@contextmanager
def dense_composition() -> Iterator[None]:
    """Let dp-accounting compose many releases inside without asking how large a sparse result could be.

    dp-accounting 0.6.0 answers by the number of points to the power of the number of releases, as a whole number: for
    ten million releases it has a hundred million digits, and takes a minute. Remove when it compares logarithms.
    """
    stock = pld_pmf.SparsePLDPmf.self_compose

    def compose(one: pld_pmf.SparsePLDPmf, num_times: int, tail_mass_truncation: float = 1e-15) -> pld_pmf.PLDPmf:
        chosen = one.to_dense_pmf().self_compose if num_times > _MANY else stock.__get__(one)
        return chosen(num_times, tail_mass_truncation)

    pld_pmf.SparsePLDPmf.self_compose = compose
    try:
        yield
    finally:
        pld_pmf.SparsePLDPmf.self_compose = stock


def read_epsilon(accountant: PLDAccountant, delta: float) -> float:
    """Return the epsilon of `accountant` at `delta`, without the warnings that a quotient of tiny masses overflows."""
    with np.errstate(over="ignore"):
        return float(accountant.get_epsilon(delta))
