"""Conversion of cells in memory to float32 and back.

bfloat16 is uint16 here, as in spec.py, and is rounded by integer operations: the interpreter truncates where the
hardware rounds to nearest, and neither rounds stochastically.
"""

import triton
import triton.language as tl

from hosfl_kernels import spec

from .philox import column_words

ROUNDING_ROWS = tl.constexpr(spec.ROUNDING_ROWS)
TAG_ROUNDING = tl.constexpr(spec.TAG_ROUNDING)


@triton.jit
def to_float32(cells):
    """Convert cells as they are in memory to float32; exact."""
    if cells.dtype == tl.uint16:
        return (cells.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return cells.to(tl.float32)


@triton.jit
def rounding_bits(seed, stream, first_row, outer, inner, col):
    """16 random bits for each cell of a tile whose `inner` rows are inside one block of ROUNDING_ROWS."""
    a, b, c, d = column_words(seed, stream, first_row + outer, col, ROUNDING_ROWS, TAG_ROUNDING)
    row = ((first_row + outer) % ROUNDING_ROWS).to(tl.int32) + inner
    pair = row // 2
    word = tl.where(pair < 2, tl.where(pair == 0, a, b), tl.where(pair == 2, c, d))
    return (word >> (row % 2 * 16).to(tl.uint32)) & 0xFFFF


@triton.jit
def from_float32(y, CELL: tl.constexpr, seed, stream, first_row, outer, inner, col, STOCHASTIC: tl.constexpr):
    """Round y to CELL: to nearest even or, for bfloat16 with STOCHASTIC, stochastically by the tile's random bits."""
    if CELL.is_int():
        bits = y.to(tl.uint32, bitcast=True)
        up = ((bits >> 16) & 1) + 0x7FFF
        if STOCHASTIC:
            up = rounding_bits(seed, stream, first_row, outer, inner, col)
        rounded = tl.where(tl.abs(y) < float("inf"), bits + up, bits)
        return (rounded >> 16).to(tl.uint16)
    else:
        return y.to(CELL)
