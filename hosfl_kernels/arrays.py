"""One interface to numpy arrays and torch tensors, for argument validation and the C++ backend.

torch is imported only when there is a tensor, so that the caller has imported it already.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

    Array = NDArray[Any] | Tensor

DTYPES = ("float32", "bfloat16", "float16")
Layouts = list[tuple[int, int, Any, bool]]  # see `layouts`


def is_numpy(x: object) -> TypeGuard[NDArray[Any]]:
    """Whether x is a numpy array."""
    return isinstance(x, np.ndarray)


def may_be_tensor(x: object) -> bool:
    """Whether x looks like a tensor. `tensors.check`, which needs torch, makes sure of it.

    Tests for an attribute that is not a method: torch.compile of torch 2.8 does not see methods.
    """
    return not is_numpy(x) and hasattr(x, "requires_grad")


def tensors_module() -> Any:
    """Import hosfl_kernels.tensors, which registers the ops with torch, and return it."""
    import hosfl_kernels.tensors as tensors  # takes half the time of `from hosfl_kernels import tensors`

    return tensors


@cache
def dtype_name(dtype: Any) -> str | None:
    """The name in DTYPES of a dtype of numpy or torch; None if it is another dtype.

    numpy has no bfloat16: uint16 stands for its bits, and the bfloat16 of the package ml_dtypes is taken, too.
    """
    name = str(dtype)  # ">f4", which is in no list, for foreign byte orders
    name = "bfloat16" if name == "uint16" else name.removeprefix("torch.")
    return name if name in DTYPES else None


def addresses(xs: Sequence[Any]) -> list[int]:
    """The address of each array's first element."""
    return [x.ctypes.data for x in xs] if xs and is_numpy(xs[0]) else [x.data_ptr() for x in xs]


def sizes(xs: Sequence[Any]) -> list[int]:
    """The number of each array's elements."""
    return [x.size for x in xs] if xs and is_numpy(xs[0]) else [x.numel() for x in xs]


def are_row_major(xs: Sequence[Any]) -> list[bool]:
    """For each array, whether it is contiguous in C order and, if it is a numpy array, aligned."""
    return (
        [x.flags.c_contiguous and x.flags.aligned for x in xs]
        if xs and is_numpy(xs[0])
        else [x.is_contiguous() for x in xs]
    )


def layouts(xs: Sequence[Any]) -> Layouts:
    """(begin, end, device, row_major) of each array. begin, end: addresses. row_major: see `are_row_major`."""
    if xs and is_numpy(xs[0]):
        return [(at := x.ctypes.data, at + x.nbytes, "cpu", x.flags.c_contiguous and x.flags.aligned) for x in xs]
    return [(at := x.data_ptr(), at + x.nbytes, x.device, x.is_contiguous()) for x in xs]


def cache_key(xs: Sequence[Any]) -> tuple[Any, ...] | None:
    """A hashable key of all that validation reads from a list of tensors: addresses, sizes, devices, dtypes.

    None for numpy arrays, and if a tensor is not contiguous. Each property is read by `map` with a C function: a Python
    loop takes three times as long.
    """
    if not xs or is_numpy(xs[0]):
        return None
    kind = tensors_module().Tensor
    if not all(map(kind.is_contiguous, xs)):
        return None
    numbers = (tuple(map(read, xs)) for read in (kind.data_ptr, kind.numel, kind.get_device))
    return *numbers, tuple(map(attrgetter("dtype"), xs))


def is_channels_last(x: Any) -> bool:
    """Whether x is a tensor in the memory format channels_last or channels_last_3d."""
    if is_numpy(x):
        return False
    import torch

    formats = (torch.channels_last, torch.channels_last_3d)
    return any(x.is_contiguous(memory_format=f) for f in formats)


def mixed_kinds_error(x: Any, name: str) -> TypeError:
    """Return the TypeError for an element that is neither array nor tensor, or of the other kind than the rest."""
    if is_numpy(x) or may_be_tensor(x):
        kind, others = ("numpy array", "torch.Tensors") if is_numpy(x) else ("torch.Tensor", "numpy arrays")
        return TypeError(f"{name} is a {kind} among {others}: pass one kind in a call")
    return TypeError(f"{name} is {type(x).__name__}, not a numpy array or a torch.Tensor")


def to_numpy(x: Any) -> NDArray[Any]:
    """View an array, or a tensor on the CPU, as a numpy array."""
    return x if is_numpy(x) else x.detach().numpy()


def storage(x: Any) -> NDArray[Any]:
    """View an array, or a tensor on the CPU, in the format of spec.py: flat, bfloat16 as uint16."""
    if dtype_name(x.dtype) != "bfloat16":
        return to_numpy(x).reshape(-1)
    if not is_numpy(x):
        import torch

        x = x.view(torch.int16)
    return to_numpy(x).reshape(-1).view(np.uint16)


def max_abs(x: NDArray[np.float32]) -> float:
    """The largest absolute value; 0 if x is empty, NaN if x contains one."""
    return float(np.maximum(x.max(), -x.min())) if x.size else 0.0


def snap_(x: NDArray[np.float32], step: float) -> None:
    """Apply `spec.snap` in place."""
    np.divide(x, np.float32(step), out=x)
    np.rint(x, out=x)
    np.multiply(x, np.float32(step), out=x)
    np.add(x, np.float32(0), out=x)
