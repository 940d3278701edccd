"""The ops: their public functions, their schemas, and their dispatch. They take numpy arrays and torch tensors alike.

    public function   checks what can be checked while torch.compile traces: seeds, scales, lengths, autograd
    torch.ops.hosfl   for tensors: selects the backend by their device (tensors.py registers the ops)
    RUN               checks the arrays themselves, calls the backend, tells autograd that they changed

For numpy arrays the public function calls RUN directly, with the C++ backend. A backend is a module with one function
per op. Nothing falls back silently: a device without a backend is an error. torch is imported only for a tensor.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from hosfl_kernels import arrays, cpu, reference, spec, validation
from hosfl_kernels.arrays import Layouts, are_row_major, dtype_name, is_numpy, sizes, tensors_module, to_numpy
from hosfl_kernels.cpu import ieee_arithmetic, threads
from hosfl_kernels.place import Place
from hosfl_kernels.rules import SGD, AdamW, Rule

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from hosfl_kernels.arrays import Array
    from hosfl_kernels.validation import Coefficients, Numbers, Seeds, SeedTable, Table

__all__ = [
    "backends",
    "derive",
    "noise",
    "perturb_",
    "perturb_rows_",
    "project",
    "replay_",
    "snap_",
    "threads",
    "update_",
]

NAMES = ("numpy", "cpp", "triton", "cuda")
BACKENDS: dict[str, ModuleType] = {"numpy": reference, "cpp": cpu}  # tensors.py adds those that take tensors only

# A schema's int is signed, so a seed is passed as two 32-bit halves. These are SymInts, since torch.compile would
# recompile for every new value of an int. Records are passed as tensors for the same reason.
PLACE = "str dist, float[] factors, SymInt[] streams, SymInt[] starts"  # a Place, field by field
SCHEMAS = {
    "noise_": "(Tensor(a!) out, SymInt[] seed, SymInt stream, SymInt start, str dist) -> ()",
    "perturb_": f"(Tensor(a!)[] tensors, SymInt[] seed, float scale, {PLACE}, SymInt[] rounding_seed) -> ()",
    "perturb_rows_": "(Tensor(a!) rows, Tensor numbers, SymInt[] seed, float scale, str dist, float factor, "
    "SymInt stream) -> ()",
    "replay_": f"(Tensor(a!)[] tensors, Tensor seeds, Tensor coefficients, {PLACE}, Tensor? rounding_seeds) -> ()",
    "update_": "(Tensor(a!)[] tensors, Tensor(b!)[] moments, str rule, float[] constants, Tensor seeds, "
    f"Tensor coefficients, Tensor steps, {PLACE}, Tensor? rounding_seeds) -> ()",
    "project": f"(Tensor[] tensors, Tensor seeds, {PLACE}) -> Tensor",
}


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
    """Make elements start .. start + n of the noise of (seed, stream), float32 [n], for study and tests.

    Args:
        n: number of elements, 0 or more.
        seed: 0 <= seed < 2^64.
        stream: the number of the noise stream, one per parameter tensor, 0 <= stream < 2^32.
        start: index of the first element in the whole tensor, 0 <= start and start + n <= 2^63.
        dist: "rademacher" (+1 or -1) or "gaussian" (standard normal, |z| <= 6.77).
        device: torch's name of a device, for a tensor; "numpy", for an array. The kind of the result depends on the
            arguments alone, never on what is installed: without torch the default is an error.

    The same bits on every backend, device and thread count; noise(n)[k:] equals noise(n - k, start=k). `perturb_` adds
    this noise without storing it.

    Raises: ValueError for a value out of range, TypeError for a wrong type, ModuleNotFoundError if a tensor is
    requested and torch is missing.
    """
    for value, end, name in ((n, 2**63, "n"), (stream, 2**32, "stream"), (start, 2**63, "start")):
        validation.check_integer(value, end, name)
    if start + n > 2**63:
        raise ValueError(f"start + n must be at most 2^63, got {start} + {n}")
    validation.make_place(1, dist, None, None, None)
    halves = validation.seed_halves(seed, "seed")
    out = np.empty(n, np.float32) if device == "numpy" else _empty_tensor(n, device)
    if is_numpy(out):
        RUN["noise_"](cpu, out, halves, stream, start, dist)
    else:
        tensors_module().call("noise_", out, halves, stream, start, dist)
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

        hosfl_kernels.perturb_([weight, bias], seed=7, scale=1e-3)

    Args:
        tensors: one or a list, float32, bfloat16 or float16, of any shapes, no two sharing memory. Either torch
            tensors, all on one device, contiguous or in channels_last; the latter are copied one at a time, and not in
            a CUDA graph. Or numpy arrays, contiguous in C order, bfloat16 as ml_dtypes.bfloat16 or as its bits in
            uint16. An element's noise depends on its index, not on the strides.
        seed: 0 <= seed < 2^64.
        scale: finite in float32. Inside torch.compile a Python float is a constant: a new value is a new graph.
        dist: "rademacher" (+1 or -1) or "gaussian" (standard normal, |z| <= 6.77).
        factors: a power of two per tensor, from 2^-100 to 2^100; None: 1.
        streams: the number of each tensor's noise stream, 0 <= stream < 2^32; None: its position in the list.
        starts: for each tensor, the index of its first element in the unsharded tensor; None: 0.
        rounding: "nearest" (ties to even), or "stochastic", which rounds bfloat16 tensors up with the probability that
            the cut-off bits give. float32 has nothing to round; float16 is refused.
        rounding_seed: the seed of stochastic rounding; 0 <= rounding_seed < 2^64.

    Formula: y = float32(x) + s * z with s = float32(scale) * factor, the product rounded, then the sum, then y to x's
    dtype. Bit for bit the same on every backend, device, thread count and sharding. Adding noise and subtracting it
    again restores the bits only on the lattice of `snap_` with Rademacher noise; elsewhere every call rounds.

    No temporary of the tensors' size is made, except for those in channels_last. Not guaranteed: the payload of NaN.

    Source: `hosfl_kernels/spec.py`; the noise is Philox4x32-10 (Salmon et al., SC 2011).

    Raises, before any tensor is changed:
        ValueError: a number is out of range, or lists have different lengths.
        TypeError: an argument has a wrong type, or a tensor another dtype.
        RuntimeError: tensors are on several devices, share memory, have another memory layout, or require grad outside
            of torch.no_grad().
    """
    tensors = validation.array_list(tensors)
    place = validation.make_place(len(tensors), dist, factors, streams, starts)
    scale = validation.checked_scale(scale)
    validation.check_rounding(rounding, rounding_seed is not None, "rounding_seed")
    halves = validation.seed_halves(seed, "seed")
    rounding_halves = [] if rounding_seed is None else validation.seed_halves(rounding_seed, "rounding_seed")
    if tensors:
        _call("perturb_", _takes_numpy(tensors), (tensors, halves, scale), place, (rounding_halves,))


def perturb_rows_(
    rows: Array,
    numbers: Array,
    seed: int,
    scale: float,
    *,
    dist: str = "rademacher",
    factor: float = 1.0,
    stream: int = 0,
) -> None:
    """Move copies of a table's rows as `perturb_` would move the table: for every k, with z = z(seed, stream),
    rows[k] += scale * factor * z[numbers[k] * d : (numbers[k] + 1) * d].

        rows = table[indices]  # what an embedding looks up
        hosfl_kernels.perturb_rows_(rows, indices, seed=7, scale=1e-3)  # as if the table had moved

    Args:
        rows: tensor or array [..., d], float32, bfloat16 or float16, contiguous. Every row is moved once.
        numbers: int64 or int32 [...], on the same device: the numbers of these rows in the table, 0 or more and with
            (number + 1) * d <= 2^63. They may repeat, and are in any order.
        factor: a power of two from 2^-100 to 2^100.
        stream: the number of the table's noise stream, 0 <= stream < 2^32.
        seed, scale, dist: as in `perturb_`.

    The bits are those of `perturb_` on the whole table. A lookup then costs the memory and time of its rows, whatever
    the size of the vocabulary. On a GPU nothing waits for the device, and so the values of `numbers` are not checked.

    Raises, before anything is changed:
        ValueError: a number is out of range, or the shapes do not fit.
        TypeError: an argument has a wrong type or dtype.
        RuntimeError: rows are not contiguous, on another device than `numbers`, or require grad outside of
            torch.no_grad().
    """
    (rows,) = validation.array_list([rows], "rows")
    (numbers,) = validation.array_list([numbers], "numbers", changed=False, like=[rows])
    validation.make_place(1, dist, None, None, None)
    scale = validation.checked_scale(scale)
    validation.check_number(factor, "factor")
    validation.check_integer(stream, 2**32, "stream")
    arguments = (rows, numbers, validation.seed_halves(seed, "seed"), scale, dist, factor, stream)
    if is_numpy(rows):
        RUN["perturb_rows_"](cpu, *arguments)
    else:
        tensors_module().call("perturb_rows_", *arguments)


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

        hosfl_kernels.replay_([weight, bias], seeds=[1, 2, 3], coefficients=[0.5, -0.25, 0.125])

    The bits are those of `perturb_(tensors, seeds[r], coefficients[r], ...)` for r = 0, 1, ... in this order, every
    rounding included; the weights cross the memory bus once, whatever the number of records.

    Args:
        tensors: as in `perturb_`.
        seeds: R integers, 0 <= seed < 2^64; or a numpy array [R] of uint64, or of int64 that has their bits; or such an
            int64 CPU tensor, which torch.compile prefers.
        coefficients: R finite numbers, or a float32 array or CPU tensor [R].
        rounding_seeds: for rounding="stochastic": R more seeds, one per record.
        Everything else as in `perturb_`.

    Records may also be tensors on the tensors' GPU, all of them, except with the kernels of HOSFL_CUDA=1. The kernel
    reads them when it runs: the call waits for nothing, and a CUDA graph that captures it reads their current values at
    every replay. The values are then not checked: a coefficient that is infinite or NaN reaches the weights. Weights in
    channels_last can't be captured, since they are copied at every call.

    Raises what `perturb_` raises, before any tensor is changed; RuntimeError also if only some of the records are on a
    GPU.
    """
    tensors = validation.array_list(tensors)
    place = validation.make_place(len(tensors), dist, factors, streams, starts)
    validation.check_rounding(rounding, rounding_seeds is not None, "rounding_seeds")
    numpy = _takes_numpy(tensors)
    seeds = validation.seed_bits(seeds, "seeds", numpy)
    coefficients = validation.real_numbers(coefficients, "coefficients", validation.ONE_DIMENSIONAL, numpy)
    if len(seeds) != len(coefficients):
        raise ValueError(f"{len(seeds)} seeds but {len(coefficients)} coefficients")
    if rounding_seeds is not None:
        rounding_seeds = validation.seed_bits(rounding_seeds, "rounding_seeds", numpy)
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

        rule = hosfl_kernels.AdamW()
        moments = [[torch.zeros_like(w) for w in weights] for _ in range(rule.moments)]
        steps = rule.steps(rounds=[0, 1], rates=[1e-3, 1e-3])  # two rounds
        seeds, coefficients = [[1, 2], [3, 4]], [[0.5, -0.5], [0.25, 0.5]]  # of 2 directions each
        hosfl_kernels.update_(weights, moments, rule, seeds, coefficients, steps)

    Args:
        tensors: as in `perturb_`.
        moments: `rule.moments` lists, each with one float32 tensor per weight tensor (arrays if the weights are), of
            the same shape and device, strides as for weights, sharing no memory with anything else. Zeros before the
            first round. AdamW: [m, v], v >= 0.
        rule: `SGD(...)` or `AdamW(...)`.
        seeds: R rounds of P directions, 0 <= seed < 2^64; or [R, P] of their bits, as in `replay_`.
        coefficients: float32 array or CPU tensor [R, P], or nested lists; finite. Their weighted sum of directions is
            the estimate of the gradient: for a mean over directions they include the factor 1 / P.
        steps: float32 array or CPU tensor [R, 3] of finite numbers (rate, keep, root), as `rule.steps` makes them.
        rounding_seeds: for rounding="stochastic": R seeds, one per round.
        Everything else as in `perturb_`.

    Formula, for every element and round; each operation is one float32 operation rounded to nearest, none is fused:

        g = 0, then for every direction p: g = g + (float32(coefficient) * factor) * z(seed)
        SGD     d = g; with momentum m = momentum * m + g, d = m
        AdamW   m = b1 * m + (1 - b1) * g; v = b2 * v + (1 - b2) * (g * g)
                d = m / (sqrt(v) * root + eps)
        x = x * keep - rate * d, rounded to x's dtype as in `perturb_`

    Records may also be tensors on the tensors' GPU, all of them, including `steps`: see `replay_`. A CUDA graph that
    captures the call then reads rate, decay and bias corrections anew at every replay. Betas, eps and momentum are
    those of the captured call. Neither weights nor moments may be in channels_last there.

    Many rounds in one call give the bits of one call per round, on every backend, device, thread count and sharding;
    weights and moments cross the memory bus once. Not guaranteed: the payload of NaN.

    Raises what `replay_` raises, before any tensor is changed.
    """
    if not isinstance(rule, (SGD, AdamW)):
        raise TypeError(f"rule must be SGD or AdamW, got {type(rule).__name__}")
    tensors = validation.array_list(tensors)
    flat_moments = validation.moment_lists(moments, rule, tensors)
    place = validation.make_place(len(tensors), dist, factors, streams, starts)
    validation.check_rounding(rounding, rounding_seeds is not None, "rounding_seeds")
    numpy = _takes_numpy(tensors)
    seeds = validation.seed_table(seeds, numpy)
    rounds, directions = seeds.shape
    coefficients = validation.real_table(coefficients, "coefficients", (rounds, directions), numpy)
    steps = validation.real_table(steps, "steps", (rounds, 3), numpy)
    if rounding_seeds is not None:
        rounding_seeds = validation.seed_bits(rounding_seeds, "rounding_seeds", numpy)
        if len(rounding_seeds) != rounds:
            raise ValueError(f"{rounds} rounds but {len(rounding_seeds)} rounding_seeds")
    if tensors:
        record = (rule.name, rule.constants, seeds, coefficients, steps)
        _call("update_", numpy, (tensors, flat_moments, *record), place, (rounding_seeds,))


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
    """Compute inner products: scalars[r] = sum_t factors[t] * <tensors[t], z(seeds[r], streams[t])>.

        scalars = hosfl_kernels.project(gradients, seeds=[1, 2, 3])  # float64 [3]

    This is the transpose of `replay_`, in one pass over the tensors for all seeds.

    Args:
        tensors: as in `perturb_`. They are only read: they may require grad, and arrays may be read-only. Those in
            channels_last are copied, all at once.
        seeds: R seeds, as in `replay_`, on the CPU.
        Everything else as in `perturb_`.

    Returns float64 [R] without a gradient: a tensor on the CPU for tensors, an array for arrays. R may be 0, and the
    list may be empty; it then counts as tensors if torch has been imported.

    Products and the sums of up to 128 of them down a column are float32, all further sums float64. On the CPU the order
    of every sum is that of `spec.project`: the same bits for every thread count and instruction set. A GPU has its own
    order and agrees to 1e-6 * sum_t factors[t] * sum |tensors[t] * z|; so does the sum over shards with the result for
    the whole tensor. Infinity, NaN, and a float32 sum that overflows reach the result.

    Raises what `perturb_` raises.
    """
    tensors = validation.array_list(tensors, changed=False)
    place = validation.make_place(len(tensors), dist, factors, streams, starts)
    numpy = _takes_numpy(tensors)
    scalars: NDArray[np.float64] | Tensor = _call(
        "project", numpy, (tensors, validation.seed_bits(seeds, "seeds", numpy)), place
    )
    return scalars


@ieee_arithmetic
def snap_(tensors: Array | Iterable[Array], *, factors: Sequence[float] | None = None, headroom: float = 2.0) -> float:
    """Round float32 tensors, in place, to a lattice on which Rademacher moves are exact. Returns the quantum.

        quantum = hosfl_kernels.snap_(weights)
        hosfl_kernels.perturb_(weights, seed=7, scale=1000 * quantum)
        hosfl_kernels.perturb_(weights, seed=7, scale=-1000 * quantum)  # the same bits as before

    Args:
        tensors: float32, else as in `perturb_`.
        factors: as in `perturb_`.
        headroom: the factor by which the largest weight may grow, from 1 to 2^16; each doubling costs one bit.

    Formula: quantum = 2^(e - 24), e the smallest with 2^e > headroom * max_t(max|tensors[t]| / factors[t]). Tensor t is
    rounded to multiples of quantum * factors[t], ties to even and -0 to +0. The error is at most half of such a step:
    with a headroom of 2 at most 6e-8 for weights below 1.

    From then on, as long as every scale and coefficient is a multiple of the quantum and every |x| stays at or below
    2^24 * quantum * factor (at first at least `headroom` times the largest weight), `perturb_` and `replay_` with
    Rademacher noise round nothing: undoing a perturbation restores the bits, and records commute.

    If all tensors are zeros, the quantum is 2^-24, with room up to 1. There is one quantum for all tensors: every move
    is a multiple of the largest one's anyway, and a bias that starts at zero has as much room as the largest weight.

    Raises, before any tensor is changed:
        ValueError: weights are infinite or NaN, or so large or small that quantum * factor is not from 2^-126 to 2^103;
            or a number is out of range.
        TypeError: a tensor is not float32.
        RuntimeError: as in `perturb_`.
    """
    tensors = validation.array_list(tensors)
    validation.make_place(len(tensors), "rademacher", factors, None, None)
    if not 1 <= headroom <= 2**16:
        raise ValueError(f"headroom must be between 1 and 2^16, got {headroom}")
    validation.check_tensors(tensors)
    factors = validation.checked_factors(factors, len(tensors))
    if any(dtype_name(t.dtype) != "float32" for t in tensors):
        raise TypeError("snap_ takes float32 tensors only: bfloat16 and float16 have too few bits for a lattice")
    kind = arrays if not tensors or is_numpy(tensors[0]) else tensors_module()
    maxima = [kind.max_abs(t) for t in tensors]
    for t, largest in enumerate(maxima):
        if not math.isfinite(largest):
            raise ValueError(f"tensor {t} has infinite or NaN elements; there is no lattice for them")
    quantum = spec.quantum(maxima, factors, headroom)
    for t, factor in enumerate(factors):
        if not 2.0**-126 <= quantum * factor <= 2.0 ** (127 - 24):
            raise ValueError(
                f"tensor {t} has no lattice in float32's normal numbers: its step would be {quantum * factor:g}, for a"
                f" largest weight of {max(m / f for m, f in zip(maxima, factors, strict=True)):g} times its factor"
            )
    for tensor, factor in zip(tensors, factors, strict=True):
        kind.snap_(tensor, quantum * factor)
    return quantum


def derive(seed: int, a: int, b: int) -> int:
    """Derive the seed number (a, b) from `seed`, as a hash. Make every seed this way.

        seeds = [hosfl_kernels.derive(seed, round, p) for p in range(directions)]

    Args:
        seed: 0 <= seed < 2^64.
        a: 0 <= a < 2^64.
        b: 0 <= b < 2^32.

    Returns an integer from 0 to 2^64 - 1: two words of Philox with key = seed, see spec.py. Seeds made by arithmetic
    collide; these do not, in practice.

    Raises:
        ValueError: a number is out of range.
        TypeError: an argument is not an integer.
    """
    validation.seed_halves(seed, "seed")
    validation.seed_halves(a, "a")
    validation.check_integer(b, 2**32, "b")
    return spec.derive(int(seed), int(a), int(b))


def backends() -> dict[str, str | None]:
    """What each backend runs on here, by the backend's name; None if it cannot run.

    Imports torch and triton if they are installed.
    """
    modules = installed()
    return {name: modules[name].describe() if name in modules else None for name in NAMES}


def installed() -> dict[str, ModuleType]:
    """The backends' modules by name: all or, without torch, those that take numpy arrays."""
    try:
        return dict(tensors_module().BACKENDS)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        return BACKENDS


# --- arrays or tensors ---------------------------------------------------------------------------------------------


def _takes_numpy(tensors: Sequence[Array]) -> bool:
    """Whether an op runs on numpy arrays. An empty list counts as tensors if torch has been imported."""
    return is_numpy(tensors[0]) if tensors else sys.modules.get("torch") is None


def _empty_tensor(n: int, device: torch.device | str) -> Tensor:
    """Make an uninitialised float32 tensor [n]. Raises ModuleNotFoundError, with advice, without torch."""
    try:
        empty: Tensor = tensors_module().empty(n, device)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        message = "noise makes a tensor, which needs torch: pip install 'hosfl[torch]', or pass device='numpy'"
        raise ModuleNotFoundError(message, name="torch") from error
    return empty


def _call(op: str, numpy: bool, arguments: Sequence[Any], place: Place, rounding: Sequence[Any] = ()) -> Any:
    """Call an op on arrays, or through torch on tensors. rounding: the arguments after the place."""
    if numpy:
        return RUN[op](cpu, *arguments, place, *rounding)
    return tensors_module().call(op, *arguments, *place, *rounding)


# --- running an op: checks of the actual arrays, then the backend --------------------------------------------------


@ieee_arithmetic
def _noise(backend: ModuleType, out: Array, seed: Sequence[int], stream: int, start: int, dist: str) -> None:
    validation.check_tensors([out], [start])
    backend.noise_(out, validation.join_halves(seed), Place.single(dist, stream=stream, start=start))
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
    place, _ = _checked_place(place, tensors, bool(rounding_seed))
    validation.check_scales([scale], place.factors, "scale")
    rounding = validation.join_halves(rounding_seed) if rounding_seed else None
    _run_in_place(
        lambda part, rows: backend.perturb_(rows, validation.join_halves(seed), scale, part, rounding), place, tensors
    )


@ieee_arithmetic
def _perturb_rows(
    backend: ModuleType,
    rows: Array,
    numbers: Array,
    seed: Sequence[int],
    scale: float,
    dist: str,
    factor: float,
    stream: int,
) -> None:
    numbers = validation.checked_row_numbers(rows, numbers)
    validation.check_factor(factor, "factor")
    validation.check_scales([scale], [factor], "scale")
    place = Place.single(dist, factor, stream)
    if sizes([rows])[0]:
        backend.perturb_rows_(rows, numbers, validation.join_halves(seed), scale, place)
    _mark_changed([rows])


@ieee_arithmetic
def _replay(
    backend: ModuleType,
    tensors: list[Array],
    seeds: Numbers,
    coefficients: Numbers,
    place: Place,
    rounding_seeds: Numbers | None,
) -> None:
    place, _ = _checked_place(place, tensors, rounding_seeds is not None)
    records = {"seeds": seeds, "coefficients": coefficients, "rounding_seeds": rounding_seeds}
    record: tuple[Any, ...] = (seeds, coefficients)
    rounding: Any = rounding_seeds
    if not validation.are_on_gpu(records, tensors):
        record = (validation.unsigned_seeds(seeds), coefficients.tolist())
        rounding = None if rounding_seeds is None else validation.unsigned_seeds(rounding_seeds)
        validation.check_scales(record[1], place.factors, "coefficients[{r}]")
    if len(seeds):
        _run_in_place(lambda part, rows: backend.replay_(rows, *record, part, rounding), place, tensors)


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
    place, layouts = _checked_place(place, tensors, rounding_seeds is not None)
    moment_lists = [moments[k : k + len(tensors)] for k in range(0, len(moments), len(tensors))]
    validation.check_moments(tensors, layouts, moment_lists)
    record: tuple[Any, ...] = (seeds, coefficients, steps)
    rounding: Any = rounding_seeds
    named = {"seeds": seeds, "coefficients": coefficients, "steps": steps, "rounding_seeds": rounding_seeds}
    if not validation.are_on_gpu(named, tensors):
        validation.check_finite(to_numpy(coefficients), "coefficients", place.factors)
        validation.check_finite(to_numpy(steps), "steps")
        record = (validation.unsigned_seeds(seeds), coefficients.flatten().tolist(), steps.tolist())
        rounding = None if rounding_seeds is None else validation.unsigned_seeds(rounding_seeds)
    fixed = (rule, list(constants), *record)
    if len(steps):
        _run_in_place(
            lambda part, rows, *moment_rows: backend.update_(rows, moment_rows, *fixed, part, rounding),
            place,
            tensors,
            *moment_lists,
        )


@ieee_arithmetic
def _project(backend: ModuleType, tensors: list[Array], seeds: Numbers, place: Place) -> NDArray[np.float64] | Tensor:
    validation.check_on_host(seeds, "project")
    place, _ = _checked_place(place, tensors, False)
    rows = [t if is_numpy(t) else t.contiguous() for t in tensors]  # type: ignore[union-attr]
    scalars: NDArray[np.float64] | Tensor = backend.project(rows, validation.unsigned_seeds(seeds), place)
    return scalars


# What runs an op on a backend: see the module's docstring.
RUN: dict[str, Callable[..., Any]] = {
    "noise_": _noise,
    "perturb_": _perturb,
    "perturb_rows_": _perturb_rows,
    "replay_": _replay,
    "update_": _update,
    "project": _project,
}


def _checked_place(place: Place, tensors: list[Array], stochastic: bool) -> tuple[Place, Layouts]:
    """Check a place and its tensors. Returns (the place with its defaults filled in, the tensors' layouts).

    Results are cached by all that the checks read, including addresses, since `.data` may be rebound at any time.
    Without the cache, checking 300 tensors takes as long as the C++ takes to move them.
    """
    tensors_key = arrays.cache_key(tensors)
    if tensors_key is None:
        return _validate_place(place, tensors, stochastic)
    key = (place.dist, stochastic, tuple(place.factors), tuple(place.streams), tuple(place.starts), tensors_key)
    checked = _checked_lists.get(key)
    if checked is None:
        checked = _validate_place(place, tensors, stochastic)
        if len(_checked_lists) >= MAX_CACHED_LISTS:  # threads that add at the same time may exceed it
            _checked_lists.clear()
        _checked_lists[key] = checked
    return checked


# A program that moves parameters one by one has hundreds of lists. An entry takes 1 KB, and 0.3 KB per further tensor.
MAX_CACHED_LISTS = 1024
_checked_lists: dict[tuple[Any, ...], tuple[Place, Layouts]] = {}


def _validate_place(place: Place, tensors: list[Array], stochastic: bool) -> tuple[Place, Layouts]:
    """Do what `_checked_place` does, without its cache. Raises TypeError, RuntimeError, ValueError."""
    dist, factors, streams, starts = place
    layouts = validation.check_tensors(tensors, starts)
    if stochastic and any(dtype_name(t.dtype) == "float16" for t in tensors):
        raise TypeError("stochastic rounding is defined for bfloat16; float16 tensors take rounding='nearest'")
    n = len(tensors)
    factors = validation.checked_factors(factors, n)
    return Place(dist, factors, list(streams or range(n)), list(starts or [0] * n)), layouts


def _run_in_place(call: Callable[..., None], place: Place, *lists: list[Array]) -> None:
    """Call a kernel on row-major tensors, and mark all tensors of the lists as changed for autograd.

    call: takes a place and the lists. Tensors in channels_last are copied, and copied back, one at a time, through a
    buffer of the largest one's size. The buffer is allocated first: if memory is short, nothing is changed. A launch on
    a GPU may still need some KB for its tables.
    """
    all_row_major = all(all(are_row_major(xs)) for xs in lists)
    row_major = [] if all_row_major else [all(flags) for flags in zip(*map(are_row_major, lists), strict=True)]
    strided = [t for t, flag in enumerate(row_major) if not flag]
    buffers = [tensors_module().copy_buffer(xs) for xs in lists] if strided else []
    try:
        if not strided:
            return call(place, *lists)
        contiguous = [t for t, flag in enumerate(row_major) if flag]
        if contiguous:
            call(place.subset(contiguous), *([xs[t] for t in contiguous] for xs in lists))
        for t in strided:
            originals: list[Any] = [xs[t] for xs in lists]
            copies = [tensors_module().contiguous_copy(x, buffer) for x, buffer in zip(originals, buffers, strict=True)]
            call(place.subset([t]), *([copy] for copy in copies))
            for x, copy in zip(originals, copies, strict=True):
                if copy is not x:
                    x.copy_(copy)
    finally:  # also after an error, which may come when some of them have changed
        _mark_changed([x for xs in lists for x in xs])


def _mark_changed(tensors: list[Array]) -> None:
    """Tell autograd that tensors were changed; does nothing for arrays."""
    if tensors and not is_numpy(tensors[0]):
        tensors_module().mark_changed(tensors)
