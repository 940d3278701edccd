"""perturb_rows_: x += scale * factor * z(seed) for rows of a table, each at its own place in the noise."""

import numpy as np
import torch
import triton
import triton.language as tl

from hosfl_kernels.place import Place

from .launch import CELLS, KINDS, Kind, Variant, device_context, float_bits
from .noise import GAUSSIAN_ROWS, normals, sign_words, signed
from .philox import COLS
from .rounding import from_float32, to_float32


@triton.jit(do_not_specialize=["numbers", "address", "d", "parts", "stream", "s_bits", "seed"])
def perturb_rows(
    numbers,
    address: tl.uint64,
    d: tl.int64,
    parts: tl.int32,
    stream: tl.uint32,
    s_bits: tl.int32,
    seed: tl.uint64,
    CELL: tl.constexpr,
    DIST: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Add noise to rows of d cells: a program has one of the `parts` of WIDTH cells into which a row is cut.

    Every cell makes its words itself.
    """
    k = tl.program_id(0) // parts
    cell = (tl.program_id(0) % parts).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)  # in the row
    mask = cell < d
    place = (tl.load(numbers + k) * d + cell).to(tl.uint64)  # in the table
    row = place // COLS
    col = (place % COLS).to(tl.uint32)
    zero = tl.zeros((WIDTH,), tl.int32)
    seed = seed.to(tl.uint64)
    stream = stream.to(tl.uint32)
    s = s_bits.to(tl.int32).to(tl.float32, bitcast=True)
    pointer = address.to(tl.uint64).to(tl.pointer_type(CELL)) + (k.to(tl.int64) * d + cell)
    x = to_float32(tl.load(pointer, mask))
    if DIST == "rademacher":
        a, b, c, e = sign_words(seed, stream, row, col)
        y = x + signed(s, a, b, c, e, row, zero, zero)
    else:
        y = x + s * normals(seed, stream, row, 0, (row % GAUSSIAN_ROWS).to(tl.int32), col)
    tl.store(pointer, from_float32(y, CELL, seed, stream, row, 0, 0, col, False), mask)


# Rows are few: no GPU has shapes of its own for this kernel.
KERNELS = ()
VARIANTS = {
    kind: Variant(perturb_rows, {"CELL": CELLS[kind.dtype], "DIST": kind.dist, "WIDTH": 256}, num_warps=2)
    for kind in KINDS
    if not kind.stochastic
}


def perturb_rows_(rows: torch.Tensor, numbers: torch.Tensor, seed: int, scale: float, place: Place) -> None:
    """x += scale * factor * z(seed) for every row, at its number's place in the table."""
    s = np.float32(scale) * np.float32(place.factors[0])
    with device_context(rows.device):
        variant, d = VARIANTS[Kind(rows.dtype, place.dist)], rows.shape[-1]
        parts = triton.cdiv(d, variant.constants["WIDTH"])
        arguments = (numbers, rows.data_ptr(), d, parts, place.streams[0], int(float_bits(s)), seed)
        variant.launch(numbers.numel() * parts, *arguments)
