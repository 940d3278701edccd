"""The numpy backend: spec.py on torch tensors, to check the others against. Slow, and allocates; not dispatched to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hosfl_kernels import spec
from hosfl_kernels.place import Place


def describe() -> str:
    return f"spec.py, numpy {np.__version__}"


philox_words = spec.philox


def storage(tensor: Tensor) -> spec.Storage:
    """The tensor's memory as spec.py sees it: bfloat16 as uint16 bits. A view for CPU tensors."""
    flat = tensor.detach().reshape(-1)
    return flat.view(torch.int16).numpy().view(np.uint16) if flat.dtype == torch.bfloat16 else flat.numpy()


def noise_(out: Tensor, seed: int, place: Place) -> None:
    stream, start = place.streams[0], place.starts[0]
    storage(out)[:] = spec.noise(out.numel(), seed, stream=stream, start=start, dist=place.dist)


def perturb_(tensors: Sequence[Tensor], seed: int, scale: float, place: Place, rounding_seed: int | None) -> None:
    replay_(tensors, [seed], [scale], place, None if rounding_seed is None else [rounding_seed])


def replay_(
    tensors: Sequence[Tensor],
    seeds: Sequence[int],
    coefficients: Sequence[float],
    place: Place,
    rounding_seeds: Sequence[int] | None,
) -> None:
    for tensor, where in zip(tensors, place.each(), strict=True):
        x = storage(tensor)
        where["rounding_seeds"] = rounding_seeds
        x[:] = spec.replay(x, list(seeds), list(coefficients), **where)


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
    by_round = [len(steps), len(seeds) // len(steps)]
    record = (np.array(seeds, object).reshape(by_round).tolist(), np.reshape(coefficients, by_round).tolist(), steps)
    for t, (tensor, where) in enumerate(zip(tensors, place.each(), strict=True)):
        x, mine = storage(tensor), [storage(moment[t]) for moment in moments]
        where["rounding_seeds"] = rounding_seeds
        x[:], after = spec.update(x, mine, rule, list(constants), *record, **where)  # type: ignore[arg-type]
        for old, new in zip(mine, after, strict=True):
            old[:] = new


def project(tensors: Sequence[Tensor], seeds: Sequence[int], place: Place) -> Tensor:
    scalars = np.zeros(len(seeds))
    for tensor, where in zip(tensors, place.each(), strict=True):
        scalars = spec.project(storage(tensor), list(seeds), scalars, **where)
    return torch.from_numpy(scalars)
