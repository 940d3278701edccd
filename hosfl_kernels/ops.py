"""The table of ops: their schemas, their checks, and the registration that joins a name to its backends.

    public function   checks what can be checked while torch.compile traces: seeds, scales, lengths, autograd
    torch.ops.hosfl   picks the backend by the tensors' device
    _run              checks the tensors themselves, calls the backend, tells autograd that they changed

A backend is a module with one function per op. Nothing falls back in silence: a device without a backend is an error.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hosfl_kernels import cpu, cuda, gpu, reference, spec
from hosfl_kernels.cpu import ieee_arithmetic
from hosfl_kernels.place import Place
from hosfl_kernels.rules import SGD, AdamW, Rule

__all__ = ["backends", "derive", "noise", "perturb_", "project", "replay_", "snap_", "update_"]

BACKENDS: dict[str, ModuleType] = {"numpy": reference, "cpp": cpu, "triton": gpu, "cuda": cuda}


def _cuda_backend() -> ModuleType:
    """What serves CUDA tensors: Triton where it is installed, else nvcc's kernels; those first if HOSFL_CUDA=1."""
    if os.environ.get("HOSFL_CUDA") == "1" or importlib.util.find_spec("triton") is None:
        return cuda
    return gpu


DISPATCH = {"CPU": cpu, "CUDA": _cuda_backend()}

# Seeds travel as two 32-bit halves: a schema's int is signed, and a SymInt is not recompiled for every new value.
# Records travel as CPU tensors for the same reason.
_PLACE = "str dist, float[] factors, SymInt[] streams, SymInt[] starts"  # a Place, field by field
SCHEMAS = {
    "noise_": "(Tensor(a!) out, SymInt[] seed, SymInt stream, SymInt start, str dist) -> ()",
    "perturb_": f"(Tensor(a!)[] tensors, SymInt[] seed, float scale, {_PLACE}, SymInt[] rounding_seed) -> ()",
    "replay_": f"(Tensor(a!)[] tensors, Tensor seeds, Tensor coefficients, {_PLACE}, Tensor? rounding_seeds) -> ()",
    "update_": "(Tensor(a!)[] tensors, Tensor(b!)[] moments, str rule, float[] constants, Tensor seeds, "
    f"Tensor coefficients, Tensor steps, {_PLACE}, Tensor? rounding_seeds) -> ()",
    "project": f"(Tensor[] tensors, Tensor seeds, {_PLACE}) -> Tensor",
}

DISTRIBUTIONS = ("rademacher", "gaussian")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_FLOAT32 = float(np.finfo(np.float32).max)

Seeds = Sequence[int] | Tensor
Coefficients = Sequence[float] | Tensor
SeedTable = Sequence[Sequence[int]] | Tensor
Table = Sequence[Sequence[float]] | Tensor


# --- the public functions -------------------------------------------------------------------------------------


def noise(
    n: int,
    seed: int,
    *,
    stream: int = 0,
    start: int = 0,
    dist: str = "rademacher",
    device: torch.device | str = "cpu",
) -> Tensor:
    """Elements start .. start + n of the noise of (seed, stream), float32 [n], for study and tests.

    Args:
        n: number of elements, 0 or more.
        seed: 0 <= seed < 2^64.
        stream: which parameter tensor, 0 <= stream < 2^32.
        start: index of the first element in the whole tensor, 0 <= start and start + n <= 2^63.
        dist: "rademacher" (+1 or -1) or "gaussian" (standard normal, |z| <= 6.77).
        device: where to make it.

    The same bits on every backend, device and thread count; noise(n)[k:] is noise(n - k, start=k). `perturb_` adds
    this very noise without making it.

    Raises: ValueError for a value out of range, TypeError for a wrong type.
    """
    if n < 0:
        raise ValueError(f"n must be 0 or more, got {n}")
    _place_of(1, dist, None, [stream], [start])
    out = torch.empty(n, dtype=torch.float32, device=device)
    _check_tensors([out])
    torch.ops.hosfl.noise_(out, _halves(seed, "seed"), stream, start, dist)
    return out


def perturb_(
    tensors: Tensor | Iterable[Tensor],
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
        tensors: float32, bfloat16 or float16, all on one device, no two sharing memory. Any shapes; contiguous or, for
            the price of a copy of one at a time, in channels_last. Noise goes by index, whatever the strides are.
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
    tensors = _tensor_list(tensors)
    place = _place_of(len(tensors), dist, factors, streams, starts)
    if not isinstance(scale, (float, int, np.floating)):
        raise TypeError(f"scale must be a number, got {type(scale).__name__}")
    if not -LARGEST_FLOAT32 <= scale <= LARGEST_FLOAT32:
        raise ValueError(f"scale must be finite in float32, got {scale}")
    _check_rounding(rounding, rounding_seed is not None, "rounding_seed")
    halves = _halves(seed, "seed")
    rounding_halves = [] if rounding_seed is None else _halves(rounding_seed, "rounding_seed")
    if tensors:
        torch.ops.hosfl.perturb_(tensors, halves, scale, *place, rounding_halves)


def replay_(
    tensors: Tensor | Iterable[Tensor],
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
        seeds: R integers, 0 <= seed < 2^64; or an int64 CPU tensor [R] of their bits, which torch.compile prefers.
        coefficients: R finite numbers, or a float32 CPU tensor [R].
        rounding_seeds: for rounding="stochastic": R more seeds, one per record.
        Everything else as in `perturb_`.

    Raises: ValueError, TypeError or RuntimeError, before any tensor is changed.
    """
    tensors = _tensor_list(tensors)
    place = _place_of(len(tensors), dist, factors, streams, starts)
    _check_rounding(rounding, rounding_seeds is not None, "rounding_seeds")
    seeds = _seed_tensor(seeds, "seeds")
    coefficients = _coefficient_tensor(coefficients)
    if len(seeds) != len(coefficients):
        raise ValueError(f"{len(seeds)} seeds but {len(coefficients)} coefficients")
    if rounding_seeds is not None:
        rounding_seeds = _seed_tensor(rounding_seeds, "rounding_seeds")
        if len(rounding_seeds) != len(seeds):
            raise ValueError(f"{len(seeds)} seeds but {len(rounding_seeds)} rounding_seeds")
    if tensors:
        torch.ops.hosfl.replay_(tensors, seeds, coefficients, *place, rounding_seeds)


def update_(
    tensors: Tensor | Iterable[Tensor],
    moments: Sequence[Tensor | Iterable[Tensor]],
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
        moments: `rule.moments` lists of float32 tensors, each with one tensor per weight tensor: its shape and device,
            strides as for weights, sharing no memory with anything else. Zeros before the first round. AdamW: [m, v],
            v >= 0.
        rule: `SGD(...)` or `AdamW(...)`.
        seeds: R rounds of P directions, 0 <= seed < 2^64; or an int64 CPU tensor [R, P] of their bits.
        coefficients: float32 CPU tensor [R, P] or nested lists; finite. What is summed is the gradient's estimate: a
            mean over directions has its 1 / P in here.
        steps: float32 CPU tensor [R, 3] of finite numbers (rate, keep, root), as `rule.steps` makes them.
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
    tensors = _tensor_list(tensors)
    kept = _moment_lists(moments, rule, len(tensors))
    place = _place_of(len(tensors), dist, factors, streams, starts)
    _check_rounding(rounding, rounding_seeds is not None, "rounding_seeds")
    seeds = _seed_table(seeds)
    rounds, directions = seeds.shape
    coefficients = _table(coefficients, "coefficients", rounds, directions)
    steps = _table(steps, "steps", rounds, 3)
    if rounding_seeds is not None:
        rounding_seeds = _seed_tensor(rounding_seeds, "rounding_seeds")
        if len(rounding_seeds) != rounds:
            raise ValueError(f"{rounds} rounds but {len(rounding_seeds)} rounding_seeds")
    if tensors:
        record = (seeds, coefficients, steps)
        torch.ops.hosfl.update_(tensors, kept, rule.name, rule.constants, *record, *place, rounding_seeds)


def project(
    tensors: Tensor | Iterable[Tensor],
    seeds: Seeds,
    *,
    dist: str = "rademacher",
    factors: Sequence[float] | None = None,
    streams: Sequence[int] | None = None,
    starts: Sequence[int] | None = None,
) -> Tensor:
    """Inner products with seeded directions: scalars[r] = sum_t factors[t] * <tensors[t], z(seeds[r], streams[t])>.

    The transpose of `replay_`, in one pass over the tensors for all seeds. The tensors are only read: they may require
    grad, and the result does not. Returns a float64 tensor [R] on the CPU; R = 0 and an empty list are fine.

    Args:
        seeds: R integers, 0 <= seed < 2^64; or an int64 CPU tensor [R] of their bits, which torch.compile prefers.
        Everything else as in `perturb_`; those in channels_last are copied, all at once.

    Products and the sums of up to 128 of them down a column are float32, all further sums float64. On the CPU the order
    of every sum is that of `spec.project`: the same bits for every thread count and instruction set. A GPU has an order
    of its own and agrees to 1e-6 * sum_t factors[t] * sum |tensors[t] * z|; so do the sums over shards with the whole.
    Infinity, NaN, and a float32 sum that overflows reach the result.

    Raises: ValueError, TypeError or RuntimeError.
    """
    tensors = _tensor_list(tensors, changed=False)
    place = _place_of(len(tensors), dist, factors, streams, starts)
    with torch.no_grad():
        scalars: Tensor = torch.ops.hosfl.project(tensors, _seed_tensor(seeds, "seeds"), *place)
    return scalars


@ieee_arithmetic
def snap_(
    tensors: Tensor | Iterable[Tensor], *, factors: Sequence[float] | None = None, headroom: float = 2.0
) -> float:
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
    tensors = _tensor_list(tensors)
    _place_of(len(tensors), "rademacher", factors, None, None)
    if not 1 <= headroom <= 2**16:
        raise ValueError(f"headroom must be between 1 and 2^16, got {headroom}")
    _check_tensors(tensors)
    factors = _factors(factors, len(tensors))
    if any(t.dtype != torch.float32 for t in tensors):
        raise TypeError("snap_ takes float32 tensors only: bfloat16 and float16 have too few bits for a lattice")
    maxima = [float(t.detach().abs().amax()) if t.numel() else 0.0 for t in tensors]
    for t, largest in enumerate(maxima):
        if not math.isfinite(largest):
            raise ValueError(f"tensor {t} has infinite or NaN elements; there is no lattice for them")
    quantum = spec.quantum(maxima, factors, headroom)
    with torch.no_grad():
        for tensor, factor in zip(tensors, factors, strict=True):
            tensor.div_(quantum * factor).round_().mul_(quantum * factor).add_(0.0)
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
    """What this machine has: backend name -> what it runs on, or None where it cannot run."""
    return {name: module.describe() for name, module in BACKENDS.items()}


# --- checks of numbers: also while torch.compile traces ----------------------------------------------------------


def _tensor_list(tensors: Tensor | Iterable[Tensor], name: str = "tensors", changed: bool = True) -> list[Tensor]:
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    for t, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}[{t}] is {type(tensor).__name__}, not a torch.Tensor")
        if changed and tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{name}[{t}] requires grad, and an in-place change would break its graph: use torch.no_grad()"
            )
        if tensor.device.type not in ("cpu", "cuda"):
            raise RuntimeError(f"{name}[{t}] is on {tensor.device}; there are kernels for cpu and cuda")
    return tensors


def _moment_lists(moments: Sequence[Tensor | Iterable[Tensor]], rule: Rule, n: int) -> list[Tensor]:
    """The moments end to end: all of the first kind, then all of the second."""
    if len(moments) != rule.moments:
        raise ValueError(f"{rule} keeps {rule.moments} moments per tensor, got {len(moments)} lists of them")
    kept = []
    for k, moment in enumerate(moments):
        mine = _tensor_list(moment, f"moments[{k}]")
        if len(mine) != n:
            raise ValueError(f"{n} tensors but {len(mine)} in moments[{k}]")
        kept += mine
    return kept


def _check_integer(value: int, end: int, name: str) -> None:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if not 0 <= value < end:
        raise ValueError(f"{name} must be at least 0 and below 2^{end.bit_length() - 1}, got {value}")


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


def _seed_tensor(seeds: Seeds, name: str) -> Tensor:
    """int64 [R] on the CPU: the bits of uint64 seeds."""
    if isinstance(seeds, Tensor):
        if seeds.dtype != torch.int64 or seeds.dim() != 1 or seeds.device.type != "cpu":
            raise TypeError(f"{name} as a tensor must be int64, one-dimensional and on the CPU")
        return seeds
    for r, seed in enumerate(seeds):
        _check_integer(seed, 2**64, f"{name}[{r}]")
    return torch.from_numpy(np.array(seeds, dtype=np.uint64).view(np.int64))


def _coefficient_tensor(coefficients: Coefficients) -> Tensor:
    """float32 or float64 [R] on the CPU: backends round numbers to float32, in IEEE arithmetic."""
    if isinstance(coefficients, Tensor):
        if coefficients.dtype != torch.float32 or coefficients.dim() != 1 or coefficients.device.type != "cpu":
            raise TypeError("coefficients as a tensor must be float32, one-dimensional and on the CPU")
        return coefficients
    return torch.tensor(coefficients, dtype=torch.float64, device="cpu")


def _seed_table(seeds: SeedTable) -> Tensor:
    """int64 [R, P] on the CPU: the bits of uint64 seeds."""
    if isinstance(seeds, Tensor):
        if seeds.dtype != torch.int64 or seeds.dim() != 2 or seeds.device.type != "cpu":
            raise TypeError("seeds as a tensor must be int64 [rounds, directions], on the CPU")
        return seeds
    for r, row in enumerate(seeds):
        if not isinstance(row, Sequence):
            raise TypeError(f"seeds[{r}] must be a list of integers, one per direction, got {type(row).__name__}")
        if len(row) != len(seeds[0]):
            raise ValueError(f"seeds[0] has {len(seeds[0])} directions, seeds[{r}] has {len(row)}")
        for p, seed in enumerate(row):
            _check_integer(seed, 2**64, f"seeds[{r}][{p}]")
    shape = (len(seeds), len(seeds[0]) if seeds else 0)
    return torch.from_numpy(np.array(seeds, dtype=np.uint64).reshape(shape).view(np.int64))


def _table(values: Table, name: str, rows: int, columns: int) -> Tensor:
    """float32 or float64 [rows, columns] on the CPU, as `_coefficient_tensor`."""
    if isinstance(values, Tensor):
        if values.dtype != torch.float32 or values.dim() != 2 or values.device.type != "cpu":
            raise TypeError(f"{name} as a tensor must be float32, two-dimensional and on the CPU")
        table = values
    else:
        filled = values if len(values) else np.empty((0, columns))
        table = torch.tensor(filled, dtype=torch.float64, device="cpu")
    if table.shape != (rows, columns):
        raise ValueError(f"{name} must be [{rows}, {columns}], one row per round of the seeds, got {[*table.shape]}")
    return table


# --- checks of tensors: on what the backend will really get -------------------------------------------------------


def _factors(factors: Sequence[float] | None, n: int) -> list[float]:
    factors = list(factors or [1.0] * n)
    for t, factor in enumerate(factors):
        if not (2.0**-100 <= factor <= 2.0**100 and math.frexp(factor)[0] == 0.5):
            raise ValueError(f"factors[{t}] must be a power of two between 2^-100 and 2^100, got {factor}")
    return factors


def _check_tensors(tensors: Sequence[Tensor], starts: Sequence[int] | None = None) -> None:
    for t, tensor in enumerate(tensors):
        if tensor.dtype not in DTYPES:
            raise TypeError(f"tensors[{t}] is {tensor.dtype}; the kernels take float32, bfloat16 and float16")
        if tensor.device != tensors[0].device:
            raise RuntimeError(f"tensors[0] is on {tensors[0].device}, tensors[{t}] on {tensor.device}: use one device")
        _check_contiguous(tensor, f"tensors[{t}]")
        if starts and starts[t] + tensor.numel() > 2**63:
            raise ValueError(f"starts[{t}] + numel is beyond 2^63")
    _check_memory({f"tensors[{t}]": tensor for t, tensor in enumerate(tensors)})


def _check_contiguous(tensor: Tensor, name: str) -> None:
    if not (tensor.is_contiguous() or _is_channels_last(tensor)):
        raise RuntimeError(
            f"{name} is not contiguous, nor in channels_last (strides {tensor.stride()}): call it on a contiguous one"
        )


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) or tensor.is_contiguous(
        memory_format=torch.channels_last_3d
    )


def _check_memory(tensors: dict[str, Tensor]) -> None:
    names = list(tensors)
    memory = sorted((x.data_ptr(), x.data_ptr() + x.nbytes, i) for i, x in enumerate(tensors.values()) if x.numel())
    for (_, end, i), (begin, _, j) in pairwise(memory):
        if begin < end:
            first, second = names[min(i, j)], names[max(i, j)]
            raise RuntimeError(f"{first} and {second} share memory: pass tied tensors once")


def _check_moments(tensors: list[Tensor], moments: list[list[Tensor]]) -> None:
    named = {f"tensors[{t}]": tensor for t, tensor in enumerate(tensors)}
    for k, moment in enumerate(moments):
        for t, (kept, tensor) in enumerate(zip(moment, tensors, strict=True)):
            name = f"moments[{k}][{t}]"
            if kept.dtype != torch.float32:
                raise TypeError(f"{name} is {kept.dtype}; moments are float32, whatever the weights are")
            if kept.shape != tensor.shape:
                raise ValueError(f"{name} is {[*kept.shape]}, tensors[{t}] is {[*tensor.shape]}: they must be alike")
            if kept.device != tensor.device:
                raise RuntimeError(f"{name} is on {kept.device}, tensors[{t}] on {tensor.device}: use one device")
            _check_contiguous(kept, name)
            named[name] = kept
    _check_memory(named)


def _check_finite(table: Tensor, name: str, factors: Sequence[float] = (1.0,)) -> None:
    """Every number of the table, times the largest factor, is finite in float32."""
    largest = max(factors)
    beyond = ~(np.abs(table.double().numpy()) * largest <= LARGEST_FLOAT32)
    if beyond.any():
        r, p = np.argwhere(beyond)[0]
        times = "" if largest == 1 else f" * {largest}, its factor"
        raise ValueError(f"{name}[{r}][{p}] must be finite in float32, got {float(table[r, p])}{times}")


def _check_moves(scales: Sequence[float], factors: Sequence[float], name: str) -> None:
    largest = max(factors, default=1.0)
    for r, scale in enumerate(scales):
        if not abs(scale) * largest <= LARGEST_FLOAT32:
            raise ValueError(f"{name.format(r=r)} times its factor must be finite in float32, got {scale} * {largest}")


def _unsigned(bits: Tensor) -> list[int]:
    seeds: list[int] = bits.numpy().view(np.uint64).tolist()
    return seeds


def _join(halves: Sequence[int]) -> int:
    return halves[0] | halves[1] << 32


@ieee_arithmetic
def _noise(backend: ModuleType, out: Tensor, seed: Sequence[int], stream: int, start: int, dist: str) -> None:
    _check_tensors([out], [start])
    backend.noise_(out, _join(seed), Place.of_one(dist, stream=stream, start=start))
    _bump([out])


@ieee_arithmetic
def _perturb(
    backend: ModuleType,
    tensors: list[Tensor],
    seed: Sequence[int],
    scale: float,
    place: Place,
    rounding_seed: Sequence[int],
) -> None:
    place = _whole(place, tensors, bool(rounding_seed))
    _check_moves([scale], place.factors, "scale")
    for part, (rows,) in _row_major(place, tensors):
        backend.perturb_(rows, _join(seed), scale, part, _join(rounding_seed) if rounding_seed else None)
    _bump(tensors)


@ieee_arithmetic
def _replay(
    backend: ModuleType,
    tensors: list[Tensor],
    seeds: Tensor,
    coefficients: Tensor,
    place: Place,
    rounding_seeds: Tensor | None,
) -> None:
    place = _whole(place, tensors, rounding_seeds is not None)
    values: list[float] = coefficients.tolist()
    _check_moves(values, place.factors, "coefficients[{r}]")
    if values:
        rounding = None if rounding_seeds is None else _unsigned(rounding_seeds)
        for part, (rows,) in _row_major(place, tensors):
            backend.replay_(rows, _unsigned(seeds), values, part, rounding)
        _bump(tensors)


@ieee_arithmetic
def _update(
    backend: ModuleType,
    tensors: list[Tensor],
    moments: list[Tensor],
    rule: str,
    constants: Sequence[float],
    seeds: Tensor,
    coefficients: Tensor,
    steps: Tensor,
    place: Place,
    rounding_seeds: Tensor | None,
) -> None:
    place = _whole(place, tensors, rounding_seeds is not None)
    kept = [moments[k : k + len(tensors)] for k in range(0, len(moments), len(tensors))]
    _check_moments(tensors, kept)
    _check_finite(coefficients, "coefficients", place.factors)
    _check_finite(steps, "steps")
    if len(steps):
        record = (_unsigned(seeds.flatten()), coefficients.flatten().tolist(), steps.tolist())
        rounding = None if rounding_seeds is None else _unsigned(rounding_seeds)
        for part, (rows, *mine) in _row_major(place, tensors, *kept):
            backend.update_(rows, mine, rule, list(constants), *record, part, rounding)
        _bump([*tensors, *moments])


@ieee_arithmetic
def _project(backend: ModuleType, tensors: list[Tensor], seeds: Tensor, place: Place) -> Tensor:
    place = _whole(place, tensors, False)
    scalars: Tensor = backend.project([t.contiguous() for t in tensors], _unsigned(seeds), place)
    return scalars


def _whole(place: Place, tensors: list[Tensor], stochastic: bool) -> Place:
    """The place with its defaults filled in, once it and the tensors are checked."""
    n = len(tensors)
    _check_tensors(tensors, place.starts)
    if stochastic and any(t.dtype == torch.float16 for t in tensors):
        raise TypeError("stochastic rounding is defined for bfloat16; float16 tensors take rounding='nearest'")
    streams, starts = list(place.streams or range(n)), list(place.starts or [0] * n)
    return Place(place.dist, _factors(place.factors, n), streams, starts)


def _row_major(place: Place, *lists: list[Tensor]) -> Iterator[tuple[Place, Sequence[list[Tensor]]]]:
    """Parts of the lists as kernels take them, those in channels_last as copies, and the place of each.

    The copies are written back when the next ones are asked for, so that there is one at a time.
    """
    columns = list(zip(*lists, strict=True))
    strided = [t for t, column in enumerate(columns) if not all(x.is_contiguous() for x in column)]
    if not strided:
        yield place, lists
        return
    plain = [t for t in range(len(columns)) if t not in strided]
    if plain:
        yield place.of(plain), [[values[t] for t in plain] for values in lists]
    for t in strided:
        rows = [x.contiguous() for x in columns[t]]
        yield place.of([t]), [[row] for row in rows]
        for x, row in zip(columns[t], rows, strict=True):
            if row is not x:
                x.copy_(row)


def _bump(tensors: list[Tensor]) -> None:
    # torch.library does not do this for us; without it backward would run silently on changed tensors.
    for tensor in tensors:
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)  # one at a time: torch 2.6 takes no list


# --- registration ---------------------------------------------------------------------------------------------

_RUN: dict[str, Any] = {
    "noise_": _noise,
    "perturb_": _perturb,
    "replay_": _replay,
    "update_": _update,
    "project": _project,
}


def _fake_project(tensors: list[Tensor], seeds: Tensor, *place: Any) -> Tensor:
    return seeds.new_empty(seeds.shape, dtype=torch.float64)


def _implementation(name: str, backend: ModuleType) -> Callable[..., Any]:
    """The op as torch.library calls it: the place comes field by field, where its schema has it."""
    before, place, _ = SCHEMAS[name].partition(_PLACE)
    run, at = _RUN[name], before.count(",")
    if not place:
        return partial(run, backend)

    def implementation(*arguments: Any) -> Any:
        end = at + len(Place._fields)
        return run(backend, *arguments[:at], Place(*arguments[at:end]), *arguments[end:])

    return implementation


_library = torch.library.Library("hosfl", "DEF")
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema)
    for _key, _backend in DISPATCH.items():
        _library.impl(_name, _implementation(_name, _backend), _key)
    _fake = _fake_project if _name == "project" else lambda *args: None
    torch.library.register_fake(f"hosfl::{_name}", _fake, lib=_library)
