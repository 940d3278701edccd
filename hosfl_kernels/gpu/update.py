"""update_: many rounds of an update rule in one pass over weights and moments, one launch per dtype.

As in replay.py a tile stays in registers, here with its moments and the sum over a round's directions: fewer rows to a
thread.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from hosfl_kernels.place import Place

from .choices import Shape
from .launch import (
    CELLS,
    TRITON,
    Kernel,
    Kind,
    Variant,
    float_bits,
    on_device,
    plan,
    reach,
    run,
    seed_bits,
    tile_constants,
)
from .noise import normals, sign_words, signed
from .rounding import from_float32, to_float32
from .tile import exist, is_empty, locate, moment_address, pointers, rows_and_columns, segment

CONSTANTS = tl.constexpr(5)  # numbers of the rule before the first round
STEP = tl.constexpr(4)  # numbers of a round before its directions


@triton.jit
def number(table, index):
    """A float32 from a table of int64."""
    return tl.load(table + index).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def root_of(v):
    """sqrt(v), rounded to nearest; the root is taken of normal numbers only.

    2^64 v has the root 2^32 sqrt(v), and neither product rounds. With a plain tl.sqrt_rn(v) three kernels for sm_80
    need a stack (Triton 3.9).
    """
    small = v < 2.0**-64
    return tl.sqrt_rn(tl.where(small, v * 2.0**64, v)) * tl.where(small, 2.0**-32, 1.0)


@triton.jit
def quotient64(a, b):
    """a / b in float64, and then float32: the bits of one rounding, since 53 >= 2 * 24 + 2, of subnormal ones too."""
    return (a.to(tl.float64) / b.to(tl.float64)).to(tl.float32)


FLUSHES = tl.constexpr(TRITON < (3, 6))


@triton.jit
def quotient(a, b):
    """a / b, rounded to nearest. Before Triton 3.6 div_rn flushes subnormal numbers to zero."""
    return quotient64(a, b) if FLUSHES else tl.div_rn(a, b)


@triton.jit(do_not_specialize=["table", "row_of_program", "records", "rounds", "directions"])
def update(
    table,
    row_of_program,
    records,
    rounds: tl.int32,
    directions: tl.int32,
    RULE: tl.constexpr,
    CELL: tl.constexpr,
    DIST: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCKS: tl.constexpr,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """`records` holds int64: the rule's constants, then for every round rate, keep, root (bits of float32), rounding
    seed, and for every direction the seed and the bits of the float32 coefficient."""
    ROWS: tl.constexpr = BLOCKS * INNER
    address, n, start, stream, factor, program = segment(table, row_of_program)
    first_row, first_col, at = locate(start, program, ROWS, WIDTH)
    if not is_empty(at, n, ROWS, WIDTH):
        outer, inner, lane = rows_and_columns(BLOCKS, INNER, WIDTH)
        col = first_col + lane.to(tl.uint32)
        mask = exist(at, n, outer, inner, lane)
        address += at.to(tl.uint64) * (CELL.primitive_bitwidth // 8)
        pointer = pointers(address, outer, inner, lane, CELL, False)
        x = to_float32(tl.load(pointer, mask))
        if RULE != "sgd":
            m_address = moment_address(table, row_of_program, 0) + at.to(tl.uint64) * 4
            m_pointer = pointers(m_address, outer, inner, lane, tl.float32, False)
            m = tl.load(m_pointer, mask)
        if RULE == "adamw":
            v_address = moment_address(table, row_of_program, 1) + at.to(tl.uint64) * 4
            v_pointer = pointers(v_address, outer, inner, lane, tl.float32, False)
            v = tl.load(v_pointer, mask)
        record = records + CONSTANTS
        for _ in range(rounds):
            rate = number(record, 0)
            keep = number(record, 1)
            root = number(record, 2)
            rounding_seed = tl.load(record + 3).to(tl.uint64)
            record += STEP
            g = tl.zeros((BLOCKS, INNER, WIDTH), tl.float32)
            for _ in range(directions):
                seed = tl.load(record).to(tl.uint64)
                s = number(record, 1) * factor
                record += 2
                if DIST == "rademacher":
                    a, b, c, d = sign_words(seed, stream, first_row, col)
                    g += signed(s, a, b, c, d, first_row, outer, inner)
                else:
                    g += s * normals(seed, stream, first_row, outer, inner, col)
            if RULE == "momentum":
                m = number(records, 0) * m + g
                g = m
            if RULE == "adamw":
                m = number(records, 0) * m + number(records, 1) * g
                v = number(records, 2) * v + number(records, 3) * (g * g)
                g = quotient(m, root_of(v) * root + number(records, 4))
            y = x * keep - rate * g
            x = to_float32(from_float32(y, CELL, rounding_seed, stream, first_row, outer, inner, col, STOCHASTIC))
        # x is already rounded to CELL: this store is exact, and rounds to nearest.
        tl.store(pointer, from_float32(x, CELL, 0, stream, first_row, outer, inner, col, False), mask)
        if RULE != "sgd":
            tl.store(m_pointer, m, mask)
        if RULE == "adamw":
            tl.store(v_pointer, v, mask)


def default(rule: str, kind: Kind) -> Shape:
    """Tiles of 128 columns, one to a thread: as many rows as fit into registers with their moments and sums."""
    return Shape(2 if rule == "adamw" and kind.dist == "rademacher" else 4, width=128, num_warps=4)


@functools.cache
def variant(rule: str, kind: Kind, shape: Shape) -> Variant:
    constants = {"RULE": rule, "CELL": CELLS[kind.dtype], "DIST": kind.dist, "STOCHASTIC": kind.stochastic}
    return Variant(update, {**constants, **tile_constants(kind, shape)}, shape.num_warps)


BY_RULE = {
    rule: Kernel(f"update-{rule}", functools.partial(variant, rule), functools.partial(default, rule))
    for rule in ("sgd", "momentum", "adamw")
}
KERNELS = tuple(BY_RULE.values())


def table_of(
    constants: Sequence[float],
    seeds: Sequence[int],
    coefficients: Sequence[float],
    steps: Sequence[Sequence[float]],
    rounding_seeds: Sequence[int] | None,
) -> np.ndarray:
    """The rule's constants and the rounds as the kernel reads them."""
    rounds, header = len(steps), np.zeros(CONSTANTS.value, np.int64)
    header[: len(constants)] = float_bits(constants)
    rows = np.empty((rounds, STEP.value + 2 * (len(seeds) // rounds)), np.int64)
    rows[:, :3] = float_bits(steps)
    rows[:, 3] = 0 if rounding_seeds is None else seed_bits(rounding_seeds)
    rows[:, STEP.value :: 2] = seed_bits(seeds).reshape(rounds, -1)
    rows[:, STEP.value + 1 :: 2] = float_bits(coefficients).reshape(rounds, -1)
    return np.concatenate([header, rows.ravel()])


def update_(
    tensors: Sequence[torch.Tensor],
    moments: Sequence[Sequence[torch.Tensor]],
    rule: str,
    constants: Sequence[float],
    seeds: Sequence[int],
    coefficients: Sequence[float],
    steps: Sequence[Sequence[float]],
    place: Place,
    rounding_seeds: Sequence[int] | None,
) -> None:
    """len(steps) rounds of an update rule in one pass over weights and moments. Not for CUDA graphs."""
    if not tensors or not steps:
        return
    device = tensors[0].device
    with reach(device):
        records = on_device(table_of(constants, seeds, coefficients, steps, rounding_seeds), "update_", device)
        launches = plan(BY_RULE[rule], tensors, place, rounding_seeds is not None, moments)
        run(launches, records, len(steps), len(seeds) // len(steps))
