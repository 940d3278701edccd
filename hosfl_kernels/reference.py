"""The numpy backend: spec.py on lists of arrays or tensors, to check other backends against.

It is slow, and allocates. No op runs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hosfl_kernels import spec
from hosfl_kernels.arrays import storage, to_numpy
from hosfl_kernels.place import Place

if TYPE_CHECKING:
    from hosfl_kernels.arrays import Array


def describe() -> str:
    """What this backend runs on."""
    return f"spec.py, numpy {np.__version__}"


philox_words = spec.philox


def noise_(out: Array, seed: int, place: Place) -> None:
    """Fill `out` with noise: `spec.noise` in place."""
    stream, start = place.streams[0], place.starts[0]
    z = storage(out)
    z[:] = spec.noise(z.size, seed, stream=stream, start=start, dist=place.dist)


def perturb_(tensors: Sequence[Array], seed: int, scale: float, place: Place, rounding_seed: int | None) -> None:
    """`spec.perturb` on every tensor, in place."""
    replay_(tensors, [seed], [scale], place, None if rounding_seed is None else [rounding_seed])


def perturb_rows_(rows: Array, numbers: Array, seed: int, scale: float, place: Place) -> None:
    """`spec.perturb` on every row, in place, from the row's first element in the table on."""
    (options,) = place.per_tensor()
    x, width = storage(rows), rows.shape[-1]
    for k, number in enumerate(to_numpy(numbers).reshape(-1)):
        row = slice(k * width, (k + 1) * width)
        x[row] = spec.perturb(x[row], seed, scale, **{**options, "start": int(number) * width})


def replay_(
    tensors: Sequence[Array],
    seeds: Sequence[int],
    coefficients: Sequence[float],
    place: Place,
    rounding_seeds: Sequence[int] | None,
) -> None:
    """`spec.replay` on every tensor, in place."""
    for tensor, options in zip(tensors, place.per_tensor(), strict=True):
        x = storage(tensor)
        options["rounding_seeds"] = rounding_seeds
        x[:] = spec.replay(x, list(seeds), list(coefficients), **options)


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
    """`spec.update` on every tensor and its moments, in place."""
    shape = [len(steps), len(seeds) // len(steps)]  # rounds, directions
    record = (np.array(seeds, object).reshape(shape).tolist(), np.reshape(coefficients, shape).tolist(), steps)
    for t, (tensor, options) in enumerate(zip(tensors, place.per_tensor(), strict=True)):
        x, own_moments = storage(tensor), [storage(moment[t]) for moment in moments]
        options["rounding_seeds"] = rounding_seeds
        x[:], new_moments = spec.update(x, own_moments, rule, list(constants), *record, **options)  # type: ignore[arg-type]
        for old, new in zip(own_moments, new_moments, strict=True):
            old[:] = new


def project(tensors: Sequence[Array], seeds: Sequence[int], place: Place) -> NDArray[np.float64]:
    """The sum of `spec.project` over the tensors, float64 [R]."""
    scalars: NDArray[np.float64] = np.zeros(len(seeds))
    for tensor, options in zip(tensors, place.per_tensor(), strict=True):
        scalars = spec.project(storage(tensor), list(seeds), scalars, **options)
    return scalars
