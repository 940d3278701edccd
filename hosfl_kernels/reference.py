"""The numpy backend: spec.py on torch tensors, to check the others against. Slow, and allocates; not dispatched to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hosfl_kernels import spec


def describe() -> str:
    return f"spec.py, numpy {np.__version__}"


philox_words = spec.philox


def storage(tensor: Tensor) -> spec.Storage:
    """The tensor's memory as spec.py sees it: bfloat16 as uint16 bits. A view for CPU tensors."""
    flat = tensor.detach().reshape(-1)
    return flat.view(torch.int16).numpy().view(np.uint16) if flat.dtype == torch.bfloat16 else flat.numpy()


def noise_(out: Tensor, seed: int, stream: int, start: int, dist: str) -> None:
    storage(out)[:] = spec.noise(out.numel(), seed, stream=stream, start=start, dist=dist)


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
    for tensor, factor, stream, start in zip(tensors, factors, streams, starts, strict=True):
        x = storage(tensor)
        place = {"dist": dist, "factor": factor, "stream": stream, "start": start}
        x[:] = spec.replay(x, list(seeds), list(coefficients), rounding_seeds=rounding_seeds, **place)  # type: ignore
