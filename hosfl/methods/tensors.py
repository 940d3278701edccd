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
    """A numpy array as a tensor that shares its memory; uint16 holds the bits of bfloat16."""
    if isinstance(array, Tensor):
        return array
    if sys.byteorder == "big":
        array = array.astype(array.dtype.newbyteorder("="))
    bfloat16 = array.dtype == np.uint16
    found = torch.from_numpy(array.view(np.int16) if bfloat16 else array)
    return found.view(torch.bfloat16) if bfloat16 else found


def with_tensors(message: AnyMessage) -> AnyMessage:
    """The same message with tensors for arrays."""
    arrays: dict[str, Any] = {name: tensor(getattr(message, name)) for name in message.arrays()}
    return replace(message, **arrays)


def decoded(data: bytes, largest: int = LARGEST_MESSAGE) -> Message:
    """Decode a message from the wire, with tensors for arrays. Raises MessageError."""
    return with_tensors(decode(data, largest))


def usable(tensors: Iterable[Tensor | None]) -> bool:
    """Whether gradients, on one device, and their squares are finite: with an infinite mean of squares an optimizer
    would never move a weight again."""
    return all_true(torch.linalg.vector_norm(t.float()) < LONGEST for t in tensors if t is not None)


def all_true(flags: Iterable[Tensor]) -> bool:
    """Whether all of some one-element bool tensors on one device are true. Waits for a GPU once, not once for each."""
    found = list(flags)
    return not found or bool(torch.stack(found).all())
