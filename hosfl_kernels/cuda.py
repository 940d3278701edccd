"""The CUDA backend without Triton: kernels that nvcc compiles when the package is built with HOSFL_CUDA=1.

This module can be imported without that extension and without a GPU; calls then raise RuntimeError. Arguments are
validated by ops.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hosfl_kernels.arrays import addresses
from hosfl_kernels.cpu import CODES, RULES, memory
from hosfl_kernels.place import Place
from hosfl_kernels.transfer import copy_records


def _extension() -> Any:
    """Import the compiled kernels. Raises RuntimeError if the package was built without them."""
    try:
        return importlib.import_module("hosfl_kernels._cuda")
    except ModuleNotFoundError as error:
        raise RuntimeError(
            "CUDA tensors need Triton (pip install triton), or a hosfl that was built with HOSFL_CUDA=1; "
            "this machine has neither"
        ) from error


def describe() -> str | None:
    """What this backend runs on, or None if it cannot run here."""
    try:
        extension = _extension()
    except RuntimeError:
        return None
    if extension.EMULATED:
        return "emulated, thread by thread"
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"nvcc's kernels on sm_{major}{minor} ({torch.cuda.get_device_name()})"


def _device_and_stream(extension: Any, device: torch.device) -> tuple[int, int]:
    """(the device's index, torch's current stream on it). Raises RuntimeError for a device without kernels."""
    if extension.EMULATED and device.type == "cpu":
        return 0, 0
    if extension.EMULATED or device.type != "cuda":
        raise RuntimeError(f"the CUDA kernels take {'CPU' if extension.EMULATED else 'CUDA'} tensors, not {device}")
    return device.index, torch.cuda.current_stream(device).cuda_stream


def _on_device(table: bytes, op: str, device: torch.device) -> Tensor:
    """Copy a table that the extension made to the device."""
    return copy_records(np.frombuffer(bytearray(table or b"\0"), np.uint8), op, device)


def _refuse_gpu_records(seeds: Sequence[int] | Tensor) -> None:
    """Raise RuntimeError for records on the GPU."""
    if isinstance(seeds, Tensor):
        raise RuntimeError("records on the GPU need Triton's kernels: install triton, or pass them on the CPU")


def philox_words(key: int, counter: tuple[int, int, int, int]) -> tuple[int, ...]:
    """Four words, as spec.py's `philox` makes them."""
    extension = _extension()
    out = torch.empty(4, dtype=torch.int32, device="cpu" if extension.EMULATED else "cuda")
    with torch.cuda.device_of(out):
        extension.philox(out.data_ptr(), key, *counter, _device_and_stream(extension, out.device))
    return tuple(word & 0xFFFFFFFF for word in out.tolist())


def noise_(out: Tensor, seed: int, place: Place) -> None:
    """Fill the float32 tensor `out` with the noise of `seed`."""
    extension = _extension()
    with torch.cuda.device_of(out):
        extension.noise(memory([out]), seed, place, _device_and_stream(extension, out.device))


def perturb_(tensors: Sequence[Tensor], seed: int, scale: float, place: Place, rounding_seed: int | None) -> None:
    """x += scale * factor * z(seed) for every tensor; one launch per dtype and 48 tensors."""
    if not tensors:
        return
    extension = _extension()
    with torch.cuda.device_of(tensors[0]):
        stream = _device_and_stream(extension, tensors[0].device)
        rounding_seeds = [] if rounding_seed is None else [rounding_seed]
        extension.perturb(memory(tensors), seed, scale, place, rounding_seeds, stream)


def perturb_rows_(rows: Tensor, numbers: Tensor, seed: int, scale: float, place: Place) -> None:
    """x += scale * factor * z(seed) for every row, at its number's place in the table."""
    extension = _extension()
    table = (*addresses([rows, numbers]), numbers.numel(), rows.shape[-1], CODES[rows.dtype])
    with torch.cuda.device_of(rows):
        extension.perturb_rows(table, seed, scale, place, _device_and_stream(extension, rows.device))


def replay_(
    tensors: Sequence[Tensor],
    seeds: Sequence[int] | Tensor,
    coefficients: Sequence[float] | Tensor,
    place: Place,
    rounding_seeds: Sequence[int] | Tensor | None,
) -> None:
    """perturb_ once for every record, in one pass over the tensors and to the same bits. Not for CUDA graphs."""
    _refuse_gpu_records(seeds)
    if not tensors or not seeds:
        return
    extension, device = _extension(), tensors[0].device
    with torch.cuda.device_of(tensors[0]):
        stream = _device_and_stream(extension, device)
        records = _on_device(extension.records(seeds, coefficients, rounding_seeds or []), "replay_", device)
        stochastic = rounding_seeds is not None
        extension.replay(memory(tensors), records.data_ptr(), len(seeds), place, stochastic, stream)


def update_(
    tensors: Sequence[Tensor],
    moments: Sequence[Sequence[Tensor]],
    rule: str,
    constants: Sequence[float],
    seeds: Sequence[int] | Tensor,
    coefficients: Sequence[float] | Tensor,
    steps: Sequence[Sequence[float]] | Tensor,
    place: Place,
    rounding_seeds: Sequence[int] | Tensor | None,
) -> None:
    """len(steps) rounds of an update rule in one pass over weights and moments. Not for CUDA graphs."""
    _refuse_gpu_records(seeds)
    if not tensors or not steps:
        return
    extension, device = _extension(), tensors[0].device
    with torch.cuda.device_of(tensors[0]):
        stream = _device_and_stream(extension, device)
        records = _on_device(extension.records(seeds, coefficients, []), "update_", device)
        rounds = _on_device(extension.steps(steps, rounding_seeds or []), "update_", device)
        tables = (records.data_ptr(), len(seeds), rounds.data_ptr(), len(steps))
        moment_addresses = [addresses(moment) for moment in moments]
        stochastic = rounding_seeds is not None
        extension.update(memory(tensors), moment_addresses, RULES[rule], constants, *tables, place, stochastic, stream)


PIECE = 1 << 22  # elements per step of `project`: 16 MB of noise, and 32 MB each for noise and weights in float64


def project(tensors: Sequence[Tensor], seeds: Sequence[int], place: Place) -> Tensor:
    """<tensors, z(seed)> for every seed, float64 [R] on the CPU.

    There is no kernel for this: `noise_` makes the noise, a piece at a time. Each piece is read from memory for every
    seed. All sums are float64.
    """
    scalars = torch.zeros(len(seeds), dtype=torch.float64, device=tensors[0].device if tensors else "cpu")
    for tensor, options in zip(tensors, place.per_tensor(), strict=True):
        for k, piece in enumerate(tensor.detach().reshape(-1).split(PIECE)):
            x = piece.double() * options["factor"]
            z = torch.empty(piece.shape, dtype=torch.float32, device=piece.device)
            piece_place = Place.single(**{**options, "start": options["start"] + k * PIECE})
            for r, seed in enumerate(seeds):
                noise_(z, seed, piece_place)
                scalars[r] += x @ z.double()
    return scalars.cpu()
