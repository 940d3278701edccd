"""perturb_: x += scale * factor * z(seed), for all tensors of one dtype in one launch.

Seed and scale are arguments of the kernel, or are read from a record on the device, as by `replay_`: a CUDA graph then
reads their current values when it is replayed.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from hosfl_kernels.place import Place

from .choices import Shape
from .launch import CELLS, Kernel, Kind, Variant, device_context, float_bits, plan, run, tile_constants
from .noise import normals, sign_words, signed
from .philox import COLS
from .rounding import from_float32, to_float32
from .tile import existing_cells, is_empty, is_full, locate, pointers, rows_and_columns, segment


@triton.jit
def add_noise(
    address,
    at,
    n,
    first_row,
    first_col,
    stream,
    s,
    seed,
    rounding_seed,
    CELL: tl.constexpr,
    DIST: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCKS: tl.constexpr,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
    FULL: tl.constexpr,
):
    """Add s * z(seed) to the tile at `address`. FULL: see `tile.is_full`."""
    outer, inner, lane = rows_and_columns(1, INNER, WIDTH)
    col = first_col + lane.to(tl.uint32)
    if DIST == "rademacher":
        a, b, c, d = sign_words(seed, stream, first_row, col)
    for _ in range(BLOCKS):
        pointer = pointers(address, outer, inner, lane, CELL, FULL)
        mask = None if FULL else existing_cells(at, n, outer, inner, lane)
        x = to_float32(tl.load(pointer, mask))
        if DIST == "rademacher":
            y = x + signed(s, a, b, c, d, first_row, outer, inner)
        else:
            y = x + s * normals(seed, stream, first_row, outer, inner, col)
        rounded = from_float32(y, CELL, rounding_seed, stream, first_row, outer, inner, col, STOCHASTIC)
        tl.store(pointer, rounded, mask)
        address += INNER * COLS * (CELL.primitive_bitwidth // 8)
        at += INNER * COLS
        first_row += INNER


@triton.jit(do_not_specialize=["table", "row_of_program", "records", "seed", "scale_bits", "rounding_seed"])
def perturb(
    table,
    row_of_program,
    records,
    seed: tl.uint64,
    scale_bits: tl.int32,
    rounding_seed: tl.uint64,
    CELL: tl.constexpr,
    DIST: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    BLOCKS: tl.constexpr,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Add noise to all tensors. ON_DEVICE: read seed, scale and rounding seed from one record; see replay.py."""
    ROWS: tl.constexpr = BLOCKS * INNER
    SIZE: tl.constexpr = CELL.primitive_bitwidth // 8
    address, n, start, stream, factor, program = segment(table, row_of_program)
    first_row, first_col, at = locate(start, program, ROWS, WIDTH)
    address += at.to(tl.uint64) * SIZE
    if ON_DEVICE:
        seed = tl.load(records).to(tl.uint64)
        scale_bits = tl.load(records + 1).to(tl.int32)
        rounding_seed = tl.load(records + 2).to(tl.uint64)
    s = scale_bits.to(tl.float32, bitcast=True) * factor
    seed = seed.to(tl.uint64)
    rounding_seed = rounding_seed.to(tl.uint64)
    if is_full(address, at, n, ROWS, WIDTH):
        add_noise(
            address,
            at,
            n,
            first_row,
            first_col,
            stream,
            s,
            seed,
            rounding_seed,
            CELL,
            DIST,
            STOCHASTIC,
            BLOCKS,
            INNER,
            WIDTH,
            True,
        )
    else:
        PART: tl.constexpr = WIDTH // 2
        for part in range(BLOCKS * 2):
            down = part // 2 * INNER
            right = part % 2 * PART
            skip = down * COLS + right
            if not is_empty(at + skip, n, INNER, PART):
                add_noise(
                    address + (skip * SIZE).to(tl.uint64),
                    at + skip,
                    n,
                    first_row + down.to(tl.uint64),
                    first_col + right.to(tl.uint32),
                    stream,
                    s,
                    seed,
                    rounding_seed,
                    CELL,
                    DIST,
                    STOCHASTIC,
                    1,
                    INNER,
                    PART,
                    False,
                )


def default(kind: Kind) -> Shape:
    """Tiles of 512 columns, with 16 bytes of each row per thread.

    16 rows of signs make the cost of a Philox call per element small enough. With 128 rows most of a GPU would be idle
    for a tensor of a million elements.
    """
    return Shape(blocks=2, width=512, num_warps=512 * kind.dtype.itemsize // (16 * 32))


@functools.cache
def variant(on_device: bool, kind: Kind, shape: Shape) -> Variant:
    """The variant for this kind and shape. on_device: see ON_DEVICE of the kernel."""
    constants = {"CELL": CELLS[kind.dtype], "DIST": kind.dist, "STOCHASTIC": kind.stochastic, "ON_DEVICE": on_device}
    return Variant(perturb, {**constants, **tile_constants(kind, shape)}, shape.num_warps)


BY_VALUE = Kernel("perturb", functools.partial(variant, False), default, wide=True)
ON_DEVICE = Kernel("perturb-on-device", functools.partial(variant, True), default, wide=True)
KERNELS = (BY_VALUE, ON_DEVICE)


def perturb_(tensors: Sequence[torch.Tensor], seed: int, scale: float, place: Place, rounding_seed: int | None) -> None:
    """x += scale * factor * z(seed) for every tensor, one launch per dtype."""
    if not tensors:
        return
    with device_context(tensors[0].device):
        launches = plan(BY_VALUE, tensors, place, rounding_seed is not None)
        unused_records = launches[0].rows if launches else None  # the kernel takes a pointer, and does not read it
        run(launches, unused_records, seed, int(float_bits(scale)), rounding_seed or 0)
