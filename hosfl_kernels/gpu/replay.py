"""replay_: many records in one pass over the weights, for all tensors of one dtype in one launch.

A tile stays in registers for all records, and is rounded to the weights' dtype after each, so that the bits are those
of one perturb_ after another. A thread has one column of many rows: memory is accessed once for all records, so that
wide accesses matter less than making few random words.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from hosfl_kernels.place import Place
from hosfl_kernels.transfer import copy_records

from .choices import Shape
from .launch import (
    CELLS,
    Kernel,
    Kind,
    Variant,
    device_context,
    float_bits,
    float_bits_on_device,
    plan,
    run,
    seed_bits,
    tile_constants,
)
from .noise import normals, sign_words, signed
from .perturb import ON_DEVICE
from .rounding import from_float32, to_float32
from .tile import existing_cells, is_empty, locate, pointers, rows_and_columns, segment


@triton.jit(do_not_specialize=["table", "row_of_program", "records", "count"])
def replay(
    table,
    row_of_program,
    records,
    count: tl.int32,
    CELL: tl.constexpr,
    DIST: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCKS: tl.constexpr,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Apply `count` records to all tensors. A record is int64: seed, float32 coefficient's bits, rounding seed."""
    ROWS: tl.constexpr = BLOCKS * INNER
    address, n, start, stream, factor, program = segment(table, row_of_program)
    first_row, first_col, at = locate(start, program, ROWS, WIDTH)
    if not is_empty(at, n, ROWS, WIDTH):
        outer, inner, lane = rows_and_columns(BLOCKS, INNER, WIDTH)
        col = first_col + lane.to(tl.uint32)
        address += at.to(tl.uint64) * (CELL.primitive_bitwidth // 8)
        pointer = pointers(address, outer, inner, lane, CELL, False)
        mask = existing_cells(at, n, outer, inner, lane)
        x = to_float32(tl.load(pointer, mask))
        for record in range(count):
            seed = tl.load(records + record * 3).to(tl.uint64)
            s = tl.load(records + record * 3 + 1).to(tl.int32).to(tl.float32, bitcast=True) * factor
            rounding_seed = tl.load(records + record * 3 + 2).to(tl.uint64)
            if DIST == "rademacher":
                a, b, c, d = sign_words(seed, stream, first_row, col)
                y = x + signed(s, a, b, c, d, first_row, outer, inner)
            else:
                y = x + s * normals(seed, stream, first_row, outer, inner, col)
            x = to_float32(from_float32(y, CELL, rounding_seed, stream, first_row, outer, inner, col, STOCHASTIC))
        # x is already rounded to CELL: this store is exact, and rounds to nearest.
        tl.store(pointer, from_float32(x, CELL, 0, stream, first_row, outer, inner, col, False), mask)


def default(kind: Kind) -> Shape:
    """Tiles of 128 columns, one per thread: 64 rows of signs or 16 of normal numbers in registers."""
    return Shape({"rademacher": 8, "gaussian": 4}[kind.dist], width=128, num_warps=4)


@functools.cache
def variant(kind: Kind, shape: Shape) -> Variant:
    """The variant for this kind and shape."""
    constants = {"CELL": CELLS[kind.dtype], "DIST": kind.dist, "STOCHASTIC": kind.stochastic}
    return Variant(replay, {**constants, **tile_constants(kind, shape)}, shape.num_warps)


KERNEL = Kernel("replay", variant, default)
KERNELS = (KERNEL,)


def record_table(seeds: Sequence[int], coefficients: Any, rounding_seeds: Any) -> np.ndarray:
    """Make the table of records that the kernel reads: int64 [R, 3], see `replay`."""
    rows = np.empty((len(seeds), 3), np.int64)
    rows[:, 0] = seed_bits(seeds)
    rows[:, 1] = float_bits(coefficients)
    rows[:, 2] = 0 if rounding_seeds is None else seed_bits(rounding_seeds)
    return rows


def replay_(
    tensors: Sequence[torch.Tensor],
    seeds: Sequence[int] | torch.Tensor,
    coefficients: Sequence[float] | torch.Tensor,
    place: Place,
    rounding_seeds: Sequence[int] | torch.Tensor | None,
) -> None:
    """perturb_ once for every record, in one pass over the tensors and to the same bits.

    Records that are tensors are on the device, and a CUDA graph can capture the call. A single record is applied by the
    kernel of perturb_, whose memory accesses are wider.
    """
    if not tensors or not len(seeds):
        return
    device, stochastic = tensors[0].device, rounding_seeds is not None
    with device_context(device):
        if isinstance(seeds, torch.Tensor):
            records = _record_table_on_device(seeds, coefficients, rounding_seeds)
        else:
            records = copy_records(
                record_table(seeds, coefficients, rounding_seeds), "replay_ of records on the host", device
            )
        if len(seeds) == 1:
            run(plan(ON_DEVICE, tensors, place, stochastic), records, 0, 0, 0)
        else:
            run(plan(KERNEL, tensors, place, stochastic), records, len(seeds))


def _record_table_on_device(seeds: torch.Tensor, coefficients: Any, rounding_seeds: Any) -> torch.Tensor:
    """Make `record_table` of tensors on the device, without a copy to the host."""
    rounding = torch.zeros_like(seeds) if rounding_seeds is None else rounding_seeds
    return torch.stack([seeds, float_bits_on_device(coefficients), rounding], 1)
