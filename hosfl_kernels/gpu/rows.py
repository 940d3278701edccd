"""perturb_rows_: x += scale * factor * z(seed) for rows of a table, each at its own place in the noise."""

import numpy as np
import torch
import triton
import triton.language as tl

from hosfl_kernels.place import Place

from .launch import CELLS, KINDS, Kind, Variant, device_context, float_bits
from .noise import normals, sign_words, signed
from .philox import COLS
from .rounding import from_float32, to_float32


@triton.jit(do_not_specialize=["numbers", "address", "n", "d", "stream", "s_bits", "seed"])
def perturb_rows(
    numbers,
    address: tl.uint64,
    n: tl.int64,
    d: tl.int64,
    stream: tl.uint32,
    s_bits: tl.int32,
    seed: tl.uint64,
    CELL: tl.constexpr,
    DIST: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Add noise to n cells, rows of d: COUNT of them per program. Every cell makes its words itself: rows are few."""
    cell = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    mask = cell < n
    place = tl.load(numbers + cell // d, mask, 0) * d + cell % d  # in the table
    row = place // COLS
    col = (place % COLS).to(tl.uint32)
    zero = (cell * 0).to(tl.int32)
    seed = seed.to(tl.uint64)
    stream = stream.to(tl.uint32)
    s = s_bits.to(tl.int32).to(tl.float32, bitcast=True)
    pointer = address.to(tl.uint64).to(tl.pointer_type(CELL)) + cell
    x = to_float32(tl.load(pointer, mask))
    if DIST == "rademacher":
        a, b, c, d_ = sign_words(seed, stream, row, col)
        y = x + signed(s, a, b, c, d_, row, zero, zero)
    else:
        y = x + s * normals(seed, stream, row, zero, (row % 4).to(tl.int32), col)
    tl.store(pointer, from_float32(y, CELL, seed, stream, row, zero, zero, col, False), mask)


# Rows are few: no GPU has shapes of its own for this kernel.
KERNELS = ()
VARIANTS = {
    kind: Variant(perturb_rows, {"CELL": CELLS[kind.dtype], "DIST": kind.dist, "COUNT": 1024}, num_warps=4)
    for kind in KINDS
    if not kind.stochastic
}


def perturb_rows_(rows: torch.Tensor, numbers: torch.Tensor, seed: int, scale: float, place: Place) -> None:
    """x += scale * factor * z(seed) for every row, at its number's place in the table."""
    s = np.float32(scale) * np.float32(place.factors[0])
    with device_context(rows.device):
        n = rows.numel()
        variant = VARIANTS[Kind(rows.dtype, place.dist)]
        programs = triton.cdiv(n, variant.constants["COUNT"])
        variant.launch(
            programs, numbers, rows.data_ptr(), n, rows.shape[-1], place.streams[0], int(float_bits(s)), seed
        )
