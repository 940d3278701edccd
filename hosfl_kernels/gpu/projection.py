"""project: inner products with seeded directions, for all tensors of one dtype in one launch.

As in replay.py a tile stays in registers for all seeds. A tile's sum is float32: first down its columns, and then
across threads, which no other kernel does. torch adds the tiles' sums in float64.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from hosfl_kernels.place import Place
from hosfl_kernels.transfer import copy_records

from .choices import Shape
from .launch import CELLS, KINDS, Kernel, Kind, Variant, device_context, plan, seed_bits, tile_constants
from .noise import normals, sign_words, signed
from .rounding import to_float32
from .tile import existing_cells, is_empty, locate, pointers, rows_and_columns, segment


@triton.jit(do_not_specialize=["table", "row_of_program", "seeds", "count", "sums"])
def projection(
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
    """Write every tile's sums to `sums`, float64 [count, programs], which must be zeros: empty tiles write nothing."""
    ROWS: tl.constexpr = BLOCKS * INNER
    address, n, start, stream, factor, program = segment(table, row_of_program)
    first_row, first_col, at = locate(start, program, ROWS, WIDTH)
    if not is_empty(at, n, ROWS, WIDTH):
        outer, inner, lane = rows_and_columns(BLOCKS, INNER, WIDTH)
        col = first_col + lane.to(tl.uint32)
        address += at.to(tl.uint64) * (CELL.primitive_bitwidth // 8)
        pointer = pointers(address, outer, inner, lane, CELL, False)
        x = to_float32(tl.load(pointer, existing_cells(at, n, outer, inner, lane), 0))
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


def default(kind: Kind) -> Shape:
    """Tiles as `replay_` has them."""
    return Shape({"rademacher": 8, "gaussian": 4}[kind.dist], width=128, num_warps=4)


@functools.cache
def variant(kind: Kind, shape: Shape) -> Variant:
    """The variant for this kind and shape."""
    constants = {"CELL": CELLS[kind.dtype], "DIST": kind.dist}
    return Variant(projection, {**constants, **tile_constants(kind, shape)}, shape.num_warps)


# No stochastic kinds, since nothing is rounded to storage.
KERNEL = Kernel("project", variant, default, kinds=[kind for kind in KINDS if not kind.stochastic])
KERNELS = (KERNEL,)


SUMS = 1 << 23  # the number of tiles' sums in memory at a time: 64 MB


def project(tensors: Sequence[torch.Tensor], seeds: Sequence[int], place: Place) -> torch.Tensor:
    """<tensors, z(seed)> for every seed, float64 [R] on the CPU: the call waits for the device. Not for CUDA graphs.

    A pass over the tensors measures as many seeds as SUMS has room for.
    """
    if not tensors or not seeds:
        return torch.zeros(len(seeds), dtype=torch.float64, device="cpu")
    device = tensors[0].device
    with device_context(device):
        scalars = torch.zeros(len(seeds), dtype=torch.float64, device=device)
        table = copy_records(seed_bits(seeds), "project", device)
        for launch in plan(KERNEL, tensors, place):
            programs = len(launch.row_of_program)
            for part, totals in zip(*(t.split(max(SUMS // programs, 1)) for t in (table, scalars)), strict=True):
                sums = torch.zeros(len(part), programs, dtype=torch.float64, device=device)
                launch(part, len(part), sums.data_ptr())
                totals += sums.sum(1)
        return scalars.cpu()
