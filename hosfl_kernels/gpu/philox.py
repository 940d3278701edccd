"""Philox4x32-10 on tensors of counters, as in spec.py.

The ten rounds are written here because Triton's own `tl.philox` and `tl.rand` changed their stream in 3.4.
"""

import triton
import triton.language as tl

from hosfl_kernels import spec

COLS = tl.constexpr(spec.COLS)


@triton.jit
def philox(seed, c0, c1, c2, c3):
    """Four uint32 words for every counter (c0, c1, c2, c3), all uint32; the key is the uint64 scalar `seed`."""
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        # One 64-bit product is one instruction; a high and a low 32-bit product would be two.
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def column_words(seed, stream, row, col, ROWS: tl.constexpr, TAG: tl.constexpr):
    """The words of columns `col` in the blocks of ROWS rows that contain the rows `row` (int64, broadcast with col)."""
    block = row // ROWS * COLS
    low = block.to(tl.uint32) + col.to(tl.uint32)  # block is a multiple of COLS: no carry into the high word
    high = (block >> 32).to(tl.uint32)
    zero = low * 0
    return philox(seed, low, high + zero, stream + zero, TAG + zero)


@triton.jit(do_not_specialize=["seed", "c0", "c1", "c2", "c3"])
def words(out, seed: tl.uint64, c0: tl.uint32, c1: tl.uint32, c2: tl.uint32, c3: tl.uint32):
    """Write the four words of one counter to `out`, for a check against published words."""
    zero = tl.arange(0, 1).to(tl.uint32)
    four = philox(
        seed.to(tl.uint64),
        zero + c0.to(tl.uint32),
        zero + c1.to(tl.uint32),
        zero + c2.to(tl.uint32),
        zero + c3.to(tl.uint32),
    )
    for i in tl.static_range(4):
        tl.store(out + i + tl.arange(0, 1), four[i].to(tl.int32, bitcast=True))
