"""The part that needs torch: the ops in torch.library, the backend of each device, and checks of tensors.

It is imported with hosfl_kernels if torch has been imported before, otherwise when an op is first given a tensor.
Importing it registers torch.ops.hosfl.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from functools import partial
from itertools import filterfalse
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hosfl_kernels import _cpp, arrays, cpu, cuda, gpu, ops, transfer
from hosfl_kernels.place import Place

BACKENDS: dict[str, ModuleType] = {**ops.BACKENDS, "triton": gpu, "cuda": cuda}
READ_ONLY_OPS = [op for op, schema in ops.SCHEMAS.items() if "!" not in schema]
DTYPES: tuple[torch.dtype, ...] = tuple(getattr(torch, name) for name in arrays.DTYPES)


def cuda_backend() -> ModuleType:
    """Select the backend of CUDA tensors: Triton's if it is installed and HOSFL_CUDA is not 1, otherwise nvcc's."""
    if os.environ.get("HOSFL_CUDA") == "1" or importlib.util.find_spec("triton") is None:
        return cuda
    return gpu


DISPATCH = {"CPU": cpu, "CUDA": cuda_backend()}


def check(tensors: Sequence[Any], name: str, changed: bool) -> None:
    """Check the tensors' types, whether they require grad, and their devices, also while torch.compile traces.

    name: the argument's name, for error messages. changed: whether the op writes the tensors. Raises TypeError,
    RuntimeError.
    """
    breaks_graphs = changed and torch.is_grad_enabled()
    for t, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise arrays.mixed_kinds_error(tensor, f"{name}[{t}]")
        if breaks_graphs and tensor.requires_grad:
            raise RuntimeError(
                f"{name}[{t}] requires grad, and an in-place change would break its graph: use torch.no_grad()"
            )
        if not (tensor.is_cpu or tensor.is_cuda):
            raise RuntimeError(f"{name}[{t}] is on {tensor.device}; there are kernels for cpu and cuda")


def call(op: str, *arguments: Any) -> Any:
    """Call torch.ops.hosfl.OP. torch selects the backend by the tensors' device, or traces the call."""
    function = getattr(torch.ops.hosfl, op)
    if op not in READ_ONLY_OPS:
        return function(*arguments)
    with torch.no_grad():  # the result has no gradient
        return function(*arguments)


def from_numpy(x: NDArray[Any]) -> Tensor:
    """View an array of seeds or coefficients as a tensor; uint64 is viewed as int64."""
    tensor = torch.from_numpy(x)
    return tensor.view(torch.int64) if tensor.dtype == torch.uint64 else tensor


def from_storage(x: NDArray[Any]) -> Tensor:
    """Copy an array in the format of spec.py, where uint16 holds the bits of bfloat16, into a tensor."""
    if x.dtype == np.uint16:
        return torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(x.copy())


def empty(n: int, device: torch.device | str) -> Tensor:
    """Make an uninitialised float32 tensor [n]."""
    return torch.empty(n, dtype=torch.float32, device=device)


def copy_buffer(tensors: Sequence[Tensor]) -> Tensor:
    """Allocate a uint8 buffer with room for the largest tensor that is not contiguous.

    Raises RuntimeError while a CUDA graph captures, if there is such a tensor.
    """
    sizes = [x.nbytes for x in tensors if not x.is_contiguous()]
    if sizes:
        with torch.cuda.device_of(tensors[0]):  # does nothing for a tensor on the CPU
            is_capturing = transfer.is_capturing(tensors[0].device)
        if is_capturing:
            raise RuntimeError(
                "a CUDA graph can't capture a move of tensors in channels_last, which are copied at every call:"
                " make them and their moments contiguous before (memory_format=torch.contiguous_format)"
            )
    return torch.empty(max(sizes, default=0), dtype=torch.uint8, device=tensors[0].device)


def contiguous_copy(x: Tensor, buffer: Tensor) -> Tensor:
    """Return the tensor itself if it is contiguous, otherwise a contiguous copy of it in the buffer."""
    return x if x.is_contiguous() else buffer[: x.nbytes].view(x.dtype).view(x.shape).copy_(x)


def mark_changed(tensors: Sequence[Tensor]) -> None:
    """Increment the tensors' versions, so that autograd refuses a backward pass through changed ones.

    torch.library does not do so for mutable arguments.
    """
    torch.autograd.graph.increment_version(list(filterfalse(Tensor.is_inference, tensors)))


def max_abs(x: Tensor) -> float:
    """The largest absolute value; 0 if x is empty, NaN if x contains one."""
    return float(x.detach().abs().amax()) if x.numel() else 0.0


def snap_(x: Tensor, step: float) -> None:
    """Apply `spec.snap` in place."""
    with torch.no_grad():
        x.div_(step).round_().mul_(step).add_(0.0)


_cpp.join_openmp()

# --- registration ---------------------------------------------------------------------------------------------


def _implementation(op: str, backend: ModuleType) -> Callable[..., Any]:
    """Return a function that runs the op, with the signature of its schema.

    torch.library passes the fields of a `Place` as separate arguments.
    """
    before, place, _ = ops.SCHEMAS[op].partition(ops.PLACE)
    if not place:
        return partial(ops.RUN[op], backend)
    run, first = ops.RUN[op], before.count(",")
    end = first + len(Place._fields)

    def run_op(*args: Any) -> Any:
        return run(backend, *args[:first], Place(*args[first:end]), *args[end:])

    def run_read_only_op(*args: Any) -> Any:
        result = run_op(*args)
        return torch.from_numpy(result) if isinstance(result, np.ndarray) else result

    return run_read_only_op if op in READ_ONLY_OPS else run_op


def _fake(op: str) -> Callable[..., Any]:
    """Return the op for fake tensors. It returns None or, for `project`, an empty tensor of the result's shape."""

    def fake(tensors: Sequence[Tensor], seeds: Tensor, *arguments: Any) -> Tensor:
        return seeds.new_empty(seeds.shape, dtype=torch.float64)

    return fake if ops.SCHEMAS[op].endswith("-> Tensor") else lambda *arguments: None


_library = torch.library.Library("hosfl", "DEF")
for _op, _schema in ops.SCHEMAS.items():
    # A CUDA graph that torch.compile captures on its own would replay the seeds and coefficients of the captured call.
    _library.define(_op + _schema, tags=(torch.Tag.cudagraph_unsafe,))
    for _key, _backend in DISPATCH.items():
        _library.impl(_op, _implementation(_op, _backend), _key)
    torch.library.register_fake(f"hosfl::{_op}", _fake(_op), lib=_library)
