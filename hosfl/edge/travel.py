"""Packing of cuts and multipliers for the wire: `hosfl.methods.travel` on numpy arrays, with the same bits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hosfl.protocol.arrays import dtype_name, widened
from hosfl.protocol.messages import MessageError

BLOCK = 64
NONE = np.empty(0, np.float32)

Floats = NDArray[np.float32]


def packed(values: Floats, wire: str) -> tuple[NDArray[Any], Floats]:
    """Return (packed values in the same shape, scales): see `hosfl.methods.travel`. bfloat16 is its bits in uint16."""
    if wire == "float32":
        return values, NONE
    if wire == "float16":
        with np.errstate(over="ignore"):  # an overflow becomes infinite, which the receiver refuses
            return values.astype(np.float16), NONE
    if wire == "bfloat16":
        return rounded(values), NONE
    blocks = _blocks(values)
    scales: Floats = (np.abs(blocks).max(1) / np.float32(127)).astype(np.float32, copy=False)
    numbers = np.rint(blocks / np.where(scales > 0, scales, np.float32(1))[:, None]).clip(-127, 127)
    flat: NDArray[np.int8] = numbers.astype(np.int8).reshape(-1)
    return flat[: values.size].reshape(values.shape), scales


def rounded(values: Floats) -> NDArray[np.uint16]:
    """Round float32 to bfloat16, ties to even, and return its bits."""
    bits = values.view(np.uint32)
    return np.where(np.isnan(values), 0x7FC0, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def assign_rounded(array: NDArray[Any], values: Floats) -> None:
    """Assign values to an array in place. Its dtype is float32, or uint16 with the bits of bfloat16."""
    flat = array.reshape(-1)
    flat[...] = rounded(values) if array.dtype == np.uint16 else values


def unpacked(values: NDArray[Any], scales: Floats, wire: str) -> Floats:
    """Undo `packed`, and return float32. Raises MessageError for values or scales that are not packed as `wire`."""
    if dtype_name(values) != wire:
        raise MessageError(f"{dtype_name(values)} in a run where cuts travel as {wire}")
    blocks = -(-values.size // BLOCK) if wire == "int8" else 0
    if scales.shape != (blocks,):
        raise MessageError(f"{scales.shape} scales for {values.size} numbers that travel as {wire}")
    if wire != "int8":
        return widened(values).astype(np.float32)
    scaled = _blocks(values.astype(np.float32)) * scales[:, None]
    return scaled.reshape(-1)[: values.size].reshape(values.shape)


def _blocks(values: Floats) -> Floats:
    """Reshape to [blocks, 64], padded with zeros."""
    flat = values.reshape(-1)
    return np.pad(flat, (0, -flat.size % BLOCK)).reshape(-1, BLOCK)
