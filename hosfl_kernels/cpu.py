"""The C++ backend: passes addresses and sizes of arrays or tensors to the C++. Arguments are validated by ops.py."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from hosfl_kernels import _cpp
from hosfl_kernels.arrays import addresses, dtype_name, sizes
from hosfl_kernels.place import Place

if TYPE_CHECKING:
    from hosfl_kernels.arrays import Array

P = ParamSpec("P")
T = TypeVar("T")

DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}  # enum Dtype of csrc/segment.h


class _Codes(dict[Any, int]):
    """The codes of DTYPES by dtypes of numpy and torch. Entries are added as dtypes are looked up."""

    def __missing__(self, dtype: Any) -> int:
        self[dtype] = code = DTYPES[dtype_name(dtype)]  # type: ignore[index]
        return code


CODES = _Codes()
RULES = {"sgd": 0, "momentum": 1, "adamw": 2}  # enum Rule of csrc/segment.h


def ieee_arithmetic(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator: run the function with rounding to nearest and subnormal numbers, whatever the thread's mode is.

    The kernels set this mode themselves. Casts to float32 before a kernel need it, too: after
    torch.set_flush_denormal(True) numpy and torch round a coefficient of 1e-40 to 0.
    """

    @wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        before = _cpp.exchange_arithmetic(_cpp.IEEE_ARITHMETIC)
        try:
            return function(*args, **kwargs)
        finally:
            _cpp.exchange_arithmetic(before)

    return guarded


def describe() -> str:
    """The instruction set in use, and those that this processor has."""
    return f"{_cpp.isa()} of {', '.join(_cpp.supported())}"


def philox_words(key: int, counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Four words, as spec.py's `philox` makes them."""
    words: tuple[int, int, int, int] = _cpp.philox(key, *counter)
    return words


def threads() -> int:
    """The number of threads that ops use on the CPU.

    It is torch's if torch is imported, otherwise OMP_NUM_THREADS, otherwise the number of CPUs that this process may
    use.
    """
    if (torch := sys.modules.get("torch")) is not None:
        return int(torch.get_num_threads())
    value = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # "4,2" is for nested loops, outer first
    if value.isdecimal() and int(value):
        return int(value)
    # macOS has no sched_getaffinity.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory(tensors: Sequence[Array]) -> tuple[list[int], list[int], list[int]]:
    """(addresses, numbers of elements, dtype codes) of the tensors, as the C++ takes them."""
    return addresses(tensors), sizes(tensors), [CODES[x.dtype] for x in tensors]


def noise_(out: Array, seed: int, place: Place) -> None:
    """Fill the float32 array `out` with the noise of `seed`."""
    _cpp.noise(memory([out]), seed, place, threads())


def perturb_(tensors: Sequence[Array], seed: int, scale: float, place: Place, rounding_seed: int | None) -> None:
    """x += scale * factor * z(seed) for every tensor."""
    replay_(tensors, [seed], [scale], place, None if rounding_seed is None else [rounding_seed])


def perturb_rows_(rows: Array, numbers: Array, seed: int, scale: float, place: Place) -> None:
    """x += scale * factor * z(seed) for every row, at its number's place in the table."""
    table = (*addresses([rows, numbers]), sizes([numbers])[0], rows.shape[-1], CODES[rows.dtype])
    _cpp.perturb_rows(table, seed, scale, place, threads())


def replay_(
    tensors: Sequence[Array],
    seeds: Sequence[int],
    coefficients: Sequence[float],
    place: Place,
    rounding_seeds: Sequence[int] | None,
) -> None:
    """perturb_ once for every record, in one pass over the tensors and to the same bits."""
    _cpp.replay(memory(tensors), seeds, coefficients, place, rounding_seeds or [], threads())


def update_(
    tensors: Sequence[Array],
    moments: Sequence[Sequence[Array]],
    rule: str,
    constants: Sequence[float],
    seeds: Sequence[int],
    coefficients: Sequence[float],
    steps: Sequence[Sequence[float]],
    place: Place,
    rounding_seeds: Sequence[int] | None,
) -> None:
    """len(steps) rounds of an update rule in one pass over weights and moments."""
    moment_addresses = [addresses(moment) for moment in moments]
    record = (constants, seeds, coefficients, steps)
    _cpp.update(memory(tensors), moment_addresses, RULES[rule], *record, place, rounding_seeds or [], threads())


def project(tensors: Sequence[Array], seeds: Sequence[int], place: Place) -> NDArray[np.float64]:
    """<tensors, z(seed)> for every seed, float64 [R], in one pass over the tensors."""
    return np.array(_cpp.project(memory(tensors), seeds, place, threads()), np.float64)
