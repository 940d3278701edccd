"""project: inner products with seeded directions, for all tensors of one dtype in one launch.

As in replay.py a tile stays in registers while the seeds go by. A tile's sum is float32, of its columns first and then
across threads, the one place where values cross them; torch adds the tiles in float64.
"""

import triton
import triton.language as tl

from .noise import normals, sign_words, signed
from .rounding import to_float32
from .tile import exist, is_empty, locate, pointers, rows_and_columns, segment


@triton.jit(do_not_specialize=["table", "row_of_program", "seeds", "count", "sums"])
def project(
    table,
    row_of_program,
    seeds,
    count: tl.int32,
    sums: tl.uint64,
    CELL: tl.constexpr,
    DIST: tl.constexpr,
    BLOCKS: tl.constexpr,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """At `sums` are float64 [count, programs], zeros; an empty tile leaves them so."""
    ROWS: tl.constexpr = BLOCKS * INNER
    address, n, start, stream, factor, program = segment(table, row_of_program)
    first_row, first_col, at = locate(start, program, ROWS, WIDTH)
    if not is_empty(at, n, ROWS, WIDTH):
        outer, inner, lane = rows_and_columns(BLOCKS, INNER, WIDTH)
        col = first_col + lane.to(tl.uint32)
        address += at.to(tl.uint64) * (CELL.primitive_bitwidth // 8)
        pointer = pointers(address, outer, inner, lane, CELL, False)
        x = to_float32(tl.load(pointer, exist(at, n, outer, inner, lane), 0))
        mine = sums.to(tl.uint64).to(tl.pointer_type(tl.float64)) + tl.program_id(0)
        for record in range(count):
            seed = tl.load(seeds + record).to(tl.uint64)
            if DIST == "rademacher":
                a, b, c, d = sign_words(seed, stream, first_row, col)
                products = signed(x, a, b, c, d, first_row, outer, inner)
            else:
                products = x * normals(seed, stream, first_row, outer, inner, col)
            total = tl.sum(tl.sum(tl.sum(products, 0), 0), 0)
            tl.store(mine, total.to(tl.float64) * factor.to(tl.float64))
            mine += tl.num_programs(0)
