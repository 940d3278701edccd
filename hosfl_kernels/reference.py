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
    for tensor, factor, stream, start in zip(tensors, factors, streams, starts, strict=True):
        x = storage(tensor)
        place = {"dist": dist, "factor": factor, "stream": stream, "start": start, "rounding_seed": rounding_seed}
        x[:] = spec.perturb(x, seed, scale, **place)  # type: ignore[arg-type]


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
    by_round = [len(steps), len(seeds) // len(steps)]
    record = (np.array(seeds, object).reshape(by_round).tolist(), np.reshape(coefficients, by_round).tolist(), steps)
    for t, (tensor, factor, stream, start) in enumerate(zip(tensors, factors, streams, starts, strict=True)):
        x, mine = storage(tensor), [storage(moment[t]) for moment in moments]
        place = {"dist": dist, "factor": factor, "stream": stream, "start": start, "rounding_seeds": rounding_seeds}
        x[:], after = spec.update(x, mine, rule, list(constants), *record, **place)  # type: ignore
        for old, new in zip(mine, after, strict=True):
            old[:] = new


def project(
    tensors: Sequence[Tensor],
    seeds: Sequence[int],
    dist: str,
    factors: Sequence[float],
    streams: Sequence[int],
    starts: Sequence[int],
) -> Tensor:
    scalars = np.zeros(len(seeds))
    for tensor, factor, stream, start in zip(tensors, factors, streams, starts, strict=True):
        place = {"dist": dist, "factor": factor, "stream": stream, "start": start}
        scalars = spec.project(storage(tensor), list(seeds), scalars, **place)  # type: ignore[arg-type]
    return torch.from_numpy(scalars)
