"""noise_: the random signs and normal numbers of spec.py, a tile at a time."""

import functools

import torch
import triton
import triton.language as tl

from hosfl_kernels import spec
from hosfl_kernels.place import DISTRIBUTIONS, Place

from .choices import Shape
from .launch import Kernel, Kind, Variant, device_context, tile_constants
from .philox import COLS, column_words
from .tile import existing_cells, is_empty, is_full, locate, pointers, rows_and_columns

RADEMACHER_ROWS = tl.constexpr(spec.RADEMACHER_ROWS)
GAUSSIAN_ROWS = tl.constexpr(spec.GAUSSIAN_ROWS)
TAG_RADEMACHER = tl.constexpr(spec.TAG_RADEMACHER)
TAG_GAUSSIAN = tl.constexpr(spec.TAG_GAUSSIAN)
# Coefficients for -2 log(u): a power of two changes no rounding, and saves a product.
LOG = tl.constexpr(tuple(-2 * float(c) for c in spec.LOG))
LN2 = tl.constexpr(-2 * float(spec.LN2))
SIN = tl.constexpr(tuple(float(c) for c in spec.SIN))
COS = tl.constexpr(tuple(float(c) for c in spec.COS))


@triton.jit
def horner(COEFFICIENTS: tl.constexpr, COUNT: tl.constexpr, z):
    """The value at z of a polynomial with COUNT coefficients, lowest power first."""
    p = z * COEFFICIENTS[COUNT - 1] + COEFFICIENTS[COUNT - 2]
    for i in tl.static_range(3, COUNT + 1):
        p = p * z + COEFFICIENTS[COUNT - i]
    return p


@triton.jit
def box_muller(a, b):
    """Two standard normal numbers from two words, operation by operation as in spec.py.

    Here u is 2^32 times as large, and its logarithm is multiplied by -2: powers of two change no rounding.
    """
    u = a.to(tl.float32) + 0.5
    bits = u.to(tl.int32, bitcast=True) - 0x4F3504F3
    f = ((bits & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    r = tl.sqrt_rn(f * horner(LOG, 9, f) + (bits >> 23).to(tl.float32) * LN2)

    q = (b + 0x20000000) >> 30
    t = (b - (q << 30)).to(tl.int32, bitcast=True).to(tl.float32) * 2.0**-32
    s = t * horner(SIN, 4, t * t)
    c = horner(COS, 5, t * t)
    odd = (q & 1) != 0
    sin = tl.where(odd, c, s).to(tl.uint32, bitcast=True) ^ ((q & 2) << 30)
    cos = tl.where(odd, s, c).to(tl.uint32, bitcast=True) ^ (((q + 1) & 2) << 30)
    return r * cos.to(tl.float32, bitcast=True), r * sin.to(tl.float32, bitcast=True)


@triton.jit
def sign_words(seed, stream, first_row, col):
    """The random words for the signs of 128 rows, made once for all of a program's rows."""
    return column_words(seed, stream, first_row, col, RADEMACHER_ROWS, TAG_RADEMACHER)


@triton.jit
def signed(s, a, b, c, d, first_row, outer, inner):
    """s * z: s with its sign flipped where the cell's bit of the words is 1.

    Rows outer + inner are relative to first_row. A tile has fewer than 32 rows of one word, or all 32 from its first
    bit on.
    """
    index = (first_row // 32 % 4).to(tl.int32) + outer // 32
    word = tl.where(index < 2, tl.where(index == 0, a, b), tl.where(index == 2, c, d))
    word = word >> (first_row % 32).to(tl.uint32)  # apart, so that the shifts below are by constants
    sign = (word << (31 - (outer + inner) % 32).to(tl.uint32)) & 0x80000000
    return (s.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)


@triton.jit
def normals(seed, stream, first_row, outer, inner, col):
    """z of the cells of a tile whose `inner` rows are the four of a block."""
    a, b, c, d = column_words(seed, stream, first_row + outer, col, GAUSSIAN_ROWS, TAG_GAUSSIAN)
    z0, z1 = box_muller(a, b)
    z2, z3 = box_muller(c, d)
    return tl.where(inner < 2, tl.where(inner == 0, z0, z1), tl.where(inner == 2, z2, z3))


@triton.jit
def write_noise(
    address,
    at,
    n,
    first_row,
    first_col,
    stream,
    seed,
    DIST: tl.constexpr,
    BLOCKS: tl.constexpr,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
    FULL: tl.constexpr,
):
    """Write a tile of noise to `address`. FULL: see `tile.is_full`."""
    outer, inner, lane = rows_and_columns(1, INNER, WIDTH)
    col = first_col + lane.to(tl.uint32)
    if DIST == "rademacher":
        a, b, c, d = sign_words(seed, stream, first_row, col)
    for _ in range(BLOCKS):
        if DIST == "rademacher":
            z = signed(tl.cast(1.0, tl.float32), a, b, c, d, first_row, outer, inner)
        else:
            z = normals(seed, stream, first_row, outer, inner, col)
        pointer = pointers(address, outer, inner, lane, tl.float32, FULL)
        tl.store(pointer, z, None if FULL else existing_cells(at, n, outer, inner, lane))
        address += INNER * COLS * 4
        at += INNER * COLS
        first_row += INNER


@triton.jit(do_not_specialize=["address", "n", "start", "stream", "seed"])
def noise(
    address: tl.uint64,
    n: tl.int64,
    start: tl.uint64,
    stream: tl.uint32,
    seed: tl.uint64,
    DIST: tl.constexpr,
    BLOCKS: tl.constexpr,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Fill the float32 tensor of n elements at `address`."""
    ROWS: tl.constexpr = BLOCKS * INNER
    start = start.to(tl.uint64)
    stream = stream.to(tl.uint32)
    seed = seed.to(tl.uint64)
    first_row, first_col, at = locate(start, tl.program_id(0), ROWS, WIDTH)
    address = address.to(tl.uint64) + at.to(tl.uint64) * 4
    if is_full(address, at, n, ROWS, WIDTH):
        write_noise(address, at, n, first_row, first_col, stream, seed, DIST, BLOCKS, INNER, WIDTH, True)
    else:
        PART: tl.constexpr = WIDTH // 2
        for part in range(BLOCKS * 2):
            down = part // 2 * INNER
            right = part % 2 * PART
            skip = down * COLS + right
            if not is_empty(at + skip, n, INNER, PART):
                write_noise(
                    address + (skip * 4).to(tl.uint64),
                    at + skip,
                    n,
                    first_row + down.to(tl.uint64),
                    first_col + right.to(tl.uint32),
                    stream,
                    seed,
                    DIST,
                    1,
                    INNER,
                    PART,
                    False,
                )


def default(kind: Kind) -> Shape:
    """Tiles as `perturb_` has them for float32."""
    return Shape(blocks=2, width=512, num_warps=4)


@functools.cache
def variant(kind: Kind, shape: Shape) -> Variant:
    """The variant for this kind and shape."""
    return Variant(noise, {"DIST": kind.dist, **tile_constants(kind, shape)}, shape.num_warps)


KERNEL = Kernel("noise", variant, default, wide=True, kinds=[Kind(torch.float32, dist) for dist in DISTRIBUTIONS])
KERNELS = (KERNEL,)


def noise_(out: torch.Tensor, seed: int, place: Place) -> None:
    """Fill the float32 tensor `out` with the noise of `seed`."""
    with device_context(out.device):
        if n := out.numel():
            start, launched = place.starts[0], KERNEL.variant_for(Kind(torch.float32, place.dist), n, out.device)
            launched.launch(launched.programs(n, start), out.data_ptr(), n, start, place.streams[0], seed)
