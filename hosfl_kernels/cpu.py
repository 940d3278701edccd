"""The C++ backend: arrays or tensors in, addresses and sizes out. The arguments were checked in ops.py."""

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
    """Of a dtype of numpy or torch its number in DTYPES, looked up once."""

    def __missing__(self, dtype: Any) -> int:
        self[dtype] = code = DTYPES[dtype_name(dtype)]  # type: ignore[index]
        return code


CODES = _Codes()
RULES = {"sgd": 0, "momentum": 1, "adamw": 2}  # enum Rule of csrc/segment.h


def ieee_arithmetic(function: Callable[P, T]) -> Callable[P, T]:
    """The function, run with rounding to nearest and subnormal numbers kept, whatever the caller has set.

    The kernels do this themselves. Casts to float32 on the way to them need it too: after
    torch.set_flush_denormal(True) numpy and torch make 0 of a coefficient of 1e-40.
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
    return f"{_cpp.isa()} of {', '.join(_cpp.supported())}"


def philox_words(key: int, counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    words: tuple[int, int, int, int] = _cpp.philox(key, *counter)
    return words


def threads() -> int:
    """How many threads the CPU's ops use: torch's number where torch is, else OMP_NUM_THREADS, else the processors that
    this process may use."""
    if (torch := sys.modules.get("torch")) is not None:
        return int(torch.get_num_threads())
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # "4,2": of nested loops, the outer
    if asked.isdecimal() and int(asked):
        return int(asked)
    # Not on macOS.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory(tensors: Sequence[Array]) -> tuple[list[int], list[int], list[int]]:
    """Addresses, numbers of elements, dtypes."""
    return addresses(tensors), sizes(tensors), [CODES[x.dtype] for x in tensors]


def noise_(out: Array, seed: int, place: Place) -> None:
    _cpp.noise(memory([out]), seed, place, threads())


def perturb_(tensors: Sequence[Array], seed: int, scale: float, place: Place, rounding_seed: int | None) -> None:
    replay_(tensors, [seed], [scale], place, None if rounding_seed is None else [rounding_seed])


def replay_(
    tensors: Sequence[Array],
    seeds: Sequence[int],
    coefficients: Sequence[float],
    place: Place,
    rounding_seeds: Sequence[int] | None,
) -> None:
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
    kept = [addresses(moment) for moment in moments]
    record = (constants, seeds, coefficients, steps)
    _cpp.update(memory(tensors), kept, RULES[rule], *record, place, rounding_seeds or [], threads())


def project(tensors: Sequence[Array], seeds: Sequence[int], place: Place) -> NDArray[np.float64]:
    return np.array(_cpp.project(memory(tensors), seeds, place, threads()), np.float64)
