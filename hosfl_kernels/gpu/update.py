"""update_: many rounds of an update rule in one pass over weights and moments, one launch per dtype.

As in replay.py a tile stays in registers, here with its moments and the sum over a round's directions, and so with
fewer rows per thread. The rule's constants are arguments of the kernel. What changes from round to round, such as the
rate and bias corrections, is read from records on the device.
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
    TRITON,
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
from .rounding import from_float32, to_float32
from .tile import existing_cells, is_empty, locate, moment_address, pointers, rows_and_columns, segment

CONSTANTS = 5  # the largest number of constants of a rule
STEP = tl.constexpr(4)  # numbers in a round's record before those of its directions


@triton.jit
def number(bits):
    """The float32 with the low 32 bits of `bits`."""
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def root_of(v):
    """sqrt(v), rounded to nearest, by a root of normal numbers only.

    For small v it is sqrt(2^64 v) / 2^32, in which no product rounds. With a plain tl.sqrt_rn(v) three kernels for
    sm_80 need a stack (Triton 3.9).
    """
    small = v < 2.0**-64
    return tl.sqrt_rn(tl.where(small, v * 2.0**64, v)) * tl.where(small, 2.0**-32, 1.0)


@triton.jit
def quotient64(a, b):
    """a / b in float64, then float32: the bits of one rounding, since 53 >= 2 * 24 + 2, also of subnormal numbers."""
    return (a.to(tl.float64) / b.to(tl.float64)).to(tl.float32)


FLUSHES = tl.constexpr(TRITON < (3, 6))


@triton.jit
def quotient(a, b):
    """a / b, rounded to nearest. Before Triton 3.6 div_rn flushes subnormal numbers to zero."""
    return quotient64(a, b) if FLUSHES else tl.div_rn(a, b)


@triton.jit(
    do_not_specialize=[
        "table",
        "row_of_program",
        "records",
        "rounds",
        "directions",
        "b1_bits",
        "rest1_bits",
        "b2_bits",
        "rest2_bits",
        "eps_bits",
    ]
)
def update(
    table,
    row_of_program,
    records,
    rounds: tl.int32,
    directions: tl.int32,
    b1_bits: tl.int32,
    rest1_bits: tl.int32,
    b2_bits: tl.int32,
    rest2_bits: tl.int32,
    eps_bits: tl.int32,
    RULE: tl.constexpr,
    CELL: tl.constexpr,
    DIST: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCKS: tl.constexpr,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Apply rounds of an update rule to all tensors and their moments.

    records: a row of int64 for every round: rate, keep, root (bits of float32), rounding seed, and for every direction
    the seed and the bits of the float32 coefficient. Constants of the rule, bits of float32: b1, 1 - b1, b2, 1 - b2 and
    eps of AdamW; the first is SGD's momentum.
    """
    ROWS: tl.constexpr = BLOCKS * INNER
    address, n, start, stream, factor, program = segment(table, row_of_program)
    first_row, first_col, at = locate(start, program, ROWS, WIDTH)
    if not is_empty(at, n, ROWS, WIDTH):
        outer, inner, lane = rows_and_columns(BLOCKS, INNER, WIDTH)
        col = first_col + lane.to(tl.uint32)
        mask = existing_cells(at, n, outer, inner, lane)
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
        for _ in range(rounds):
            rate = number(tl.load(records))
            keep = number(tl.load(records + 1))
            root = number(tl.load(records + 2))
            rounding_seed = tl.load(records + 3).to(tl.uint64)
            records += STEP
            g = tl.zeros((BLOCKS, INNER, WIDTH), tl.float32)
            for _ in range(directions):
                seed = tl.load(records).to(tl.uint64)
                s = number(tl.load(records + 1)) * factor
                records += 2
                if DIST == "rademacher":
                    a, b, c, d = sign_words(seed, stream, first_row, col)
                    g += signed(s, a, b, c, d, first_row, outer, inner)
                else:
                    g += s * normals(seed, stream, first_row, outer, inner, col)
            if RULE == "momentum":
                m = number(b1_bits) * m + g
                g = m
            if RULE == "adamw":
                m = number(b1_bits) * m + number(rest1_bits) * g
                v = number(b2_bits) * v + number(rest2_bits) * (g * g)
                g = quotient(m, root_of(v) * root + number(eps_bits))
            y = x * keep - rate * g
            x = to_float32(from_float32(y, CELL, rounding_seed, stream, first_row, outer, inner, col, STOCHASTIC))
        # x is already rounded to CELL: this store is exact, and rounds to nearest.
        tl.store(pointer, from_float32(x, CELL, 0, stream, first_row, outer, inner, col, False), mask)
        if RULE != "sgd":
            tl.store(m_pointer, m, mask)
        if RULE == "adamw":
            tl.store(v_pointer, v, mask)


def default(rule: str, kind: Kind) -> Shape:
    """Tiles of 128 columns, one per thread: as many rows as fit into registers with their moments and sums."""
    return Shape(2 if rule == "adamw" and kind.dist == "rademacher" else 4, width=128, num_warps=4)


@functools.cache
def variant(rule: str, kind: Kind, shape: Shape) -> Variant:
    """The variant for this rule, kind and shape."""
    constants = {"RULE": rule, "CELL": CELLS[kind.dtype], "DIST": kind.dist, "STOCHASTIC": kind.stochastic}
    return Variant(update, {**constants, **tile_constants(kind, shape)}, shape.num_warps)


BY_RULE = {
    rule: Kernel(f"update-{rule}", functools.partial(variant, rule), functools.partial(default, rule))
    for rule in ("sgd", "momentum", "adamw")
}
KERNELS = tuple(BY_RULE.values())


def constant_bits(constants: Sequence[float]) -> list[int]:
    """Return the rule's constants as the kernel takes them: the bits of float32, filled up with zeros."""
    bits: list[int] = float_bits([*constants, *[0.0] * (CONSTANTS - len(constants))]).tolist()
    return bits


def round_table(
    seeds: Sequence[int],
    coefficients: Sequence[float],
    steps: Sequence[Sequence[float]],
    rounding_seeds: Sequence[int] | None,
) -> np.ndarray:
    """Make the table of rounds that the kernel reads: see `update`."""
    rounds = len(steps)
    rows = np.empty((rounds, STEP.value + 2 * (len(seeds) // rounds)), np.int64)
    rows[:, :3] = float_bits(steps)
    rows[:, 3] = 0 if rounding_seeds is None else seed_bits(rounding_seeds)
    rows[:, STEP.value :: 2] = seed_bits(seeds).reshape(rounds, -1)
    rows[:, STEP.value + 1 :: 2] = float_bits(coefficients).reshape(rounds, -1)
    return rows


def update_(
    tensors: Sequence[torch.Tensor],
    moments: Sequence[Sequence[torch.Tensor]],
    rule: str,
    constants: Sequence[float],
    seeds: Sequence[int] | torch.Tensor,
    coefficients: Sequence[float] | torch.Tensor,
    steps: Sequence[Sequence[float]] | torch.Tensor,
    place: Place,
    rounding_seeds: Sequence[int] | torch.Tensor | None,
) -> None:
    """len(steps) rounds of an update rule in one pass over weights and moments.

    Records that are tensors, with seeds and coefficients [R, P], are on the device, and a CUDA graph can capture the
    call.
    """
    if not tensors or not len(steps):
        return
    device = tensors[0].device
    with device_context(device):
        if isinstance(seeds, torch.Tensor):
            records = _round_table_on_device(seeds, coefficients, steps, rounding_seeds)
        else:
            table = round_table(seeds, coefficients, steps, rounding_seeds)
            records = copy_records(table, "update_ of records on the host", device)
        launches = plan(BY_RULE[rule], tensors, place, rounding_seeds is not None, moments)
        directions = (records.shape[1] - STEP.value) // 2
        run(launches, records, len(steps), directions, *constant_bits(constants))


def _round_table_on_device(seeds: torch.Tensor, coefficients: Any, steps: Any, rounding_seeds: Any) -> torch.Tensor:
    """Make `round_table` of tensors on the device, without a copy to the host."""
    rounding = seeds.new_zeros(len(steps)) if rounding_seeds is None else rounding_seeds
    directions = torch.stack([seeds, float_bits_on_device(coefficients)], 2).flatten(1)
    return torch.cat([float_bits_on_device(steps), rounding[:, None], directions], 1)
