"""Packing of cuts and multipliers for the wire: as they are, in 16 bits, or as int8 with a scale for every 64 numbers.

Values are rounded to nearest. There is no error feedback, since the next round has other samples. The client measures
differences from its own cut, which is not rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hosfl.protocol.messages import MessageError

BLOCK = 64
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}


def packed(values: Tensor, wire: str) -> tuple[Tensor, Tensor]:
    """(packed values of the same shape; scales of blocks of 64, float32 [blocks], empty but for int8).

    wire: "float32", which leaves the values as they are, "bfloat16", "float16" or "int8". A value that is too large for
    16 bits becomes infinite, and the receiver refuses it.
    """
    if wire == "float32":
        return values, torch.empty(0)
    if wire != "int8":
        return values.to(DTYPES[wire]), torch.empty(0)
    flat = values.detach().float().reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1) / 127
    numbers = (blocks / torch.where(scales > 0, scales, 1.0)[:, None]).round().clamp(-127, 127)
    return numbers.to(torch.int8).reshape(-1)[: len(flat)].view(values.shape), scales


def unpacked(values: Tensor, scales: Tensor, wire: str) -> Tensor:
    """Unpack values to float32; with wire "float32" they stay as they are. Raises MessageError for another packing."""
    if values.dtype != DTYPES.get(wire, values.dtype) or (wire == "float32" and values.dtype == torch.int8):
        raise MessageError(f"{str(values.dtype).removeprefix('torch.')} in a run where cuts travel as {wire}")
    blocks = -(-values.numel() // BLOCK) if wire == "int8" else 0
    if tuple(scales.shape) != (blocks,):
        raise MessageError(f"{tuple(scales.shape)} scales for {values.numel()} numbers that travel as {wire}")
    if wire == "float32":
        return values
    if wire != "int8":
        return values.float()
    flat = torch.nn.functional.pad(values.reshape(-1).float(), (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    return (flat * scales[:, None]).reshape(-1)[: values.numel()].view(values.shape)
