"""Messages with torch tensors in place of numpy arrays."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hosfl.protocol.messages import LARGEST_MESSAGE, AnyMessage, Message, decode

LONGEST = 1e18  # of a gradient; float32 holds the square of 18 times as much


def tensor(array: Any) -> Tensor:
    """numpy's array as a tensor that shares its memory; uint16 is bfloat16's bits."""
    if isinstance(array, Tensor):
        return array
    if sys.byteorder == "big":
        array = array.astype(array.dtype.newbyteorder("="))
    bfloat16 = array.dtype == np.uint16
    found = torch.from_numpy(array.view(np.int16) if bfloat16 else array)
    return found.view(torch.bfloat16) if bfloat16 else found


def with_tensors(message: AnyMessage) -> AnyMessage:
    """The same message, its arrays as tensors."""
    arrays: dict[str, Any] = {name: tensor(getattr(message, name)) for name in message.arrays()}
    return replace(message, **arrays)


def decoded(data: bytes, largest: int = LARGEST_MESSAGE) -> Message:
    """The message of bytes from the wire, its arrays as tensors. Raises MessageError."""
    return with_tensors(decode(data, largest))


def usable(tensors: Iterable[Tensor | None]) -> bool:
    """Whether gradients, on one device, are finite, and their squares too: an optimizer that keeps an infinite mean of
    squares never moves a weight again."""
    return all_true(torch.linalg.vector_norm(t.float()) < LONGEST for t in tensors if t is not None)


def all_true(flags: Iterable[Tensor]) -> bool:
    """Whether all of some bool tensors of one element, on one device, are true; of none they are.

    One answer for all of them: a GPU is waited for once, not once for each.
    """
    found = list(flags)
    return not found or bool(torch.stack(found).all())
