"""Checksums of the values that a sweep leaves, taken while each chunk is still in the core's cache.

Whatever is to stay as a sweep left it is then read from memory only once more, to be compared.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from hf_dpzo.distributed.checksums import compile_kernel, count_sums, finish_checksum, sum_array
from hf_dpzo.zo.philox import CHUNK_SIZE


_SUMS_PER_CHUNK = count_sums(4 * CHUNK_SIZE)


@dataclass(frozen=True, kw_only=True)
class _Swept:
    """What is known of a parameter.

    Args:
        parameter: the tensor that was swept.
        version: torch's count of the writes into it, when the sweep ended.
        checksum: the checksum of its values.
    """

    parameter: weakref.ref
    version: int
    checksum: int


class SweptChecksums:
    """The checksums of parameters as sweeps have left them.

    A write that torch counts makes a checksum unknown. Any other write leaves the checksum of what the sweep wrote, and
    whoever compares finds that write.
    """

    def __init__(self) -> None:
        self._swept: dict[int, _Swept] = {}
        self._sums: dict[int, np.ndarray] = {}

    @contextmanager
    def sweep(self, parameter: torch.Tensor, index: int, *, takes_sums: bool) -> Iterator[None]:
        """Open a sweep over all of the `index`-th parameter; after it the checksum is known if all sums were taken."""
        self._swept.pop(index, None)
        self._sums.pop(index, None)
        is_plain = type(parameter) in (torch.Tensor, torch.nn.Parameter) and not parameter.is_inference()
        if not (takes_sums and is_plain and parameter.device.type == "cpu" and parameter.dtype == torch.float32):
            yield
            return
        compile_kernel()
        sums = self._sums[index] = np.zeros(count_sums(parameter.nbytes), dtype=np.int64)
        yield
        del self._sums[index]
        checksum = finish_checksum([(torch.from_numpy(sums), parameter.nbytes)])
        known = _Swept(parameter=weakref.ref(parameter), version=parameter._version, checksum=checksum)
        self._swept[index] = known

    def take(self, piece: np.ndarray, index: int, chunk: int) -> None:
        """Take the sums of one chunk, within a sweep, in any thread."""
        sums = self._sums.get(index)
        if sums is not None:
            first = chunk * _SUMS_PER_CHUNK
            sum_array(piece.view(np.uint8), sums[first : first + count_sums(piece.nbytes)], compile_kernel())

    def find(self, parameters: Sequence[torch.Tensor]) -> dict[torch.Tensor, int]:
        """Return the checksums that are known of `parameters`, which are in the order of the directions."""
        known = ((parameter, self._swept.get(index)) for index, parameter in enumerate(parameters))
        return {
            parameter: swept.checksum
            for parameter, swept in known
            if swept is not None and swept.parameter() is parameter and swept.version == parameter._version
        }
