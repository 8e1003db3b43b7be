"""A kernel of Triton that draws signs on a GPU and adds them to many parameters in one launch.

It reads and writes each coordinate once, however many directions there are. Its bits are those of NumPy's Philox
4x64-10 (Salmon et al. 2011), chunk by chunk, so that a run that was trained on a GPU replays on a CPU.
"""

import triton
import triton.language as tl


# A program does this many counts of Philox. Each gives four words of 64 signs, for 256 coordinates.
COUNTS_PER_PROGRAM = tl.constexpr(32)
COORDINATES_PER_PROGRAM = 256 * COUNTS_PER_PROGRAM.value


# As CHUNK_SIZE is 2**16: the counts of a chunk that are used, of the 2**32 that it owns.
_COUNTS_PER_CHUNK = tl.constexpr(256)


# What `kind` says of the targets' bits.
FLOAT32, FLOAT16, BFLOAT16 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def draw_block(seed, domain, count, index, direction, step):
    """Return the four words of each count, uint64, that Philox 4x64-10 gives."""
    first = tl.full([1], 0xD2E7470EE14C6C93, tl.uint64)
    second = tl.full([1], 0xCA5A826395121157, tl.uint64)
    c0 = count.to(tl.uint64)
    c1 = tl.zeros_like(c0) + index.to(tl.uint64)
    c2 = tl.zeros_like(c0) + direction.to(tl.uint64)
    c3 = tl.zeros_like(c0) + step.to(tl.uint64)
    k0 = tl.zeros_like(c0) + seed.to(tl.uint64)
    k1 = tl.zeros_like(c0) + domain.to(tl.uint64)
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, tl.zeros_like(c0) + first)
        high2 = tl.umulhi(c2, tl.zeros_like(c0) + second)
        low0, low2 = c0 * first, c2 * second
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0 += tl.full([1], 0x9E3779B97F4A7C15, tl.uint64)
        k1 += tl.full([1], 0xBB67AE8584CAA73B, tl.uint64)
    return c0, c1, c2, c3


@triton.jit
def combine_signs(directions, weights, num_directions, seed, domain, first_count, index, step, counts: tl.constexpr):
    """Return `sum_k weights[k] * z_k` on the coordinates of `counts` counts, float32 `[256 * counts]`.

    The sum is taken in the order of k. There is no product in it, which a compiler might round together with the sum.
    """
    place = first_count + tl.arange(0, counts)
    counter = ((place // _COUNTS_PER_CHUNK) << 32) + place % _COUNTS_PER_CHUNK + 1  # NumPy counts before it draws.
    coordinate = tl.arange(0, 256 * counts)
    shift = (31 - coordinate % 32).to(tl.uint32)
    total = tl.full([256 * counts], -0.0, tl.float32)  # Adding to minus zero changes no bit.
    for k in range(num_directions):
        w0, w1, w2, w3 = draw_block(seed, domain, counter, index, tl.load(directions + k), step)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        halves = tl.reshape(tl.join(words.to(tl.uint32), (words >> 32).to(tl.uint32)), [8 * counts])
        # To gather them lets each thread draw some words, where a broadcast would let each draw all of them.
        signs = (tl.gather(halves, coordinate // 32, axis=0) << shift) & 0x80000000
        weight = tl.load(weights + k).to(tl.uint32, bitcast=True)
        total += (signs ^ weight).to(tl.float32, bitcast=True)
    return total


@triton.jit
def add_to(address, begin, total, place, inside, kind: tl.constexpr):
    """Add to the numbers from number `begin` at `address`, and round each once, to the nearest."""
    if kind == FLOAT32:
        target = address.to(tl.pointer_type(tl.float32)) + begin + place
        tl.store(target, tl.load(target, mask=inside) + total, mask=inside)
    elif kind == FLOAT16:
        target = address.to(tl.pointer_type(tl.float16)) + begin + place
        tl.store(target, (tl.load(target, mask=inside).to(tl.float32) + total).to(tl.float16), mask=inside)
    else:
        # By integers, because the interpreter of Triton cuts where a GPU rounds.
        target = address.to(tl.pointer_type(tl.uint16)) + begin + place
        wide = (tl.load(target, mask=inside).to(tl.uint32) << 16).to(tl.float32, bitcast=True) + total
        bits = wide.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet = (bits >> 16) | 0x40
        tl.store(target, tl.where(wide == wide, rounded, quiet).to(tl.uint16), mask=inside)


@triton.jit(do_not_specialize=["num_directions", "seed", "domain", "step"])
def add_signs(owners, table, directions, weights, num_directions, seed, domain, step, kind: tl.constexpr):
    """Add `sum_k weights[k] * z_k` to parts of parameters, in place.

    Args:
        owners: the number of the part that each program works on, int32 `[programs]`.
        table: of each part its address, its parameter's number, the parameter's coordinate that it begins at, how many
            it has, and its first program, int64 `[parts, 5]`.
        directions: the numbers of the directions, int64 `[K]`.
        weights: their weights, float32 `[K]`.
        num_directions: K.
        seed: the run's seed.
        domain: the other half of the key.
        step: the step.
        kind: the type of the parameters.
    """
    program = tl.program_id(0).to(tl.int64)
    row = table + tl.load(owners + program).to(tl.int64) * 5
    address, index, start = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    size, first_program = tl.load(row + 3), tl.load(row + 4)
    # A part may begin in the middle of a count, and in the middle of what a program does.
    group = start // (256 * COUNTS_PER_PROGRAM) + program - first_program
    total = combine_signs(
        directions, weights, num_directions, seed, domain, group * COUNTS_PER_PROGRAM, index, step, COUNTS_PER_PROGRAM
    )
    begin = group * (256 * COUNTS_PER_PROGRAM) - start
    place = tl.arange(0, 256 * COUNTS_PER_PROGRAM)
    first, last = tl.maximum(-begin, 0).to(tl.int32), tl.minimum(size - begin, 256 * COUNTS_PER_PROGRAM).to(tl.int32)
    add_to(address, begin, total, place, (place >= first) & (place < last), kind)
