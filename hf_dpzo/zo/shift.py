"""Moves parameters for a while, to look at a model beside where it is. Afterwards they are the same to the bit."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from hf_dpzo.zo.directions import Directions


@contextmanager
def shifted(
    parameters: Mapping[int, torch.Tensor], directions: Directions, weights: Mapping[int, float]
) -> Iterator[None]:
    """Move parameters along directions of step 0 inside the context.

    Args:
        parameters: the parameters, by their numbers among those that `directions` are for.
        directions: the directions.
        weights: the distance along each direction, by the direction's number.

    >>> from hf_dpzo.zo.directions import Rademacher
    >>> parameter = torch.zeros(3)
    >>> with shifted({0: parameter}, Rademacher(seed=0, sizes=[3]), {0: 0.5}):
    ...     parameter.abs().tolist()
    [0.5, 0.5, 0.5]
    >>> parameter.tolist()
    [0.0, 0.0, 0.0]
    """
    copies = {index: parameter.detach().clone() for index, parameter in parameters.items()}
    try:
        with torch.no_grad():
            for index, parameter in parameters.items():
                directions.add_(parameter, index=index, step=0, weights=weights)
        yield
    finally:
        with torch.no_grad():
            for index, parameter in parameters.items():
                parameter.copy_(copies[index])
