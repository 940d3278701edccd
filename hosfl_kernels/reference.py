"""The numpy backend: spec.py on arrays or tensors, to check the others against. Slow, and allocates; no op runs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hosfl_kernels import spec
from hosfl_kernels.arrays import storage
from hosfl_kernels.place import Place

if TYPE_CHECKING:
    from hosfl_kernels.arrays import Array


def describe() -> str:
    return f"spec.py, numpy {np.__version__}"


philox_words = spec.philox


def noise_(out: Array, seed: int, place: Place) -> None:
    stream, start = place.streams[0], place.starts[0]
    z = storage(out)
    z[:] = spec.noise(z.size, seed, stream=stream, start=start, dist=place.dist)


def perturb_(tensors: Sequence[Array], seed: int, scale: float, place: Place, rounding_seed: int | None) -> None:
    replay_(tensors, [seed], [scale], place, None if rounding_seed is None else [rounding_seed])


def replay_(
    tensors: Sequence[Array],
    seeds: Sequence[int],
    coefficients: Sequence[float],
    place: Place,
    rounding_seeds: Sequence[int] | None,
) -> None:
    for tensor, where in zip(tensors, place.per_tensor(), strict=True):
        x = storage(tensor)
        where["rounding_seeds"] = rounding_seeds
        x[:] = spec.replay(x, list(seeds), list(coefficients), **where)


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
    by_round = [len(steps), len(seeds) // len(steps)]
    record = (np.array(seeds, object).reshape(by_round).tolist(), np.reshape(coefficients, by_round).tolist(), steps)
    for t, (tensor, where) in enumerate(zip(tensors, place.per_tensor(), strict=True)):
        x, mine = storage(tensor), [storage(moment[t]) for moment in moments]
        where["rounding_seeds"] = rounding_seeds
        x[:], after = spec.update(x, mine, rule, list(constants), *record, **where)  # type: ignore[arg-type]
        for old, new in zip(mine, after, strict=True):
            old[:] = new


def project(tensors: Sequence[Array], seeds: Sequence[int], place: Place) -> NDArray[np.float64]:
    scalars: NDArray[np.float64] = np.zeros(len(seeds))
    for tensor, where in zip(tensors, place.per_tensor(), strict=True):
        scalars = spec.project(storage(tensor), list(seeds), scalars, **where)
    return scalars
