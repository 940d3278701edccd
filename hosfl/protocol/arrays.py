"""What the protocol does with arrays: numpy's, and torch's tensors, which it knows by their methods alone.

Numbers that travel are numpy arrays; weights are what the holder of a replica has. bfloat16, which numpy has not, is
its bits, uint16; an `ml_dtypes.bfloat16` array does as well.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = Any  # numpy's, or torch's


def is_tensor(array: Array) -> bool:
    """Whether it is torch's."""
    return hasattr(array, "detach")


def dtype_name(array: Array) -> str:
    """Such as "float32", "bfloat16", "int32"."""
    name = str(array.dtype).removeprefix("torch.")
    return "bfloat16" if name == "uint16" and not is_tensor(array) else name


def count(array: Array) -> int:
    """Of its elements."""
    return int(array.numel() if is_tensor(array) else array.size)


def host(array: Array) -> NDArray[Any]:
    """Its numbers in numpy, for float32 and integers; a view where that can be."""
    return array.detach().cpu().numpy() if is_tensor(array) else np.asarray(array)


def bits(array: Array) -> memoryview:
    """The bytes of its elements in order."""
    if is_tensor(array):
        flat = array.detach().cpu().contiguous().reshape(-1)
        flat = flat.view(sys.modules["torch"].uint8)  # numpy has neither bfloat16 nor float8
        return memoryview(flat.numpy()) if len(flat) else memoryview(b"")
    flat = np.ascontiguousarray(array).reshape(-1)
    return memoryview(flat.view(np.uint8).data) if flat.size else memoryview(b"")


def plain(arrays: Sequence[Array]) -> list[Array]:
    """The same memory, of tensors without their gradients."""
    return [array.detach() if is_tensor(array) else array for array in arrays]


def assign(array: Array, value: Array) -> None:
    """Take another's values, of its shape and dtype, in place."""
    if is_tensor(array):
        array.detach().copy_(value)
    else:
        array[...] = value


def copied(array: Array) -> Array:
    """A copy in memory of its own."""
    return array.detach().clone() if is_tensor(array) else np.array(array)


def zeros(array: Array) -> Array:
    """float32 zeros of its shape, on its device."""
    if is_tensor(array):
        return array.detach().float().clone().zero_()
    return np.zeros(array.shape, np.float32)


def largest(array: Array) -> float:
    """The largest size of an element; NaN where there is one. 0 for an empty one."""
    if not count(array):
        return 0.0
    if is_tensor(array):
        return float(array.detach().abs().amax())
    return float(np.abs(widened(array)).max())


def widened(array: NDArray[Any]) -> NDArray[Any]:
    """numpy's array as numbers that numpy can compute with: bfloat16 as float32."""
    if dtype_name(array) != "bfloat16":
        return array
    return (np.asarray(array).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
