"""The C++ backend: tensors in, addresses and sizes out. The arguments were checked in ops.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from hosfl_kernels import _cpp

P = ParamSpec("P")
T = TypeVar("T")

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Dtype of csrc/ops.h
RULES = {"sgd": 0, "momentum": 1, "adamw": 2}  # enum Rule of csrc/ops.h


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


def noise_(out: Tensor, seed: int, stream: int, start: int, dist: str) -> None:
    _cpp.noise(out.data_ptr(), out.numel(), seed, stream, start, dist == "gaussian", torch.get_num_threads())


def perturb_(
    tensors: Sequence[Tensor],
    seed: int,
    scale: float,
    dist: str,
    factors: Sequence[float],
    streams: Sequence[int],
    starts: Sequence[int],
    rounding_seed: int | None,
) -> None:
    rounding_seeds = None if rounding_seed is None else [rounding_seed]
    replay_(tensors, [seed], [scale], dist, factors, streams, starts, rounding_seeds)


def replay_(
    tensors: Sequence[Tensor],
    seeds: Sequence[int],
    coefficients: Sequence[float],
    dist: str,
    factors: Sequence[float],
    streams: Sequence[int],
    starts: Sequence[int],
    rounding_seeds: Sequence[int] | None,
) -> None:
    _cpp.replay(
        [t.data_ptr() for t in tensors],
        [t.numel() for t in tensors],
        [DTYPES[t.dtype] for t in tensors],
        streams,
        starts,
        factors,
        seeds,
        coefficients,
        rounding_seeds or [],
        dist == "gaussian",
        torch.get_num_threads(),
    )


def update_(
    tensors: Sequence[Tensor],
    moments: Sequence[Sequence[Tensor]],
    rule: str,
    constants: Sequence[float],
    seeds: Sequence[int],
    coefficients: Sequence[float],
    steps: Sequence[Sequence[float]],
    dist: str,
    factors: Sequence[float],
    streams: Sequence[int],
    starts: Sequence[int],
    rounding_seeds: Sequence[int] | None,
) -> None:
    _cpp.update(
        [t.data_ptr() for t in tensors],
        [t.numel() for t in tensors],
        [DTYPES[t.dtype] for t in tensors],
        streams,
        starts,
        factors,
        [[t.data_ptr() for t in moment] for moment in moments],
        RULES[rule],
        constants,
        seeds,
        coefficients,
        steps,
        rounding_seeds or [],
        dist == "gaussian",
        torch.get_num_threads(),
    )


def project(
    tensors: Sequence[Tensor],
    seeds: Sequence[int],
    dist: str,
    factors: Sequence[float],
    streams: Sequence[int],
    starts: Sequence[int],
) -> Tensor:
    scalars = _cpp.project(
        [t.data_ptr() for t in tensors],
        [t.numel() for t in tensors],
        [DTYPES[t.dtype] for t in tensors],
        streams,
        starts,
        factors,
        seeds,
        dist == "gaussian",
        torch.get_num_threads(),
    )
    return torch.tensor(scalars, dtype=torch.float64, device="cpu")
