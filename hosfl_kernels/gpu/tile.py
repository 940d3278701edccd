"""How a tensor is cut into tiles of rows by columns, one per program, and how a tile is read and written.

A thread owns columns: it makes a column's random words once and walks down the rows, and no value crosses threads.
A cell of a tile is (outer, inner, column), and its row is first_row + outer + inner. What the `inner` rows of one block
of words share is computed once, in shape [OUTER, 1, WIDTH].
"""

import triton
import triton.language as tl

from .philox import COLS

FIELDS = tl.constexpr(8)  # numbers in a row of the table of tensors: see `launch.Launch`


@triton.jit
def locate(start, program, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """(first row, first column, position of the first cell in the tensor) of a program's tile.

    Tiles are aligned to the blocks of the noise, not to the tensor: the position may be negative.
    """
    tile = program.to(tl.uint64)
    first_row = start // (ROWS * COLS) * ROWS + tile // (COLS // WIDTH) * ROWS
    first_col = (tile % (COLS // WIDTH) * WIDTH).to(tl.uint32)
    at = (first_row * COLS + first_col - start).to(tl.int64)
    return first_row, first_col, at


@triton.jit
def segment(table, row_of_program):
    """Read what a program needs of its tensor: see `launch.Launch`.

    Returns (address, elements, start, stream, factor, number of the program among the tensor's).
    """
    program = tl.program_id(0)
    row = table + tl.load(row_of_program + program) * FIELDS
    address = tl.load(row).to(tl.uint64)
    n = tl.load(row + 1)
    start = tl.load(row + 2).to(tl.uint64)
    stream = tl.load(row + 3).to(tl.uint32)
    factor = tl.load(row + 4).to(tl.int32).to(tl.float32, bitcast=True)
    return address, n, start, stream, factor, program - tl.load(row + 5).to(tl.int32)


@triton.jit
def moment_address(table, row_of_program, k: tl.constexpr):
    """Read the address of moment k of a program's tensor."""
    row = table + tl.load(row_of_program + tl.program_id(0)) * FIELDS
    return tl.load(row + 6 + k).to(tl.uint64)


@triton.jit
def is_full(address, at, n, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Whether every cell of the tile is in the tensor, and its first one, at `address`, is aligned to 16 bytes."""
    return (at >= 0) & (at + ((ROWS - 1) * COLS + WIDTH) <= n) & (address % 16 == 0)


@triton.jit
def is_empty(at, n, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Whether the whole tile is before or after the tensor's cells."""
    return (at >= n) | (at + ((ROWS - 1) * COLS + WIDTH) <= 0)


@triton.jit
def rows_and_columns(OUTER: tl.constexpr, INNER: tl.constexpr, WIDTH: tl.constexpr):
    """The indices (outer, inner, column) of a tile's cells: [OUTER, 1, 1], [1, INNER, 1], [1, 1, WIDTH]."""
    outer = (tl.arange(0, OUTER) * INNER)[:, None, None]
    inner = tl.arange(0, INNER)[None, :, None]
    lane = tl.arange(0, WIDTH)[None, None, :]
    return outer, inner, lane


@triton.jit
def pointers(address, outer, inner, lane, CELL: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to the cells of the tile at `address`. ALIGNED: the address is known to be a multiple of 16."""
    if ALIGNED:
        # The compiler makes 16-byte accesses only if it knows the alignment.
        first = tl.multiple_of((address // 16 * 16).to(tl.pointer_type(CELL)), 16)
    else:
        first = address.to(tl.pointer_type(CELL))
    # In this order the rows become constant offsets from one address per column.
    return first + lane + (outer + inner) * COLS


@triton.jit
def existing_cells(at, n, outer, inner, lane):
    """The mask of the tile's cells that are in the tensor."""
    begin = tl.maximum(-at, 0).to(tl.int32)
    end = tl.minimum(n - at, 1 << 30).to(tl.int32)
    cell = lane + (outer + inner) * COLS
    return (cell >= begin) & (cell < end)
