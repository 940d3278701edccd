"""The definition of every kernel, in numpy. Read this first; everything else is this file made fast.

A backend that differs from this file in one bit is wrong; only `project` sums on a GPU in an order of its own. Arrays
stand for tensors: float32 and float16 as themselves, bfloat16 as uint16 holding its bits (numpy has no bfloat16).
Nothing here works in place.

The random words are Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]
Word = Any  # int, or an array U64
Storage = NDArray[Any]  # float32, float16, or uint16 holding bfloat16 bits

# What a word is for. The tag is a part of the counter, so that two uses never get the same words.
TAG_RADEMACHER, TAG_GAUSSIAN, TAG_ROUNDING, TAG_DERIVE = 1, 2, 3, 4

# Elements are laid out in rows of COLS, and rows in blocks. One Philox call serves one column of a block: a lane owns a
# column and walks down its rows, so that loads and stores are contiguous and no value crosses lanes.
COLS = 1024
RADEMACHER_ROWS = 128  # one sign bit per row: 4 words x 32 bits
GAUSSIAN_ROWS = 4  # one normal number per row
ROUNDING_ROWS = 8  # 16 bits per row: 4 words x 2 halves

SUM_COLS = 64  # columns whose sums `project` adds in pairs

MASK32 = 0xFFFFFFFF


# --- words ----------------------------------------------------------------------------------------------------


def philox(key: int, counter: tuple[Word, Word, Word, Word]) -> tuple[Word, Word, Word, Word]:
    """Four random words for every counter: Philox4x32 with 10 rounds, with a 64-bit seed as the key.

    Words are below 2^32. They are Python ints or uint64 arrays, so that a product fits.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key & MASK32, key >> 32
    for _ in range(10):
        m0, m1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (m1 >> 32) ^ c1 ^ k0, m1 & MASK32, (m0 >> 32) ^ c3 ^ k1, m0 & MASK32
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


def derive(seed: int, a: int, b: int) -> int:
    """The seed number (a, b) derived from `seed`: words 0 and 1 of Philox, word 0 low. a < 2^64, b < 2^32."""
    low, high, _, _ = philox(seed, (a & MASK32, a >> 32, b, TAG_DERIVE))
    return low | high << 32


def _words(index: U64, rows: int, seed: int, stream: int, tag: int) -> tuple[list[U32], U32]:
    """The four words of every element's column, and the element's row in it."""
    row = (index // np.uint64(COLS)) % np.uint64(rows)
    block = index // np.uint64(rows * COLS) * np.uint64(COLS) + index % np.uint64(COLS)
    stream_, tag_ = np.full_like(block, stream), np.full_like(block, tag)
    words = philox(seed, (block & np.uint64(MASK32), block >> np.uint64(32), stream_, tag_))
    return [word.astype(np.uint32) for word in words], row.astype(np.uint32)


def _index(n: int, start: int) -> U64:
    """The indices start .. start + n."""
    return np.arange(n, dtype=np.uint64) + np.uint64(start)


# --- noise ----------------------------------------------------------------------------------------------------


def rademacher(n: int, seed: int, stream: int = 0, start: int = 0) -> F32:
    """+1 where the element's bit is 0, -1 where it is 1: bit (row mod 32) of word (row div 32)."""
    words, row = _words(_index(n, start), RADEMACHER_ROWS, seed, stream, TAG_RADEMACHER)
    word = np.choose(row // np.uint32(32), words)
    bit = (word >> (row % np.uint32(32))) & np.uint32(1)
    return np.float32(1) - np.float32(2) * bit.astype(np.float32)


def _coefficients(text: str) -> list[np.float32]:
    """Parse hexadecimal floats."""
    return [np.float32(float.fromhex(word)) for word in text.split()]


# Polynomials for the normal numbers, lowest power first: log(1 + f) / f in f; sin(2 pi t) / t and cos(2 pi t) in t^2.
LOG = _coefficients(
    "0x1p+0 -0x1.fffff8p-2 0x1.555790p-2 -0x1.0005a6p-2 0x1.98b80ap-3 -0x1.5329bep-3 0x1.322850p-3 -0x1.26729ep-3"
    " 0x1.6626eap-4"
)
SIN = _coefficients("0x1.921fb6p+2 -0x1.4abbbap+5 0x1.465ec4p+6 -0x1.2d9b7cp+6")
COS = _coefficients("0x1p+0 -0x1.3bd3ccp+4 0x1.03c1dcp+6 -0x1.55c57ap+6 0x1.d9c326p+5")
LN2 = np.uint32(0x3F317218).view(np.float32)


def _horner(coefficients: list[np.float32], z: F32) -> F32:
    """The value of a polynomial at z."""
    p = np.full(z.shape, coefficients[-1], np.float32)
    for a in reversed(coefficients[:-1]):
        p = p * z + a  # two roundings: the product, then the sum
    return p


def box_muller(a: U32, b: U32) -> tuple[F32, F32]:
    """Two standard normal numbers from two words. Every operation is one binary32 operation, rounded to nearest."""
    u = a.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)  # in (0, 1]
    bits = u.view(np.int32)
    k = (bits - np.int32(0x3F3504F3)) >> 23
    f = (bits - (k << 23)).view(np.float32) - np.float32(1)  # u = 2^k (1 + f), 1 + f in [sqrt(1/2), sqrt(2)]
    log_u = f * _horner(LOG, f) + k.astype(np.float32) * LN2
    r = np.sqrt(np.float32(-2) * log_u)

    q = (b + np.uint32(0x20000000)) >> np.uint32(30)  # the nearest quarter turn; the sum wraps
    t = (b - (q << np.uint32(30))).view(np.int32).astype(np.float32) * np.float32(2.0**-32)  # turns, [-1/8, 1/8]
    s, c = t * _horner(SIN, t * t), _horner(COS, t * t)
    odd = q % 2 == 1
    sin, cos = np.where(odd, c, s), np.where(odd, s, c)
    sin = np.where(q & 2, -sin, sin)
    cos = np.where((q + 1) & 2, -cos, cos)
    return r * cos, r * sin


def gaussian(n: int, seed: int, stream: int = 0, start: int = 0) -> F32:
    """Standard normal numbers, |z| <= 6.77: rows 0, 1 from words 0, 1 and rows 2, 3 from words 2, 3."""
    (a, b, c, d), row = _words(_index(n, start), GAUSSIAN_ROWS, seed, stream, TAG_GAUSSIAN)
    return np.choose(row, [*box_muller(a, b), *box_muller(c, d)])


def noise(n: int, seed: int, *, stream: int = 0, start: int = 0, dist: str = "rademacher") -> F32:
    """Elements start .. start + n of the noise of (seed, stream)."""
    return {"rademacher": rademacher, "gaussian": gaussian}[dist](n, seed, stream, start)


# --- rounding -------------------------------------------------------------------------------------------------


def rounding_bits(n: int, seed: int, stream: int = 0, start: int = 0) -> U32:
    """16 random bits per element: word (row div 2), low half for even rows, high half for odd ones."""
    words, row = _words(_index(n, start), ROUNDING_ROWS, seed, stream, TAG_ROUNDING)
    word = np.choose(row // np.uint32(2), words)
    return (word >> (np.uint32(16) * (row % np.uint32(2)))) & np.uint32(0xFFFF)


def to_float32(x: Storage) -> F32:
    """Convert float32, float16 or bfloat16 (uint16) storage to float32; exact."""
    if x.dtype == np.uint16:
        return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return x.astype(np.float32)


def from_float32(y: F32, dtype: np.dtype[Any], random: U32 | None = None) -> Storage:
    """Round float32 values to storage: to nearest even, or with `random`, 16 bits per element, stochastically.

    random: for bfloat16 (uint16) only: bits that are added below the last kept one, so that the value rounds up with
    the probability that the cut-off bits give.
    """
    if dtype != np.uint16:
        with np.errstate(over="ignore"):
            return y.astype(dtype)
    bits = y.view(np.uint32)
    to_even = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = bits + (to_even if random is None else random)
    finite = np.isfinite(y)
    return (np.where(finite, rounded, bits) >> np.uint32(16)).astype(np.uint16)


# --- the ops --------------------------------------------------------------------------------------------------


def perturb(
    x: Storage,
    seed: int,
    scale: float,
    *,
    dist: str = "rademacher",
    factor: float = 1.0,
    stream: int = 0,
    start: int = 0,
    rounding_seed: int | None = None,
) -> Storage:
    """x + scale * factor * z(seed), rounded to x's dtype: the product is rounded, then the sum, then to storage.

    With `rounding_seed`, bfloat16 rounds stochastically; float32 has nothing left to round.
    """
    x = np.asarray(x)
    s = np.float32(scale) * np.float32(factor)
    y = to_float32(x) + s * noise(x.size, seed, stream=stream, start=start, dist=dist)
    random = None if rounding_seed is None else rounding_bits(x.size, rounding_seed, stream, start)
    return from_float32(y, x.dtype, random)


def replay(
    x: Storage,
    seeds: list[int],
    coefficients: list[float],
    *,
    dist: str = "rademacher",
    factor: float = 1.0,
    stream: int = 0,
    start: int = 0,
    rounding_seeds: list[int] | None = None,
) -> Storage:
    """Apply many records with `perturb`, one after another: the order and every rounding count."""
    for r, (seed, coefficient) in enumerate(zip(seeds, coefficients, strict=True)):
        rounding_seed = None if rounding_seeds is None else rounding_seeds[r]
        x = perturb(
            x, seed, coefficient, dist=dist, factor=factor, stream=stream, start=start, rounding_seed=rounding_seed
        )
    return x


def gradient(
    n: int, seeds: list[int], coefficients: list[float], *, dist: str, factor: float, stream: int, start: int
) -> F32:
    """sum_p (coefficients[p] * factor) * z(seeds[p]), in this order from 0: each product is rounded, then the sum."""
    g = np.zeros(n, np.float32)
    for seed, coefficient in zip(seeds, coefficients, strict=True):
        s = np.float32(coefficient) * np.float32(factor)
        g = g + s * noise(n, seed, stream=stream, start=start, dist=dist)
    return g


def direction(rule: str, constants: list[float], g: F32, moments: list[F32], root: float) -> tuple[F32, list[F32]]:
    """(direction of a step, new moments). Every operation is one binary32 operation, rounded to nearest.

    sgd       no constants, no moments                      d = g
    momentum  constants beta; moment m                      m = beta * m + g; d = m
    adamw     constants b1, 1 - b1, b2, 1 - b2, eps;        m = b1 * m + (1 - b1) * g;
              moments m, v                                  v = b2 * v + (1 - b2) * (g * g);
                                                            d = m / (sqrt(v) * root + eps)
    """
    if rule == "sgd":
        return g, []
    k = [np.float32(value) for value in constants]
    if rule == "momentum":
        m = k[0] * moments[0] + g
        return m, [m]
    m = k[0] * moments[0] + k[1] * g
    v = k[2] * moments[1] + k[3] * (g * g)
    return m / (np.sqrt(v) * np.float32(root) + k[4]), [m, v]


def update(
    x: Storage,
    moments: list[F32],
    rule: str,
    constants: list[float],
    seeds: list[list[int]],
    coefficients: list[list[float]],
    steps: list[tuple[float, float, float]],
    *,
    dist: str = "rademacher",
    factor: float = 1.0,
    stream: int = 0,
    start: int = 0,
    rounding_seeds: list[int] | None = None,
) -> tuple[Storage, list[F32]]:
    """(weights, moments) after many rounds of an update rule, one after another.

    Round r has the directions of seeds[r] with coefficients[r], and steps[r] = (rate, keep, root). In it
    x = keep * x - rate * d: each product is rounded, then the difference, then to x's dtype. The next round starts from
    the rounded x. Moments are float32 for every dtype of x.
    """
    x = np.asarray(x)
    place = {"stream": stream, "start": start}
    for r, (rate, keep, root) in enumerate(steps):
        with np.errstate(all="ignore"):
            g = gradient(x.size, seeds[r], coefficients[r], dist=dist, factor=factor, **place)
            d, moments = direction(rule, constants, g, moments, root)
            y = to_float32(x) * np.float32(keep) - np.float32(rate) * d
        random = None if rounding_seeds is None else rounding_bits(x.size, rounding_seeds[r], **place)
        x = from_float32(y, x.dtype, random)
    return x, moments


def project(
    x: Storage,
    seeds: list[int],
    scalars: F64,
    *,
    dist: str = "rademacher",
    factor: float = 1.0,
    stream: int = 0,
    start: int = 0,
) -> F64:
    """scalars[r] + factor * <x, z(seeds[r])>. The order of every sum is fixed, so that the result is unique.

    Products are float32, and so are the sums down a block's columns, from zero and from the last of the 128 rows to the
    first. All further sums are float64. The second half of 64 columns is added to the first, and so on down to one
    number. A block's 16 such numbers are added in order. This sum times the factor is added to `scalars`, block after
    block.
    """
    x = np.asarray(x)
    size = RADEMACHER_ROWS * COLS
    before = start % size
    blocks = -(-(before + x.size) // size) if x.size else 0
    scalars = scalars.copy()
    with np.errstate(invalid="ignore", over="ignore"):
        for r, seed in enumerate(seeds):
            products = np.zeros(blocks * size, np.float32)
            products[before : before + x.size] = to_float32(x) * noise(
                x.size, seed, stream=stream, start=start, dist=dist
            )
            for block in products.reshape(blocks, RADEMACHER_ROWS, COLS):
                column = np.zeros(COLS, np.float32)
                for row in block[::-1]:
                    column = column + row
                part: F64 = column.astype(np.float64).reshape(-1, SUM_COLS)
                while part.shape[1] > 1:
                    left, right = np.split(part, 2, axis=1)
                    part = left + right
                total = np.float64(0)
                for (number,) in part:
                    total = total + number
                scalars[r] += total * factor
    return scalars


def quantum(maxima: list[float], factors: list[float], headroom: float = 2.0) -> float:
    """The lattice's step for a factor of 1: 2^(e-24), e the smallest with 2^e > headroom max_t(max|x_t| / factor_t).

    2^-24, as for a largest weight just under 1 / headroom, if all weights are zeros or there are none.
    """
    largest = max((m / f for m, f in zip(maxima, factors, strict=True)), default=0.0)
    _, e = np.frexp(headroom * largest)  # = m * 2^e with m in [1/2, 1), so 2^e is the smallest power above
    return 2.0 ** (int(e) - 24) if largest > 0 else 2.0**-24


def snap(x: F32, step: float) -> F32:
    """Round x to the nearest multiple of `step`, a power of two, ties to even; -0 becomes +0."""
    return (np.rint(x / np.float32(step)) * np.float32(step)) + np.float32(0)
