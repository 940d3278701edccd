"""Copying tables to a device, and testing whether a CUDA graph is being captured there."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph captures work on this device, which must be the current one."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def copy_records(table: NDArray[Any], op: str, device: torch.device) -> Tensor:
    """Copy an op's records to the device. Raises RuntimeError while a CUDA graph captures."""
    if is_capturing(device):
        raise RuntimeError(f"a CUDA graph can't capture {op}: its records are copied to the device at the call")
    return copy_to_device(table, device)


def copy_to_device(table: NDArray[Any], device: torch.device) -> Tensor:
    """Copy a table to the device, through pinned memory, so that the host does not wait for the device."""
    tensor = torch.from_numpy(table)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
