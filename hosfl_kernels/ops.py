"""The table of ops: their schemas, their checks, and what runs them. They take numpy arrays and torch tensors alike.

    public function   checks what can be checked while torch.compile traces: seeds, scales, lengths, autograd
    torch.ops.hosfl   for tensors: picks the backend by their device (tensors.py registers the ops)
    RUN               checks the arrays themselves, calls the backend, tells autograd that they changed

numpy arrays go from the public function to RUN, with the C++ backend. A backend is a module with one function per op.
Nothing falls back in silence: a device without a backend is an error. torch is imported for a tensor only.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from hosfl_kernels import arrays, cpu, reference, spec
from hosfl_kernels.arrays import (
    are_row_major,
    dtype_name,
    is_channels_last,
    is_numpy,
    layouts,
    sizes,
    to_numpy,
    wrong_kind,
)
from hosfl_kernels.cpu import ieee_arithmetic
from hosfl_kernels.place import Place
from hosfl_kernels.rules import SGD, AdamW, Rule

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from hosfl_kernels.arrays import Array

    Numbers = NDArray[Any] | Tensor
    Seeds = Sequence[int] | Numbers
    Coefficients = Sequence[float] | Numbers
    SeedTable = Sequence[Sequence[int]] | Numbers
    Table = Sequence[Sequence[float]] | Numbers

__all__ = ["backends", "derive", "noise", "perturb_", "project", "replay_", "snap_", "update_"]

NAMES = ("numpy", "cpp", "triton", "cuda")
BACKENDS: dict[str, ModuleType] = {"numpy": reference, "cpp": cpu}  # tensors.py adds those that take tensors only

# Seeds travel as two 32-bit halves: a schema's int is signed, and a SymInt is not recompiled for every new value.
# Records travel as CPU tensors for the same reason.
PLACE = "str dist, float[] factors, SymInt[] streams, SymInt[] starts"  # a Place, field by field
SCHEMAS = {
    "noise_": "(Tensor(a!) out, SymInt[] seed, SymInt stream, SymInt start, str dist) -> ()",
    "perturb_": f"(Tensor(a!)[] tensors, SymInt[] seed, float scale, {PLACE}, SymInt[] rounding_seed) -> ()",
    "replay_": f"(Tensor(a!)[] tensors, Tensor seeds, Tensor coefficients, {PLACE}, Tensor? rounding_seeds) -> ()",
    "update_": "(Tensor(a!)[] tensors, Tensor(b!)[] moments, str rule, float[] constants, Tensor seeds, "
    f"Tensor coefficients, Tensor steps, {PLACE}, Tensor? rounding_seeds) -> ()",
    "project": f"(Tensor[] tensors, Tensor seeds, {PLACE}) -> Tensor",
}

DISTRIBUTIONS = ("rademacher", "gaussian")
LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


# --- the public functions -------------------------------------------------------------------------------------


@overload
def noise(  # type: ignore[overload-overlap]
    n: int, seed: int, *, stream: int = 0, start: int = 0, dist: str = "rademacher", device: Literal["numpy"]
) -> NDArray[np.float32]: ...
@overload
def noise(
    n: int, seed: int, *, stream: int = 0, start: int = 0, dist: str = "rademacher", device: torch.device | str = "cpu"
) -> Tensor: ...
def noise(
    n: int,
    seed: int,
    *,
    stream: int = 0,
    start: int = 0,
    dist: str = "rademacher",
    device: torch.device | str = "cpu",
) -> NDArray[np.float32] | Tensor:
    """Elements start .. start + n of the noise of (seed, stream), float32 [n], for study and tests.

    Args:
        n: number of elements, 0 or more.
        seed: 0 <= seed < 2^64.
        stream: which parameter tensor, 0 <= stream < 2^32.
        start: index of the first element in the whole tensor, 0 <= start and start + n <= 2^63.
        dist: "rademacher" (+1 or -1) or "gaussian" (standard normal, |z| <= 6.77).
        device: where to make it: torch's name of a device, for a tensor; "numpy", for an array. What comes back
            follows from the arguments alone, never from what is installed: without torch the default is an error.

    The same bits on every backend, device and thread count; noise(n)[k:] is noise(n - k, start=k). `perturb_` adds
    this very noise without making it.

    Raises: ValueError for a value out of range, TypeError for a wrong type, ModuleNotFoundError where a tensor is
    asked for and torch is missing.
    """
    if n < 0:
        raise ValueError(f"n must be 0 or more, got {n}")
    _place_of(1, dist, None, [stream], [start])
    halves = _halves(seed, "seed")
    out = np.empty(n, np.float32) if device == "numpy" else _empty_tensor(n, device)
    if is_numpy(out):
        RUN["noise_"](cpu, out, halves, stream, start, dist)
    else:
        _tensors().call("noise_", out, halves, stream, start, dist)
    return out


def perturb_(
    tensors: Array | Iterable[Array],
    seed: int,
    scale: float,
    *,
    dist: str = "rademacher",
    factors: Sequence[float] | None = None,
    streams: Sequence[int] | None = None,
    starts: Sequence[int] | None = None,
    rounding: str = "nearest",
    rounding_seed: int | None = None,
) -> None:
    """Move tensors along a seeded direction, in place: tensors[t] += scale * factors[t] * z(seed, streams[t]).

    Args:
        tensors: float32, bfloat16 or float16, no two sharing memory. Either torch tensors, all on one device,
            contiguous or, for the price of a copy of one at a time, in channels_last; or numpy arrays, contiguous in C
            order, bfloat16 as ml_dtypes.bfloat16 or as its bits in uint16. Any shapes. Noise goes by index, whatever
            the strides are.
        seed: 0 <= seed < 2^64.
        scale: finite in float32. Inside torch.compile a Python float is a constant: a new value is a new graph.
        dist: "rademacher" or "gaussian".
        factors: a power of two per tensor; default 1.
        streams: a number per tensor that names its noise, 0 <= stream < 2^32; default its position in the list.
        starts: per tensor, the index of its first element in the unsharded tensor; default 0.
        rounding: "nearest" (ties to even), or "stochastic", which rounds bfloat16 tensors up or down with the odds
            of the cut-off bits. float32 has nothing to round; float16 is refused.
        rounding_seed: the seed of stochastic rounding; 0 <= rounding_seed < 2^64.

    Formula: y = float32(x) + s * z with s = float32(scale) * factor, the product rounded, then the sum, then y to x's
    dtype. Bit for bit the same on every backend, device, thread count and sharding. Adding and taking away again
    returns the same bits only on the lattice of `snap_` with Rademacher; elsewhere every call rounds.

    No temporary of the tensors' size is made; on a GPU it is one launch per dtype. Not promised: the payload of NaN.

    Raises: ValueError, TypeError or RuntimeError, before any tensor is changed.
    """
    tensors = _array_list(tensors)
    place = _place_of(len(tensors), dist, factors, streams, starts)
    _check_number(scale, "scale")
    if not -LARGEST_FLOAT32 <= scale <= LARGEST_FLOAT32:
        raise ValueError(f"scale must be finite in float32, got {scale}")
    _check_rounding(rounding, rounding_seed is not None, "rounding_seed")
    halves = _halves(seed, "seed")
    rounding_halves = [] if rounding_seed is None else _halves(rounding_seed, "rounding_seed")
    if tensors:
        _call("perturb_", _on_numpy(tensors), (tensors, halves, scale), place, (rounding_halves,))


def replay_(
    tensors: Array | Iterable[Array],
    seeds: Seeds,
    coefficients: Coefficients,
    *,
    dist: str = "rademacher",
    factors: Sequence[float] | None = None,
    streams: Sequence[int] | None = None,
    starts: Sequence[int] | None = None,
    rounding: str = "nearest",
    rounding_seeds: Seeds | None = None,
) -> None:
    """Apply many records in one pass: tensors[t] += sum_r coefficients[r] * factors[t] * z(seeds[r], streams[t]).

    The bits are those of `perturb_(tensors, seeds[r], coefficients[r], ...)` for r = 0, 1, ... in this order, every
    rounding included; the weights cross the memory bus once, whatever the number of records.

    Args:
        seeds: R integers, 0 <= seed < 2^64; or a numpy array [R] of uint64, or of int64 that has their bits; or such
            an int64 CPU tensor, which torch.compile prefers.
        coefficients: R finite numbers, or a float32 array or CPU tensor [R].
        rounding_seeds: for rounding="stochastic": R more seeds, one per record.
        Everything else as in `perturb_`.

    Raises: ValueError, TypeError or RuntimeError, before any tensor is changed.
    """
    tensors = _array_list(tensors)
    place = _place_of(len(tensors), dist, factors, streams, starts)
    _check_rounding(rounding, rounding_seeds is not None, "rounding_seeds")
    numpy = _on_numpy(tensors)
    seeds = _seed_bits(seeds, "seeds", numpy)
    coefficients = _reals(coefficients, "coefficients", ONE, numpy)
    if len(seeds) != len(coefficients):
        raise ValueError(f"{len(seeds)} seeds but {len(coefficients)} coefficients")
    if rounding_seeds is not None:
        rounding_seeds = _seed_bits(rounding_seeds, "rounding_seeds", numpy)
        if len(rounding_seeds) != len(seeds):
            raise ValueError(f"{len(seeds)} seeds but {len(rounding_seeds)} rounding_seeds")
    if tensors:
        _call("replay_", numpy, (tensors, seeds, coefficients), place, (rounding_seeds,))


def update_(
    tensors: Array | Iterable[Array],
    moments: Sequence[Array | Iterable[Array]],
    rule: Rule,
    seeds: SeedTable,
    coefficients: Table,
    steps: Table,
    *,
    dist: str = "rademacher",
    factors: Sequence[float] | None = None,
    streams: Sequence[int] | None = None,
    starts: Sequence[int] | None = None,
    rounding: str = "nearest",
    rounding_seeds: Seeds | None = None,
) -> None:
    """Apply many rounds of an update rule in one pass over weights and moments, in place.

    Args:
        moments: `rule.moments` lists of float32 tensors, or arrays where the weights are, each with one per weight
            tensor: its shape and device, strides as for weights, sharing no memory with anything else. Zeros before
            the first round. AdamW: [m, v], v >= 0.
        rule: `SGD(...)` or `AdamW(...)`.
        seeds: R rounds of P directions, 0 <= seed < 2^64; or [R, P] of their bits, as in `replay_`.
        coefficients: float32 array or CPU tensor [R, P], or nested lists; finite. What is summed is the gradient's
            estimate: a mean over directions has its 1 / P in here.
        steps: float32 array or CPU tensor [R, 3] of finite numbers (rate, keep, root), as `rule.steps` makes them.
        rounding_seeds: for rounding="stochastic": R seeds, one per round.
        Everything else as in `perturb_`.

    Formula, for every element and round; each operation is one float32 operation rounded to nearest, none is fused:

        g = 0, then for every direction p: g = g + (float32(coefficient) * factor) * z(seed)
        SGD     d = g; with momentum m = momentum * m + g, d = m
        AdamW   m = b1 * m + (1 - b1) * g; v = b2 * v + (1 - b2) * (g * g); d = m / (sqrt(v) * root + eps)
        x = x * keep - rate * d, rounded to x's dtype as in `perturb_`; the next round starts from there

    Many rounds in one call leave the bits of one call per round, on every backend, device, thread count and sharding;
    weights and moments cross the memory bus once. Not promised: the payload of NaN.

    Raises: ValueError, TypeError or RuntimeError, before any tensor is changed.
    """
    if not isinstance(rule, (SGD, AdamW)):
        raise TypeError(f"rule must be SGD or AdamW, got {type(rule).__name__}")
    tensors = _array_list(tensors)
    kept = _moment_lists(moments, rule, tensors)
    place = _place_of(len(tensors), dist, factors, streams, starts)
    _check_rounding(rounding, rounding_seeds is not None, "rounding_seeds")
    numpy = _on_numpy(tensors)
    seeds = _seed_table(seeds, numpy)
    rounds, directions = seeds.shape
    coefficients = _table(coefficients, "coefficients", (rounds, directions), numpy)
    steps = _table(steps, "steps", (rounds, 3), numpy)
    if rounding_seeds is not None:
        rounding_seeds = _seed_bits(rounding_seeds, "rounding_seeds", numpy)
        if len(rounding_seeds) != rounds:
            raise ValueError(f"{rounds} rounds but {len(rounding_seeds)} rounding_seeds")
    if tensors:
        record = (rule.name, rule.constants, seeds, coefficients, steps)
        _call("update_", numpy, (tensors, kept, *record), place, (rounding_seeds,))


@overload
def project(
    tensors: NDArray[Any] | Iterable[NDArray[Any]],
    seeds: Seeds,
    *,
    dist: str = "rademacher",
    factors: Sequence[float] | None = None,
    streams: Sequence[int] | None = None,
    starts: Sequence[int] | None = None,
) -> NDArray[np.float64]: ...
@overload
def project(
    tensors: Tensor | Iterable[Tensor],
    seeds: Seeds,
    *,
    dist: str = "rademacher",
    factors: Sequence[float] | None = None,
    streams: Sequence[int] | None = None,
    starts: Sequence[int] | None = None,
) -> Tensor: ...
def project(
    tensors: Array | Iterable[Array],
    seeds: Seeds,
    *,
    dist: str = "rademacher",
    factors: Sequence[float] | None = None,
    streams: Sequence[int] | None = None,
    starts: Sequence[int] | None = None,
) -> NDArray[np.float64] | Tensor:
    """Inner products with seeded directions: scalars[r] = sum_t factors[t] * <tensors[t], z(seeds[r], streams[t])>.

    The transpose of `replay_`, in one pass over the tensors for all seeds. The tensors are only read: they may require
    grad, and the result does not; arrays may be read-only. Returns float64 [R]: of tensors a tensor on the CPU, of
    arrays an array. R = 0 is fine, and so is an empty list, which counts as tensors where torch has been imported.

    Args:
        seeds: R of them, as in `replay_`.
        Everything else as in `perturb_`; those in channels_last are copied, all at once.

    Products and the sums of up to 128 of them down a column are float32, all further sums float64. On the CPU the order
    of every sum is that of `spec.project`: the same bits for every thread count and instruction set. A GPU has an order
    of its own and agrees to 1e-6 * sum_t factors[t] * sum |tensors[t] * z|; so do the sums over shards with the whole.
    Infinity, NaN, and a float32 sum that overflows reach the result.

    Raises: ValueError, TypeError or RuntimeError.
    """
    tensors = _array_list(tensors, changed=False)
    place = _place_of(len(tensors), dist, factors, streams, starts)
    numpy = _on_numpy(tensors)
    scalars: NDArray[np.float64] | Tensor = _call("project", numpy, (tensors, _seed_bits(seeds, "seeds", numpy)), place)
    return scalars


@ieee_arithmetic
def snap_(tensors: Array | Iterable[Array], *, factors: Sequence[float] | None = None, headroom: float = 2.0) -> float:
    """Round float32 tensors to a lattice on which Rademacher moves are exact, in place; returns the quantum.

    quantum = 2^(e - 24), e the smallest with 2^e > headroom * max_t(max|tensors[t]| / factors[t]); tensor t is rounded
    to multiples of quantum * factors[t] (ties to even, -0 to +0): an error of at most half of it, with a headroom of 2
    6e-8 for weights below 1. headroom: how far the largest weight may grow, at least 1; each doubling costs one bit.

    From then on, as long as every scale and coefficient is a multiple of the quantum and every |x| stays at or below
    2^24 * quantum * factor (at first `headroom` times the largest weight or more), `perturb_` and `replay_` with
    Rademacher noise round nothing: a perturbation taken back returns the very bits, and records commute.

    Tensors of zeros only have quantum 2^-24: room up to 1. The quantum is one number, not one per tensor: every move
    is a multiple of the largest anyway, and so a bias that starts at zero has as much room as the largest weight.

    Raises: TypeError for other dtypes, ValueError for infinite or NaN weights, RuntimeError as in `perturb_`; before
    any tensor is changed.
    """
    tensors = _array_list(tensors)
    _place_of(len(tensors), "rademacher", factors, None, None)
    if not 1 <= headroom <= 2**16:
        raise ValueError(f"headroom must be between 1 and 2^16, got {headroom}")
    _check_tensors(tensors)
    factors = _factors(factors, len(tensors))
    if any(dtype_name(t.dtype) != "float32" for t in tensors):
        raise TypeError("snap_ takes float32 tensors only: bfloat16 and float16 have too few bits for a lattice")
    kind = arrays if not tensors or is_numpy(tensors[0]) else _tensors()
    maxima = [kind.largest(t) for t in tensors]
    for t, largest in enumerate(maxima):
        if not math.isfinite(largest):
            raise ValueError(f"tensor {t} has infinite or NaN elements; there is no lattice for them")
    quantum = spec.quantum(maxima, factors, headroom)
    for tensor, factor in zip(tensors, factors, strict=True):
        kind.snap_(tensor, quantum * factor)
    return quantum


def derive(seed: int, a: int, b: int) -> int:
    """The seed number (a, b) below `seed`: a hash, 0 <= a < 2^64, 0 <= b < 2^32. Make every seed this way.

    Two words of Philox with key = seed; see spec.py. Arithmetic on seeds collides; this does not, in practice: 64 bits.

    Raises: ValueError for a number out of range, TypeError for no integer.
    """
    _halves(seed, "seed")
    _halves(a, "a")
    _check_integer(b, 2**32, "b")
    return spec.derive(int(seed), int(a), int(b))


def backends() -> dict[str, str | None]:
    """What this machine has: backend name -> what it runs on, or None where it cannot run.

    Imports torch and triton where they are installed.
    """
    found = installed()
    return {name: found[name].describe() if name in found else None for name in NAMES}


def installed() -> dict[str, ModuleType]:
    """The backends: all, or without torch those that take numpy arrays."""
    try:
        return dict(_tensors().BACKENDS)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        return BACKENDS


# --- one kind of array or the other --------------------------------------------------------------------------------


def _tensors() -> Any:
    """The module for tensors. Its import registers the ops with torch."""
    import hosfl_kernels.tensors as tensors  # in half the time that `from hosfl_kernels import tensors` takes

    return tensors


def _on_numpy(tensors: Sequence[Array]) -> bool:
    """Whether an op takes numpy's way. Of nothing it does not where torch has been imported."""
    return is_numpy(tensors[0]) if tensors else sys.modules.get("torch") is None


def _empty_tensor(n: int, device: torch.device | str) -> Tensor:
    try:
        empty: Tensor = _tensors().empty(n, device)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        message = "noise makes a tensor, which needs torch: pip install 'hosfl[torch]', or pass device='numpy'"
        raise ModuleNotFoundError(message, name="torch") from error
    return empty


def _call(op: str, numpy: bool, arguments: Sequence[Any], place: Place, rounding: Sequence[Any] = ()) -> Any:
    return RUN[op](cpu, *arguments, place, *rounding) if numpy else _tensors().call(op, *arguments, *place, *rounding)


def _is_tensor(x: object) -> bool:
    """Whether x is a tensor, or may be one: tensors.py, which needs torch, knows."""
    return not isinstance(x, np.ndarray) and hasattr(x, "data_ptr")


def _array_list(
    given: Array | Iterable[Array], name: str = "tensors", changed: bool = True, like: Sequence[Array] = ()
) -> list[Array]:
    """The arrays or tensors given, of one kind, which is that of `like`."""
    one = not isinstance(given, (list, tuple)) and (is_numpy(given) or _is_tensor(given))
    listed: list[Any] = [given] if one else list(given)
    if not listed:
        return listed
    if _is_tensor(like[0] if like else listed[0]):
        _tensors().check(listed, name, changed)
        return listed
    for t, x in enumerate(listed):
        if not is_numpy(x):
            raise wrong_kind(x, f"{name}[{t}]")
        if changed and not x.flags.writeable:
            raise ValueError(f"{name}[{t}] is read-only, and would be changed in place: pass a writeable copy")
    return listed


# --- checks of numbers: also while torch.compile traces ----------------------------------------------------------


def _moment_lists(moments: Sequence[Array | Iterable[Array]], rule: Rule, tensors: list[Array]) -> list[Array]:
    """The moments end to end: all of the first kind, then all of the second."""
    if len(moments) != rule.moments:
        raise ValueError(f"{rule} keeps {rule.moments} moments per tensor, got {len(moments)} lists of them")
    kept = []
    for k, moment in enumerate(moments):
        mine = _array_list(moment, f"moments[{k}]", like=tensors)
        if len(mine) != len(tensors):
            raise ValueError(f"{len(tensors)} tensors but {len(mine)} in moments[{k}]")
        kept += mine
    return kept


def _check_integer(value: int, end: int, name: str) -> None:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if not 0 <= value < end:
        raise ValueError(f"{name} must be at least 0 and below 2^{end.bit_length() - 1}, got {value}")


def _check_number(value: object, name: str) -> None:
    if not isinstance(value, (float, int, np.floating, np.integer)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def _halves(seed: int, name: str) -> list[int]:
    _check_integer(seed, 2**64, name)
    if isinstance(seed, np.integer):
        seed = int(seed)
    return [seed & 0xFFFFFFFF, seed >> 32]


def _place_of(
    n: int, dist: str, factors: Sequence[float] | None, streams: Sequence[int] | None, starts: Sequence[int] | None
) -> Place:
    """The place of n tensors, an empty list for what the caller left to the default: see `_whole`."""
    if dist not in DISTRIBUTIONS:
        raise ValueError(f"dist must be one of {', '.join(DISTRIBUTIONS)}, got {dist!r}")
    for name, values in (("factors", factors), ("streams", streams), ("starts", starts)):
        if values is not None and len(values) != n:
            raise ValueError(f"{n} tensors but {len(values)} {name}")
    for t, stream in enumerate(streams or []):
        _check_integer(stream, 2**32, f"streams[{t}]")
    for t, start in enumerate(starts or []):
        _check_integer(start, 2**63, f"starts[{t}]")
    return Place(dist, factors or [], streams or [], starts or [])


def _check_rounding(rounding: str, seeded: bool, name: str) -> None:
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"rounding must be nearest or stochastic, got {rounding!r}")
    if seeded != (rounding == "stochastic"):
        raise ValueError(f"rounding='stochastic' and {name} go together: give both or neither")


ONE, TWO = ", one-dimensional and", ", two-dimensional and"  # dimensions


def _numbers(values: Any, name: str, dtype: str, dimensions: str, numpy: bool) -> Numbers | None:
    """Numbers that come as an array or a tensor, once they are checked; None for those that come as a list.

    An array becomes a tensor first where the op is torch's: torch.compile knows no dtype of an array.
    """
    if not (is_numpy(values) or _is_tensor(values)):
        return None
    kind = "an array" if is_numpy(values) else "a tensor"
    numbers: Any = _as_op_takes(values.copy(), numpy) if is_numpy(values) else values
    right = str(numbers.dtype).removeprefix("torch.") == dtype and numbers.ndim == (1 if dimensions == ONE else 2)
    if not right or (not is_numpy(numbers) and numbers.device.type != "cpu"):
        taken = "int64 or uint64" if dtype == "int64" and is_numpy(values) else dtype
        raise TypeError(f"{name} as {kind} must be {taken}{dimensions} on the CPU")
    return numbers


def _as_op_takes(values: NDArray[Any], numpy: bool) -> Numbers:
    """Seeds or coefficients as an array or, where the op is torch's, as a tensor; uint64 as int64."""
    if not numpy:
        numbers: Tensor = _tensors().numbers(values)
        return numbers
    return values.view(np.int64) if values.dtype == np.uint64 else values


def _seed_bits(seeds: Seeds, name: str, numpy: bool) -> Numbers:
    """int64 [R] on the CPU: the bits of uint64 seeds."""
    if (numbers := _numbers(seeds, name, "int64", ONE, numpy)) is not None:
        return numbers
    for r, seed in enumerate(seeds):
        _check_integer(seed, 2**64, f"{name}[{r}]")
    return _as_op_takes(np.array(seeds, dtype=np.uint64).view(np.int64), numpy)


def _seed_table(seeds: SeedTable, numpy: bool) -> Numbers:
    """int64 [R, P] on the CPU: the bits of uint64 seeds."""
    if (numbers := _numbers(seeds, "seeds", "int64", " [rounds, directions],", numpy)) is not None:
        return numbers
    for r, row in enumerate(seeds):
        if not isinstance(row, Sequence):
            raise TypeError(f"seeds[{r}] must be a list of integers, one per direction, got {type(row).__name__}")
        if len(row) != len(seeds[0]):
            raise ValueError(f"seeds[0] has {len(seeds[0])} directions, seeds[{r}] has {len(row)}")
        for p, seed in enumerate(row):
            _check_integer(seed, 2**64, f"seeds[{r}][{p}]")
    shape = (len(seeds), len(seeds[0]) if seeds else 0)
    return _as_op_takes(np.array(seeds, dtype=np.uint64).reshape(shape).view(np.int64), numpy)


def _reals(values: Any, name: str, dimensions: str, numpy: bool) -> Numbers:
    """float32 or float64 on the CPU: backends round numbers to float32, in IEEE arithmetic."""
    if (numbers := _numbers(values, name, "float32", dimensions, numpy)) is not None:
        return numbers
    for r, row in enumerate(values):
        if dimensions == ONE:
            _check_number(row, f"{name}[{r}]")
            continue
        if not hasattr(row, "__len__"):
            raise TypeError(f"{name}[{r}] must be a list of numbers, got {type(row).__name__}")
        if len(row) != len(values[0]):
            raise ValueError(f"{name}[0] has {len(values[0])} numbers, {name}[{r}] has {len(row)}")
        for p, value in enumerate(row):
            _check_number(value, f"{name}[{r}][{p}]")
    return _as_op_takes(np.array(values, dtype=np.float64), numpy)


def _table(values: Table, name: str, shape: tuple[int, int], numpy: bool) -> Numbers:
    table = _reals(values if len(values) else np.empty((0, shape[1]), np.float32), name, TWO, numpy)
    if table.shape != shape:
        raise ValueError(
            f"{name} must be [{shape[0]}, {shape[1]}], one row per round of the seeds, got {[*table.shape]}"
        )
    return table


# --- checks of tensors: on what the backend will really get -------------------------------------------------------


def _factors(factors: Sequence[float] | None, n: int) -> list[float]:
    factors = list(factors or [1.0] * n)
    for t, factor in enumerate(factors):
        if not (2.0**-100 <= factor <= 2.0**100 and math.frexp(factor)[0] == 0.5):
            raise ValueError(f"factors[{t}] must be a power of two between 2^-100 and 2^100, got {factor}")
    return factors


Layouts = list[tuple[int, int, Any, bool]]  # as arrays.layouts makes them


def _check_tensors(tensors: Sequence[Array], starts: Sequence[int] | None = None) -> Layouts:
    """Returns their layouts."""
    found = layouts(tensors)
    for t, (tensor, (_, _, device, row_major)) in enumerate(zip(tensors, found, strict=True)):
        if dtype_name(tensor.dtype) is None:
            raise TypeError(f"tensors[{t}] is {tensor.dtype}; the kernels take float32, bfloat16 and float16")
        if device != found[0][2]:
            raise RuntimeError(f"tensors[0] is on {found[0][2]}, tensors[{t}] on {device}: use one device")
        if not row_major:
            _check_channels_last(tensor, f"tensors[{t}]")
    if starts:
        for t, (start, size) in enumerate(zip(starts, sizes(tensors), strict=True)):
            if start + size > 2**63:
                raise ValueError(f"starts[{t}] + numel is beyond 2^63")
    _check_memory({"tensors": found})
    return found


def _check_channels_last(x: Any, name: str) -> None:
    if is_numpy(x) and not x.flags.aligned:
        raise RuntimeError(f"{name} does not lie where its numbers can be read (it is not aligned): call it on a copy")
    if not is_channels_last(x):
        strides = x.strides if is_numpy(x) else x.stride()
        raise RuntimeError(
            f"{name} is not contiguous, nor in channels_last (strides {strides}): call it on a contiguous one"
        )


def _check_memory(lists: dict[str, Layouts]) -> None:
    spans = []
    for name, found in lists.items():
        spans += [(begin, end, name, t) for t, (begin, end, _, _) in enumerate(found) if begin < end]
    spans.sort()
    for (_, end, *one), (begin, _, *other) in pairwise(spans):
        if begin < end:
            first, second = (
                f"{name}[{t}]" for name, t in sorted((one, other), key=lambda at: (at[0] != "tensors", at))
            )
            raise RuntimeError(f"{first} and {second} share memory: pass tied tensors once")


def _check_moments(tensors: list[Array], found: Layouts, moments: list[list[Array]]) -> None:
    lists = {"tensors": found}
    for k, moment in enumerate(moments):
        lists[f"moments[{k}]"] = layouts(moment)
        rows = zip(moment, lists[f"moments[{k}]"], tensors, found, strict=True)
        for t, (kept, (_, _, device, row_major), tensor, (_, _, place, _)) in enumerate(rows):
            if dtype_name(kept.dtype) != "float32":
                raise TypeError(f"moments[{k}][{t}] is {kept.dtype}; moments are float32, whatever the weights are")
            if kept.shape != tensor.shape:
                shapes = f"moments[{k}][{t}] is {[*kept.shape]}, tensors[{t}] is {[*tensor.shape]}"
                raise ValueError(f"{shapes}: they must be alike")
            if device != place:
                raise RuntimeError(f"moments[{k}][{t}] is on {device}, tensors[{t}] on {place}: use one device")
            if not row_major:
                _check_channels_last(kept, f"moments[{k}][{t}]")
    _check_memory(lists)


def _check_finite(table: NDArray[Any], name: str, factors: Sequence[float] = (1.0,)) -> None:
    """Every number of the table, times the largest factor, is finite in float32."""
    largest = max(factors)
    beyond = ~(np.abs(table.astype(np.float64)) * largest <= LARGEST_FLOAT32)
    if beyond.any():
        r, p = np.argwhere(beyond)[0]
        times = "" if largest == 1 else f" * {largest}, its factor"
        raise ValueError(f"{name}[{r}][{p}] must be finite in float32, got {float(table[r, p])}{times}")


def _check_moves(scales: Sequence[float], factors: Sequence[float], name: str) -> None:
    largest = max(factors, default=1.0)
    for r, scale in enumerate(scales):
        if not abs(scale) * largest <= LARGEST_FLOAT32:
            raise ValueError(f"{name.format(r=r)} times its factor must be finite in float32, got {scale} * {largest}")


def _unsigned(bits: Numbers) -> list[int]:
    seeds: list[int] = to_numpy(bits).reshape(-1).view(np.uint64).tolist()
    return seeds


def _join(halves: Sequence[int]) -> int:
    return halves[0] | halves[1] << 32


@ieee_arithmetic
def _noise(backend: ModuleType, out: Array, seed: Sequence[int], stream: int, start: int, dist: str) -> None:
    _check_tensors([out], [start])
    backend.noise_(out, _join(seed), Place.of_one(dist, stream=stream, start=start))
    _mark_changed([out])


@ieee_arithmetic
def _perturb(
    backend: ModuleType,
    tensors: list[Array],
    seed: Sequence[int],
    scale: float,
    place: Place,
    rounding_seed: Sequence[int],
) -> None:
    place, _ = _whole(place, tensors, bool(rounding_seed))
    _check_moves([scale], place.factors, "scale")
    for part, (rows,) in _row_major(place, tensors):
        backend.perturb_(rows, _join(seed), scale, part, _join(rounding_seed) if rounding_seed else None)
    _mark_changed(tensors)


@ieee_arithmetic
def _replay(
    backend: ModuleType,
    tensors: list[Array],
    seeds: Numbers,
    coefficients: Numbers,
    place: Place,
    rounding_seeds: Numbers | None,
) -> None:
    place, _ = _whole(place, tensors, rounding_seeds is not None)
    values: list[float] = coefficients.tolist()
    _check_moves(values, place.factors, "coefficients[{r}]")
    if values:
        rounding = None if rounding_seeds is None else _unsigned(rounding_seeds)
        for part, (rows,) in _row_major(place, tensors):
            backend.replay_(rows, _unsigned(seeds), values, part, rounding)
        _mark_changed(tensors)


@ieee_arithmetic
def _update(
    backend: ModuleType,
    tensors: list[Array],
    moments: list[Array],
    rule: str,
    constants: Sequence[float],
    seeds: Numbers,
    coefficients: Numbers,
    steps: Numbers,
    place: Place,
    rounding_seeds: Numbers | None,
) -> None:
    place, found = _whole(place, tensors, rounding_seeds is not None)
    kept = [moments[k : k + len(tensors)] for k in range(0, len(moments), len(tensors))]
    _check_moments(tensors, found, kept)
    _check_finite(to_numpy(coefficients), "coefficients", place.factors)
    _check_finite(to_numpy(steps), "steps")
    if len(steps):
        record = (_unsigned(seeds), coefficients.flatten().tolist(), steps.tolist())
        rounding = None if rounding_seeds is None else _unsigned(rounding_seeds)
        for part, (rows, *mine) in _row_major(place, tensors, *kept):
            backend.update_(rows, mine, rule, list(constants), *record, part, rounding)
        _mark_changed([*tensors, *moments])


@ieee_arithmetic
def _project(backend: ModuleType, tensors: list[Array], seeds: Numbers, place: Place) -> NDArray[np.float64] | Tensor:
    place, _ = _whole(place, tensors, False)
    rows = [t if is_numpy(t) else t.contiguous() for t in tensors]  # type: ignore[union-attr]
    scalars: NDArray[np.float64] | Tensor = backend.project(rows, _unsigned(seeds), place)
    return scalars


RUN: dict[str, Callable[..., Any]] = {
    "noise_": _noise,
    "perturb_": _perturb,
    "replay_": _replay,
    "update_": _update,
    "project": _project,
}


def _whole(place: Place, tensors: list[Array], stochastic: bool) -> tuple[Place, Layouts]:
    """The place with its defaults filled in, and the tensors' layouts, once both are checked."""
    dist, factors, streams, starts = place
    found = _check_tensors(tensors, starts)
    if stochastic and any(dtype_name(t.dtype) == "float16" for t in tensors):
        raise TypeError("stochastic rounding is defined for bfloat16; float16 tensors take rounding='nearest'")
    n = len(tensors)
    return Place(dist, _factors(factors, n), list(streams or range(n)), list(starts or [0] * n)), found


def _row_major(place: Place, *lists: list[Array]) -> Iterator[tuple[Place, Sequence[list[Array]]]]:
    """Parts of the lists as kernels take them, those in channels_last as copies, and the place of each.

    The copies are written back when the next ones are asked for, so that there is one at a time.
    """
    if all(all(are_row_major(xs)) for xs in lists):
        yield place, lists
        return
    strided = [t for t, row_major in enumerate(zip(*map(are_row_major, lists), strict=True)) if not all(row_major)]
    columns: list[tuple[Any, ...]] = list(zip(*lists, strict=True))
    plain = [t for t in range(len(columns)) if t not in strided]
    if plain:
        yield place.of(plain), [[values[t] for t in plain] for values in lists]
    for t in strided:
        rows = [x.contiguous() for x in columns[t]]
        yield place.of([t]), [[row] for row in rows]
        for x, row in zip(columns[t], rows, strict=True):
            if row is not x:
                x.copy_(row)


def _mark_changed(tensors: list[Array]) -> None:
    if tensors and not is_numpy(tensors[0]):
        _tensors().mark_changed(tensors)
