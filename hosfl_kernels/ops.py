"""The ops: their public functions, their schemas, and what runs them. They take numpy arrays and torch tensors alike.

    public function   checks what can be checked while torch.compile traces: seeds, scales, lengths, autograd
    torch.ops.hosfl   for tensors: picks the backend by their device (tensors.py registers the ops)
    RUN               checks the arrays themselves, calls the backend, tells autograd that they changed

numpy arrays go from the public function to RUN, with the C++ backend. A backend is a module with one function per op.
Nothing falls back in silence: a device without a backend is an error. torch is imported for a tensor only.
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
from hosfl_kernels.arrays import Layouts, are_row_major, dtype_name, is_numpy, tensors_module, to_numpy
from hosfl_kernels.cpu import ieee_arithmetic, threads
from hosfl_kernels.place import Place
from hosfl_kernels.rules import SGD, AdamW, Rule

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from hosfl_kernels.arrays import Array
    from hosfl_kernels.validation import Coefficients, Numbers, Seeds, SeedTable, Table

__all__ = ["backends", "derive", "noise", "perturb_", "project", "replay_", "snap_", "threads", "update_"]

NAMES = ("numpy", "cpp", "triton", "cuda")
BACKENDS: dict[str, ModuleType] = {"numpy": reference, "cpp": cpu}  # tensors.py adds those that take tensors only

# Seeds travel as two 32-bit halves: a schema's int is signed, and a SymInt is not recompiled for every new value.
# Records travel as tensors for the same reason.
PLACE = "str dist, float[] factors, SymInt[] streams, SymInt[] starts"  # a Place, field by field
SCHEMAS = {
    "noise_": "(Tensor(a!) out, SymInt[] seed, SymInt stream, SymInt start, str dist) -> ()",
    "perturb_": f"(Tensor(a!)[] tensors, SymInt[] seed, float scale, {PLACE}, SymInt[] rounding_seed) -> ()",
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
    for value, end, name in ((n, 2**63, "n"), (stream, 2**32, "stream"), (start, 2**63, "start")):
        validation.check_integer(value, end, name)
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
            tensors, all on one device, contiguous or, for the price of a copy of one at a time and in no CUDA graph, in
            channels_last; or numpy arrays, contiguous in C order, bfloat16 as ml_dtypes.bfloat16 or as its bits in
            uint16. Noise goes by index, whatever the strides are.
        seed: 0 <= seed < 2^64.
        scale: finite in float32. Inside torch.compile a Python float is a constant: a new value is a new graph.
        dist: "rademacher" (+1 or -1) or "gaussian" (standard normal, |z| <= 6.77).
        factors: a power of two per tensor, from 2^-100 to 2^100; None: 1.
        streams: a number per tensor that names its noise, 0 <= stream < 2^32; None: its position in the list.
        starts: per tensor, the index of its first element in the unsharded tensor; None: 0.
        rounding: "nearest" (ties to even), or "stochastic", which rounds bfloat16 tensors up or down with the odds of
            the cut-off bits. float32 has nothing to round; float16 is refused.
        rounding_seed: the seed of stochastic rounding; 0 <= rounding_seed < 2^64.

    Formula: y = float32(x) + s * z with s = float32(scale) * factor, the product rounded, then the sum, then y to x's
    dtype. Bit for bit the same on every backend, device, thread count and sharding. Adding and taking away again
    returns the same bits only on the lattice of `snap_` with Rademacher; elsewhere every call rounds.

    No temporary of the tensors' size is made, but for those in channels_last. Not promised: the payload of NaN.

    Source: `hosfl_kernels/spec.py`; the noise is Philox4x32-10 (Salmon et al., SC 2011).

    Raises, before any tensor is changed:
        ValueError: a number is out of range, or lists have different lengths.
        TypeError: an argument is of a wrong type, or a tensor of a dtype that is not taken.
        RuntimeError: tensors are on several devices, share memory, are laid out otherwise, or require grad outside of
            torch.no_grad().
    """
    tensors = validation.array_list(tensors)
    place = validation.make_place(len(tensors), dist, factors, streams, starts)
    validation.check_number(scale, "scale")
    if not -validation.LARGEST_FLOAT32 <= scale <= validation.LARGEST_FLOAT32:
        raise ValueError(f"scale must be finite in float32, got {scale}")
    validation.check_rounding(rounding, rounding_seed is not None, "rounding_seed")
    halves = validation.seed_halves(seed, "seed")
    rounding_halves = [] if rounding_seed is None else validation.seed_halves(rounding_seed, "rounding_seed")
    if tensors:
        _call("perturb_", _takes_numpy(tensors), (tensors, halves, scale), place, (rounding_halves,))


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

    Records may also be tensors on the tensors' GPU, all of them. They are read when the kernel runs: a CUDA graph that
    captures the call reads what is there at every replay, and the call waits for nothing. What they hold is then not
    checked: a coefficient that is infinite or NaN reaches the weights. Not with the kernels of HOSFL_CUDA=1. Weights in
    channels_last can't be captured: they are copied at every call.

    Raises what `perturb_` raises, before any tensor is changed; RuntimeError also for records of which some are on a
    GPU and some not.
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
        seeds, coefficients = [[1, 2], [3, 4]], [[0.5, -0.5], [0.25, 0.5]]  # of two directions each
        hosfl_kernels.update_(weights, moments, rule, seeds, coefficients, steps)

    Args:
        tensors: as in `perturb_`.
        moments: `rule.moments` lists of float32 tensors, or arrays where the weights are, each with one per weight
            tensor: its shape and device, strides as for weights, sharing no memory with anything else. Zeros before the
            first round. AdamW: [m, v], v >= 0.
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
        AdamW   m = b1 * m + (1 - b1) * g; v = b2 * v + (1 - b2) * (g * g)
                d = m / (sqrt(v) * root + eps)
        x = x * keep - rate * d, rounded to x's dtype as in `perturb_`

    Records may also be tensors on the tensors' GPU, all of them, `steps` too: see `replay_`. A CUDA graph that captures
    the call then reads rate, decay and bias corrections anew at every replay. Betas, eps and momentum are those of the
    call that it captured. Neither weights nor moments may be in channels_last there.

    Many rounds in one call leave the bits of one call per round, on every backend, device, thread count and sharding;
    weights and moments cross the memory bus once. Not promised: the payload of NaN.

    Raises what `replay_` raises, before any tensor is changed.
    """
    if not isinstance(rule, (SGD, AdamW)):
        raise TypeError(f"rule must be SGD or AdamW, got {type(rule).__name__}")
    tensors = validation.array_list(tensors)
    kept = validation.moment_lists(moments, rule, tensors)
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
    """Inner products: scalars[r] = sum_t factors[t] * <tensors[t], z(seeds[r], streams[t])>.

        scalars = hosfl_kernels.project(gradients, seeds=[1, 2, 3])  # float64 [3]

    The transpose of `replay_`, in one pass over the tensors for all seeds.

    Args:
        tensors: as in `perturb_`. They are only read: they may require grad, and arrays may be read-only. Those in
            channels_last are copied, all at once.
        seeds: R of them, as in `replay_`, on the CPU.
        Everything else as in `perturb_`.

    Returns float64 [R], without a gradient: of tensors a tensor on the CPU, of arrays an array. R = 0 is fine, and so
    is an empty list, which counts as tensors where torch has been imported.

    Products and the sums of up to 128 of them down a column are float32, all further sums float64. On the CPU the order
    of every sum is that of `spec.project`: the same bits for every thread count and instruction set. A GPU has an order
    of its own and agrees to 1e-6 * sum_t factors[t] * sum |tensors[t] * z|; so do the sums over shards with the whole.
    Infinity, NaN, and a float32 sum that overflows reach the result.

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
    """Round float32 tensors to a lattice on which Rademacher moves are exact, in place; returns the quantum.

        quantum = hosfl_kernels.snap_(weights)
        hosfl_kernels.perturb_(weights, seed=7, scale=1000 * quantum)
        hosfl_kernels.perturb_(weights, seed=7, scale=-1000 * quantum)  # the very bits from before

    Args:
        tensors: float32, else as in `perturb_`.
        factors: as in `perturb_`.
        headroom: how far the largest weight may grow, from 1 to 2^16 times its size; each doubling costs one bit.

    Formula: quantum = 2^(e - 24), e the smallest with 2^e > headroom * max_t(max|tensors[t]| / factors[t]). Tensor t is
    rounded to multiples of quantum * factors[t], ties to even and -0 to +0: an error of at most half of it, with a
    headroom of 2 at most 6e-8 for weights below 1.

    From then on, as long as every scale and coefficient is a multiple of the quantum and every |x| stays at or below
    2^24 * quantum * factor (at first `headroom` times the largest weight or more), `perturb_` and `replay_` with
    Rademacher noise round nothing: a perturbation taken back returns the very bits, and records commute.

    Tensors of zeros only have quantum 2^-24: room up to 1. The quantum is one number, not one per tensor: every move is
    a multiple of the largest anyway, and so a bias that starts at zero has as much room as the largest weight.

    Raises, before any tensor is changed:
        ValueError: weights are infinite or NaN, or so large or small that quantum * factor is not from 2^-126 to 2^103;
            or a number is out of range.
        TypeError: a dtype is another than float32.
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
    """The seed number (a, b) below `seed`, a hash. Make every seed this way.

        seeds = [hosfl_kernels.derive(seed, round, p) for p in range(directions)]

    Args:
        seed: 0 <= seed < 2^64.
        a: 0 <= a < 2^64.
        b: 0 <= b < 2^32.

    Returns an integer from 0 to 2^64 - 1: two words of Philox with key = seed, see spec.py. Arithmetic on seeds
    collides; this does not, in practice.

    Raises:
        ValueError: a number out of range.
        TypeError: no integer.
    """
    validation.seed_halves(seed, "seed")
    validation.seed_halves(a, "a")
    validation.check_integer(b, 2**32, "b")
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
        return dict(tensors_module().BACKENDS)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        return BACKENDS


# --- one kind of array or the other --------------------------------------------------------------------------------


def _takes_numpy(tensors: Sequence[Array]) -> bool:
    """Whether an op runs on numpy arrays. An empty list counts as tensors if torch has been imported."""
    return is_numpy(tensors[0]) if tensors else sys.modules.get("torch") is None


def _empty_tensor(n: int, device: torch.device | str) -> Tensor:
    try:
        empty: Tensor = tensors_module().empty(n, device)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        message = "noise makes a tensor, which needs torch: pip install 'hosfl[torch]', or pass device='numpy'"
        raise ModuleNotFoundError(message, name="torch") from error
    return empty


def _call(op: str, numpy: bool, arguments: Sequence[Any], place: Place, rounding: Sequence[Any] = ()) -> Any:
    if numpy:
        return RUN[op](cpu, *arguments, place, *rounding)
    return tensors_module().call(op, *arguments, *place, *rounding)


# --- what runs an op: on what the backend will really get ----------------------------------------------------------


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
    place, found = _checked_place(place, tensors, rounding_seeds is not None)
    kept = [moments[k : k + len(tensors)] for k in range(0, len(moments), len(tensors))]
    validation.check_moments(tensors, found, kept)
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
            lambda part, rows, *mine: backend.update_(rows, mine, *fixed, part, rounding), place, tensors, *kept
        )


@ieee_arithmetic
def _project(backend: ModuleType, tensors: list[Array], seeds: Numbers, place: Place) -> NDArray[np.float64] | Tensor:
    validation.check_on_host(seeds, "project")
    place, _ = _checked_place(place, tensors, False)
    rows = [t if is_numpy(t) else t.contiguous() for t in tensors]  # type: ignore[union-attr]
    scalars: NDArray[np.float64] | Tensor = backend.project(rows, validation.unsigned_seeds(seeds), place)
    return scalars


RUN: dict[str, Callable[..., Any]] = {
    "noise_": _noise,
    "perturb_": _perturb,
    "replay_": _replay,
    "update_": _update,
    "project": _project,
}


def _checked_place(place: Place, tensors: list[Array], stochastic: bool) -> tuple[Place, Layouts]:
    """Check a place and its tensors. Returns the place with its defaults filled in, and the tensors' layouts.

    Results are cached by all that the checks read, addresses included: `.data` may be rebound at any time. Without the
    cache, checking 300 tensors takes as long as the C++ takes to move them.
    """
    key_of_tensors = arrays.cache_key(tensors)
    if key_of_tensors is None:
        return _validate_place(place, tensors, stochastic)
    key = (place.dist, stochastic, tuple(place.factors), tuple(place.streams), tuple(place.starts), key_of_tensors)
    known = _checked_lists.get(key)
    if known is None:
        known = _validate_place(place, tensors, stochastic)
        if len(_checked_lists) >= MAX_CACHED_LISTS:  # may exceed it where threads add at once
            _checked_lists.clear()
        _checked_lists[key] = known
    return known


# Moving parameters one by one makes hundreds of lists. An entry takes 1 KB, and 0.3 KB for every further tensor.
MAX_CACHED_LISTS = 1024
_checked_lists: dict[tuple[Any, ...], tuple[Place, Layouts]] = {}


def _validate_place(place: Place, tensors: list[Array], stochastic: bool) -> tuple[Place, Layouts]:
    """`_checked_place` without its cache. Raises TypeError, RuntimeError, ValueError."""
    dist, factors, streams, starts = place
    found = validation.check_tensors(tensors, starts)
    if stochastic and any(dtype_name(t.dtype) == "float16" for t in tensors):
        raise TypeError("stochastic rounding is defined for bfloat16; float16 tensors take rounding='nearest'")
    n = len(tensors)
    return Place(
        dist, validation.checked_factors(factors, n), list(streams or range(n)), list(starts or [0] * n)
    ), found


def _run_in_place(call: Callable[..., None], place: Place, *lists: list[Array]) -> None:
    """Call a kernel on row-major tensors, and mark all tensors of the lists as changed for autograd.

    call: takes a place and the lists. Tensors in channels_last are copied, and copied back, one at a time, through a
    buffer that holds the largest of them. It is allocated first: if memory is short, nothing is changed. A launch on a
    GPU may still need some KB for its tables.
    """
    all_row_major = all(all(are_row_major(xs)) for xs in lists)
    rows = [] if all_row_major else list(zip(*map(are_row_major, lists), strict=True))
    strided = [t for t, row_major in enumerate(rows) if not all(row_major)]
    buffers = [tensors_module().copy_buffer(xs) for xs in lists] if strided else []
    try:
        if not strided:
            return call(place, *lists)
        contiguous = [t for t, row_major in enumerate(rows) if all(row_major)]
        if contiguous:
            call(place.subset(contiguous), *([xs[t] for t in contiguous] for xs in lists))
        for t in strided:
            mine: list[Any] = [xs[t] for xs in lists]
            copies = [tensors_module().contiguous_copy(x, buffer) for x, buffer in zip(mine, buffers, strict=True)]
            call(place.subset([t]), *([copy] for copy in copies))
            for x, copy in zip(mine, copies, strict=True):
                if copy is not x:
                    x.copy_(copy)
    finally:  # a failure half-way has changed some of them
        _mark_changed([x for xs in lists for x in xs])


def _mark_changed(tensors: list[Array]) -> None:
    if tensors and not is_numpy(tensors[0]):
        tensors_module().mark_changed(tensors)
