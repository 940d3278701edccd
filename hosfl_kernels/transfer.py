"""Tables on their way to a device, and whether a CUDA graph captures what is done there."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph captures what is done on a device, which has to be the current one."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def on_device(table: NDArray[Any], op: str, device: torch.device) -> Tensor:
    """A table for one call of an op, which no graph can keep."""
    if capturing(device):
        raise RuntimeError(f"a CUDA graph can't capture {op}: its records are copied to the device at the call")
    return copied(table, device)


def copied(table: NDArray[Any], device: torch.device) -> Tensor:
    """A table in the device's memory. From pinned memory the host doesn't wait for the device to catch up."""
    tensor = torch.from_numpy(table)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
