"""How cuts and multipliers travel: as they are computed, in 16 bits, or as int8 with a scale for every 64 numbers.

Rounded to nearest. Errors are not fed back: the next round's samples are others, to which this round's error is noise.
The client's own cut, from which it measures differences, stays as it computed it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hosfl.protocol.messages import MessageError

BLOCK = 64
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}


def packed(values: Tensor, wire: str) -> tuple[Tensor, Tensor]:
    """Pack values for the wire. Returns them, of the same shape, and scales: float32 [blocks of 64], [0] but for int8.

    wire: "float32", which leaves the values as they are, "bfloat16", "float16" or "int8". What is too large for 16 bits
    becomes infinite, and is refused by whoever receives it.
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
    """Undo `packed`: float32, or unchanged for "float32". Raises MessageError for values packed otherwise."""
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
