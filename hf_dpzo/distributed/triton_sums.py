"""A kernel of Triton that takes the sums of `checksums` for many tensors in one launch, reading each byte once."""

import triton
import triton.language as tl


@triton.jit
def sum_words(owners, table, factors, sums):
    """Write the weighted sum of each run of 2,048 words, modulo 2**64.

    Args:
        owners: the number of the tensor that each program works on, int32 `[sums]`.
        table: of each tensor its address, its number of bytes, a multiple of 4, and its first program, int64
            `[tensors, 3]`.
        factors: int64 `[2048]`.
        sums: int64 `[sums]`, written to.
    """
    program = tl.program_id(0).to(tl.int64)
    row = table + tl.load(owners + program).to(tl.int64) * 3
    address, num_bytes, block = tl.load(row), tl.load(row + 1), program - tl.load(row + 2)
    word = tl.arange(0, 2048)
    halves = address.to(tl.pointer_type(tl.int32)) + block * 4096 + 2 * word
    place = block * 16384 + 8 * word
    low = tl.load(halves, mask=place < num_bytes, other=0).to(tl.int64) & 0xFFFFFFFF
    high = tl.load(halves + 1, mask=place + 4 < num_bytes, other=0).to(tl.int64)
    mixed = low + (high << 32) + high
    tl.store(sums + program, tl.sum(mixed * tl.load(factors + word), axis=0))
