"""`hosfl.methods.travel` on numpy arrays: the same bits."""

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
    """(what travels, of the same shape; scales): see `hosfl.methods.travel`. bfloat16 is its bits, uint16."""
    if wire == "float32":
        return values, NONE
    if wire == "float16":
        with np.errstate(over="ignore"):  # infinite: whoever receives it refuses it
            return values.astype(np.float16), NONE
    if wire == "bfloat16":
        return rounded(values), NONE
    blocks = _blocks(values)
    scales: Floats = (np.abs(blocks).max(1) / np.float32(127)).astype(np.float32, copy=False)
    numbers = np.rint(blocks / np.where(scales > 0, scales, np.float32(1))[:, None]).clip(-127, 127)
    flat: NDArray[np.int8] = numbers.astype(np.int8).reshape(-1)
    return flat[: values.size].reshape(values.shape), scales


def rounded(values: Floats) -> NDArray[np.uint16]:
    """To the nearest number of bfloat16, ties to even: its bits."""
    bits = values.view(np.uint32)
    return np.where(np.isnan(values), 0x7FC0, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def assign_rounded(array: NDArray[Any], values: Floats) -> None:
    """Give an array in float32, or of bfloat16's bits, these values in place."""
    flat = array.reshape(-1)
    flat[...] = rounded(values) if array.dtype == np.uint16 else values


def unpacked(values: NDArray[Any], scales: Floats, wire: str) -> Floats:
    """What was packed, as float32. Raises MessageError for another packing."""
    if dtype_name(values) != wire:
        raise MessageError(f"{dtype_name(values)} in a run where cuts travel as {wire}")
    blocks = -(-values.size // BLOCK) if wire == "int8" else 0
    if scales.shape != (blocks,):
        raise MessageError(f"{scales.shape} scales for {values.size} numbers that travel as {wire}")
    if wire != "int8":
        return widened(values).astype(np.float32)
    whole = _blocks(values.astype(np.float32)) * scales[:, None]
    return whole.reshape(-1)[: values.size].reshape(values.shape)


def _blocks(values: Floats) -> Floats:
    """[blocks, 64], the last one filled up with zeros."""
    flat = values.reshape(-1)
    return np.pad(flat, (0, -flat.size % BLOCK)).reshape(-1, BLOCK)
