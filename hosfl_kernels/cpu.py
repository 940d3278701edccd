"""The C++ backend: tensors in, addresses and sizes out. The arguments were checked in ops.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from hosfl_kernels import _cpp
from hosfl_kernels.place import Place

P = ParamSpec("P")
T = TypeVar("T")

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Dtype of csrc/segment.h
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


def _memory(tensors: Sequence[Tensor]) -> list[tuple[int, int, int]]:
    return [(t.data_ptr(), t.numel(), DTYPES[t.dtype]) for t in tensors]


def noise_(out: Tensor, seed: int, place: Place) -> None:
    _cpp.noise(_memory([out])[0], seed, place, torch.get_num_threads())


def perturb_(tensors: Sequence[Tensor], seed: int, scale: float, place: Place, rounding_seed: int | None) -> None:
    replay_(tensors, [seed], [scale], place, None if rounding_seed is None else [rounding_seed])


def replay_(
    tensors: Sequence[Tensor],
    seeds: Sequence[int],
    coefficients: Sequence[float],
    place: Place,
    rounding_seeds: Sequence[int] | None,
) -> None:
    _cpp.replay(_memory(tensors), seeds, coefficients, place, rounding_seeds or [], torch.get_num_threads())


def update_(
    tensors: Sequence[Tensor],
    moments: Sequence[Sequence[Tensor]],
    rule: str,
    constants: Sequence[float],
    seeds: Sequence[int],
    coefficients: Sequence[float],
    steps: Sequence[Sequence[float]],
    place: Place,
    rounding_seeds: Sequence[int] | None,
) -> None:
    kept = [[t.data_ptr() for t in moment] for moment in moments]
    record = (constants, seeds, coefficients, steps)
    threads = torch.get_num_threads()
    _cpp.update(_memory(tensors), kept, RULES[rule], *record, place, rounding_seeds or [], threads)


def project(tensors: Sequence[Tensor], seeds: Sequence[int], place: Place) -> Tensor:
    scalars = _cpp.project(_memory(tensors), seeds, place, torch.get_num_threads())
    return torch.tensor(scalars, dtype=torch.float64, device="cpu")
