"""Operations on numpy arrays and torch tensors for the protocol, which does not import torch.

Arrays in messages are numpy's; weights are whatever a replica has. numpy has no bfloat16: its bits are uint16; an
`ml_dtypes.bfloat16` array works too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = Any  # numpy's, or torch's


def is_tensor(array: Array) -> bool:
    """Whether an array is a torch tensor."""
    return hasattr(array, "detach")


def dtype_name(array: Array) -> str:
    """The name of its dtype, such as "float32", "bfloat16", "int32"."""
    name = str(array.dtype).removeprefix("torch.")
    return "bfloat16" if name == "uint16" and not is_tensor(array) else name


def count(array: Array) -> int:
    """The number of its elements."""
    return int(array.numel() if is_tensor(array) else array.size)


def host(array: Array) -> NDArray[Any]:
    """A numpy array of a float32 or integer array; a view if possible."""
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
    """The same arrays, tensors detached from their graphs."""
    return [array.detach() if is_tensor(array) else array for array in arrays]


def assign(array: Array, value: Array) -> None:
    """Copy the values of another array, of the same shape and dtype, in place."""
    if is_tensor(array):
        array.detach().copy_(value)
    else:
        array[...] = value


def copied(array: Array) -> Array:
    """A copy."""
    return array.detach().clone() if is_tensor(array) else np.array(array)


def zeros(array: Array) -> Array:
    """float32 zeros of an array's shape, on its device."""
    if is_tensor(array):
        return array.detach().float().clone().zero_()
    return np.zeros(array.shape, np.float32)


def largest(array: Array) -> float:
    """The largest absolute value; NaN if there is one, 0 for an empty array."""
    if not count(array):
        return 0.0
    if is_tensor(array):
        return float(array.detach().abs().amax())
    return float(np.abs(widened(array)).max())


def widened(array: NDArray[Any]) -> NDArray[Any]:
    """A numpy array that numpy can compute with: bfloat16 as float32."""
    if dtype_name(array) != "bfloat16":
        return array
    return (np.asarray(array).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
