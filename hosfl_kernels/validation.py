"""Argument validation, for numpy arrays and torch tensors alike. Every check runs before any tensor is changed.

The first half also runs while torch.compile traces an op, and so reads only numbers, lengths and types. The second half
reads dtypes, devices and memory of the arrays that a backend gets.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hosfl_kernels.arrays import (
    Layouts,
    dtype_name,
    is_channels_last,
    is_numpy,
    layouts,
    may_be_tensor,
    mixed_kinds_error,
    sizes,
    tensors_module,
    to_numpy,
)
from hosfl_kernels.place import DISTRIBUTIONS, Place
from hosfl_kernels.rules import Rule

if TYPE_CHECKING:
    from torch import Tensor

    from hosfl_kernels.arrays import Array

    Numbers = NDArray[Any] | Tensor
    Seeds = Sequence[int] | Numbers
    Coefficients = Sequence[float] | Numbers
    SeedTable = Sequence[Sequence[int]] | Numbers
    Table = Sequence[Sequence[float]] | Numbers

LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


# --- kinds and numbers ------------------------------------------------------------------------------------------


def array_list(
    values: Array | Iterable[Array], name: str = "tensors", changed: bool = True, like: Sequence[Array] = ()
) -> list[Array]:
    """Return an array or tensor, or an iterable of them, as a list of one kind: that of `like`, if given.

    name: the argument's name, for error messages. changed: whether the op writes them. Raises TypeError, ValueError,
    RuntimeError.
    """
    is_single = not isinstance(values, (list, tuple)) and (is_numpy(values) or may_be_tensor(values))
    if not is_single and not isinstance(values, Iterable):
        raise TypeError(f"{name} must be tensors or numpy arrays, one or a list of them, got {type(values).__name__}")
    listed: list[Any] = [values] if is_single else list(values)
    if not listed:
        return listed
    if may_be_tensor(like[0] if like else listed[0]):
        tensors_module().check(listed, name, changed)
        return listed
    for t, x in enumerate(listed):
        if not is_numpy(x):
            raise mixed_kinds_error(x, f"{name}[{t}]")
        if changed and not x.flags.writeable:
            raise ValueError(f"{name}[{t}] is read-only, and would be changed in place: pass a writeable copy")
    return listed


def moment_lists(moments: Sequence[Array | Iterable[Array]], rule: Rule, tensors: list[Array]) -> list[Array]:
    """Return the moments as one flat list: all first moments, then all second ones. Raises TypeError, ValueError."""
    check_list(moments, "moments", "lists of tensors")
    if len(moments) != rule.moments:
        raise ValueError(f"{rule} keeps {rule.moments} moments per tensor, got {len(moments)} lists of them")
    flat = []
    for k, moment in enumerate(moments):
        listed = array_list(moment, f"moments[{k}]", like=tensors)
        if len(listed) != len(tensors):
            raise ValueError(f"{len(tensors)} tensors but {len(listed)} in moments[{k}]")
        flat += listed
    return flat


def check_integer(value: int, end: int, name: str) -> None:
    """Raise TypeError for a value that is no integer, ValueError unless 0 <= value < end. end: a power of two."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if not 0 <= value < end:
        raise ValueError(f"{name} must be at least 0 and below 2^{end.bit_length() - 1}, got {value}")


def check_list(values: object, name: str, content: str) -> None:
    """Raise TypeError for a value without length or order. content: what the list must contain, for the message."""
    is_list = hasattr(values, "__len__") and hasattr(values, "__getitem__")
    if not is_list or isinstance(values, (str, bytes, Mapping)):
        raise TypeError(f"{name} must be a list of {content}, got {type(values).__name__}")


def check_number(value: object, name: str) -> None:
    """Raise TypeError for a value that is no real number."""
    if not isinstance(value, (float, int, np.floating, np.integer)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def checked_scale(scale: float) -> float:
    """Return a scale as Python's float: numpy compares a float16 in float16, where float32's largest is infinite.

    Raises TypeError for what is no number, ValueError for one that is not finite in float32.
    """
    check_number(scale, "scale")
    number = float(scale)
    if not -LARGEST_FLOAT32 <= number <= LARGEST_FLOAT32:
        raise ValueError(f"scale must be finite in float32, got {scale}")
    return number


def seed_halves(seed: int, name: str) -> list[int]:
    """Split a seed into its low and its high 32 bits. Raises TypeError, ValueError."""
    check_integer(seed, 2**64, name)
    if isinstance(seed, np.integer):
        seed = int(seed)
    return [seed & 0xFFFFFFFF, seed >> 32]


def _list_or_empty(values: Sequence[Any] | None) -> list[Any]:
    """Return values as a list; [] for None."""
    return [] if values is None else list(values)


def make_place(
    n: int, dist: str, factors: Sequence[float] | None, streams: Sequence[int] | None, starts: Sequence[int] | None
) -> Place:
    """Check the arguments, and return the `Place` of n tensors. Raises TypeError, ValueError.

    None becomes an empty list; `ops._checked_place` fills in the default later.
    """
    if dist not in DISTRIBUTIONS:
        raise ValueError(f"dist must be one of {', '.join(DISTRIBUTIONS)}, got {dist!r}")
    for name, values in (("factors", factors), ("streams", streams), ("starts", starts)):
        if values is None:
            continue
        check_list(values, name, "numbers, one per tensor")
        if len(values) != n:
            raise ValueError(f"{n} tensors but {len(values)} {name}")
    place = Place(dist, *map(_list_or_empty, (factors, streams, starts)))
    for t, stream in enumerate(place.streams):
        check_integer(stream, 2**32, f"streams[{t}]")
    for t, start in enumerate(place.starts):
        check_integer(start, 2**63, f"starts[{t}]")
    return place


def check_rounding(rounding: str, seeded: bool, name: str) -> None:
    """Raise ValueError for an unknown rounding, or one that does not fit whether `name`, its seeds, is given."""
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"rounding must be nearest or stochastic, got {rounding!r}")
    if seeded != (rounding == "stochastic"):
        raise ValueError(f"rounding='stochastic' and {name} go together: give both or neither")


ONE_DIMENSIONAL, TWO_DIMENSIONAL = ", one-dimensional", ", two-dimensional"  # the argument `dimensions` below


def _checked_numbers(values: Any, name: str, dtype: str, dimensions: str, numpy: bool) -> Numbers | None:
    """Check numbers that were passed as an array or a tensor, and return them; None if they were passed as a list.

    dimensions: how many there must be, as the end of an error message. numpy: whether the op runs on arrays; otherwise
    an array becomes a tensor first, since torch.compile cannot read the dtype of an array. Raises TypeError.
    """
    if not (is_numpy(values) or may_be_tensor(values)):
        return None
    kind = "an array" if is_numpy(values) else "a tensor"
    numbers: Any = _as_op_input(values.copy(), numpy) if is_numpy(values) else values
    matches = str(numbers.dtype).removeprefix("torch.") == dtype and numbers.ndim == (
        1 if dimensions == ONE_DIMENSIONAL else 2
    )
    unsupported_device = not (is_numpy(numbers) or numbers.is_cpu or numbers.is_cuda)
    if not matches or unsupported_device:
        expected = "int64 or uint64" if dtype == "int64" and is_numpy(values) else dtype
        where = f", and not on {numbers.device}" if unsupported_device else ""
        raise TypeError(f"{name} as {kind} must be {expected}{dimensions}{where}")
    return numbers


def check_on_host(seeds: Numbers, op: str) -> None:
    """Raise TypeError for seeds on a GPU, for an op that reads them on the host."""
    if not (isinstance(seeds, np.ndarray) or seeds.is_cpu):
        raise TypeError(f"{op} takes seeds on the CPU, and they are on {seeds.device}")


def are_on_gpu(records: dict[str, Numbers | None], tensors: Sequence[Array]) -> bool:
    """Whether all records are on the tensors' GPU; if not, all of them are on the host.

    records: by their names, for error messages. Raises RuntimeError for records on several devices, or on another GPU
    than the tensors.
    """
    devices = {name: "cpu" if is_numpy(x) else str(x.device) for name, x in records.items() if x is not None}
    if set(devices.values()) == {"cpu"}:
        return False
    gpu = str(getattr(tensors[0], "device", "cpu"))
    for name, device in devices.items():
        if device != gpu:
            raise RuntimeError(f"{name} on {device} for tensors on {gpu}: put all records on the CPU, or all there")
    return True


def _as_op_input(values: NDArray[Any], numpy: bool) -> Numbers:
    """Return seeds or coefficients as an array or, for an op through torch, a tensor; uint64 is viewed as int64."""
    if not numpy:
        numbers: Tensor = tensors_module().from_numpy(values)
        return numbers
    return values.view(np.int64) if values.dtype == np.uint64 else values


def seed_bits(seeds: Seeds, name: str, numpy: bool) -> Numbers:
    """Check seeds, and return their bits as int64 [R]. Raises TypeError, ValueError."""
    if (numbers := _checked_numbers(seeds, name, "int64", ONE_DIMENSIONAL, numpy)) is not None:
        return numbers
    check_list(seeds, name, "integers")
    for r, seed in enumerate(seeds):
        check_integer(seed, 2**64, f"{name}[{r}]")
    return _as_op_input(np.array(seeds, dtype=np.uint64).view(np.int64), numpy)


def seed_table(seeds: SeedTable, numpy: bool) -> Numbers:
    """Check seeds of rounds and directions, and return their bits as int64 [R, P]. Raises TypeError, ValueError."""
    if (numbers := _checked_numbers(seeds, "seeds", "int64", " [rounds, directions]", numpy)) is not None:
        return numbers
    check_list(seeds, "seeds", "rounds")
    for r, row in enumerate(seeds):
        if not isinstance(row, Sequence):
            raise TypeError(f"seeds[{r}] must be a list of integers, one per direction, got {type(row).__name__}")
        if len(row) != len(seeds[0]):
            raise ValueError(f"seeds[0] has {len(seeds[0])} directions, seeds[{r}] has {len(row)}")
        for p, seed in enumerate(row):
            check_integer(seed, 2**64, f"seeds[{r}][{p}]")
    shape = (len(seeds), len(seeds[0]) if seeds else 0)
    return _as_op_input(np.array(seeds, dtype=np.uint64).reshape(shape).view(np.int64), numpy)


def real_numbers(values: Any, name: str, dimensions: str, numpy: bool) -> Numbers:
    """Check numbers, and return them as an array or tensor: float32 if they were passed as one, float64 for a list.

    Backends round float64 to float32, in IEEE arithmetic. Raises TypeError, ValueError.
    """
    if (numbers := _checked_numbers(values, name, "float32", dimensions, numpy)) is not None:
        return numbers
    check_list(values, name, "numbers" if dimensions == ONE_DIMENSIONAL else "rounds")
    for r, row in enumerate(values):
        if dimensions == ONE_DIMENSIONAL:
            check_number(row, f"{name}[{r}]")
            continue
        if not hasattr(row, "__len__"):
            raise TypeError(f"{name}[{r}] must be a list of numbers, got {type(row).__name__}")
        if len(row) != len(values[0]):
            raise ValueError(f"{name}[0] has {len(values[0])} numbers, {name}[{r}] has {len(row)}")
        for p, value in enumerate(row):
            check_number(value, f"{name}[{r}][{p}]")
    return _as_op_input(np.array(values, dtype=np.float64), numpy)


def real_table(values: Table, name: str, shape: tuple[int, int], numpy: bool) -> Numbers:
    """Check numbers of this shape, and return them as `real_numbers` does. Raises TypeError, ValueError."""
    is_empty = hasattr(values, "__len__") and not len(values)
    table = real_numbers(np.empty((0, shape[1]), np.float32) if is_empty else values, name, TWO_DIMENSIONAL, numpy)
    if table.shape != shape:
        raise ValueError(
            f"{name} must be [{shape[0]}, {shape[1]}], one row per round of the seeds, got {[*table.shape]}"
        )
    return table


# --- arrays and tensors ------------------------------------------------------------------------------------------


def checked_factors(factors: Sequence[float] | None, n: int) -> list[float]:
    """Return the factors of n tensors, by default 1. Raises what `check_factor` raises."""
    factors = _list_or_empty(factors) or [1.0] * n
    for t, factor in enumerate(factors):
        check_factor(factor, f"factors[{t}]")
    return factors


def check_factor(factor: float, name: str) -> None:
    """Raise TypeError for what is no number, ValueError for what is not a power of two from 2^-100 to 2^100."""
    check_number(factor, name)
    if not (2.0**-100 <= factor <= 2.0**100 and math.frexp(factor)[0] == 0.5):
        raise ValueError(f"{name} must be a power of two between 2^-100 and 2^100, got {factor}")


def check_tensors(tensors: Sequence[Array], starts: Sequence[int] | None = None) -> Layouts:
    """Check dtypes, devices, contiguity, shared memory and the ends of streams. Returns the layouts.

    Raises TypeError, RuntimeError, ValueError.
    """
    tensor_layouts = layouts(tensors)
    for t, (tensor, (_, _, device, row_major)) in enumerate(zip(tensors, tensor_layouts, strict=True)):
        if dtype_name(tensor.dtype) is None:
            raise TypeError(f"tensors[{t}] is {tensor.dtype}; the kernels take float32, bfloat16 and float16")
        if device != tensor_layouts[0][2]:
            raise RuntimeError(f"tensors[0] is on {tensor_layouts[0][2]}, tensors[{t}] on {device}: use one device")
        if not row_major:
            _check_channels_last(tensor, f"tensors[{t}]")
    if starts:
        for t, (start, size) in enumerate(zip(starts, sizes(tensors), strict=True)):
            if int(start) + size > 2**63:  # int, since numpy's int64 would overflow
                raise ValueError(f"starts[{t}] + numel is beyond 2^63")
    _check_no_shared_memory({"tensors": tensor_layouts})
    return tensor_layouts


def checked_row_numbers(rows: Array, numbers: Array) -> Array:
    """Check rows and their numbers, and return the numbers as int64, contiguous.

    On a GPU their values are not read. Raises TypeError, RuntimeError, ValueError.
    """
    ((_, _, device, row_major), (_, _, numbers_device, _)) = layouts([rows]) + layouts([numbers])
    if dtype_name(rows.dtype) is None:
        raise TypeError(f"rows is {rows.dtype}; the kernels take float32, bfloat16 and float16")
    if not row_major:
        raise RuntimeError("rows is not contiguous: pass a contiguous copy")
    if str(numbers.dtype).removeprefix("torch.") not in ("int64", "int32"):
        raise TypeError(f"numbers is {numbers.dtype}; the rows' numbers are int64 or int32")
    if device != numbers_device:
        raise RuntimeError(f"rows is on {device}, numbers on {numbers_device}: use one device")
    if rows.ndim == 0 or numbers.shape != rows.shape[:-1]:
        raise ValueError(
            f"rows is {[*rows.shape]}, numbers {[*numbers.shape]}: give a number for each row, so that only the last"
            " dimension of rows is missing"
        )
    if is_numpy(numbers):
        int64: Numbers = numbers.astype(np.int64, order="C", copy=False)
    else:
        int64 = numbers.long().contiguous()  # type: ignore[union-attr]
    if str(device) == "cpu":
        flat, end = to_numpy(int64).reshape(-1), 2**63 // max(rows.shape[-1], 1)
        if flat.size and not (flat.min() >= 0 and int(flat.max()) < end):
            raise ValueError(f"numbers must be at least 0 and below 2^63 / {rows.shape[-1]}, the elements of a row")
    return int64


def _check_channels_last(x: Any, name: str) -> None:
    """Raise RuntimeError unless x, which is not row-major, is in channels_last."""
    if is_numpy(x) and not x.flags.aligned:
        raise RuntimeError(f"{name} is not aligned to its dtype in memory: pass a copy")
    if not is_channels_last(x):
        strides = x.strides if is_numpy(x) else x.stride()
        raise RuntimeError(
            f"{name} is not contiguous, nor in channels_last (strides {strides}): pass a contiguous copy"
        )


def _check_no_shared_memory(lists: dict[str, Layouts]) -> None:
    """Raise RuntimeError if any two arrays share memory. lists: their layouts by the lists' names."""
    spans = []
    for k, list_layouts in enumerate(lists.values()):
        spans += [(begin, end, k, t) for t, (begin, end, _, _) in enumerate(list_layouts) if begin < end]
    spans.sort()
    names = list(lists)
    for (_, end, *position), (begin, _, *next_position) in pairwise(spans):
        if begin < end:
            first, second = (f"{names[k]}[{t}]" for k, t in sorted((position, next_position)))
            raise RuntimeError(f"{first} and {second} share memory: pass tied tensors once")


def check_moments(tensors: list[Array], tensor_layouts: Layouts, moments: list[list[Array]]) -> None:
    """Check that moments are float32, and have their tensors' shapes and devices.

    Raises TypeError, ValueError, RuntimeError.
    """
    lists = {"tensors": tensor_layouts}
    for k, moment in enumerate(moments):
        lists[f"moments[{k}]"] = layouts(moment)
        rows = zip(moment, lists[f"moments[{k}]"], tensors, tensor_layouts, strict=True)
        for t, (m, (_, _, device, row_major), tensor, (_, _, tensor_device, _)) in enumerate(rows):
            if dtype_name(m.dtype) != "float32":
                raise TypeError(f"moments[{k}][{t}] is {m.dtype}; moments are float32, whatever the weights are")
            if m.shape != tensor.shape:
                shapes = f"moments[{k}][{t}] is {[*m.shape]}, tensors[{t}] is {[*tensor.shape]}"
                raise ValueError(f"{shapes}: they must be alike")
            if device != tensor_device:
                raise RuntimeError(f"moments[{k}][{t}] is on {device}, tensors[{t}] on {tensor_device}: use one device")
            if not row_major:
                _check_channels_last(m, f"moments[{k}][{t}]")
    _check_no_shared_memory(lists)


def check_finite(table: NDArray[Any], name: str, factors: Sequence[float] = (1.0,)) -> None:
    """Raise ValueError unless every number of the table, times the largest factor, is finite in float32."""
    largest = max(factors)
    is_beyond = ~(np.abs(table.astype(np.float64)) * largest <= LARGEST_FLOAT32)
    if is_beyond.any():
        r, p = np.argwhere(is_beyond)[0]
        times = "" if largest == 1 else f" * {largest}, its factor"
        raise ValueError(f"{name}[{r}][{p}] must be finite in float32, got {float(table[r, p])}{times}")


def check_scales(scales: Sequence[float], factors: Sequence[float], name: str) -> None:
    """Raise ValueError unless every scale, times the largest factor, is finite in float32.

    name: a format for the argument's name in messages, in which {r} is the scale's index.
    """
    largest = max(factors, default=1.0)
    for r, scale in enumerate(scales):
        if not abs(scale) * largest <= LARGEST_FLOAT32:
            raise ValueError(f"{name.format(r=r)} times its factor must be finite in float32, got {scale} * {largest}")


def unsigned_seeds(bits: Numbers) -> list[int]:
    """Return seeds, of any shape, as a flat list of Python integers. bits: those of uint64 in int64."""
    seeds: list[int] = to_numpy(bits).reshape(-1).view(np.uint64).tolist()
    return seeds


def join_halves(halves: Sequence[int]) -> int:
    """Make a seed of its low and its high 32 bits."""
    return halves[0] | halves[1] << 32
